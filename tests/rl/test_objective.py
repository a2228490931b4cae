"""The composed policy loss against float64 loops: values, and gradients by finite differences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.rl.losses import token_weights
from pr2jax.rl.objective import kl_terms, policy_terms
from pr2jax.sampler.types import SamplingParams
from tests.rl import tiny
from tests.rl.paper import on_paper
from tests.rl.tiny import value

B, T, MAX_TOKENS = 4, 6, 9
LOW, HIGH, DUAL, CAP, BETA = 0.1, 0.15, 1.3, 1.1, 0.3
KINDS = [("ppo", 0.0), ("ppo", DUAL), ("cispo", 0.0)]
LEVELS = ("token", "sequence")
TIS = (None, *LEVELS)
AGGREGATIONS = itertools.cycle(["token_mean", "sequence_mean", "fixed"])
ESTIMATORS = itertools.cycle([("k1", 1), ("k2", 0), ("k3", 1), ("k1", 0), ("k3", 0)])
# Ratio, surrogate and correction in every combination; aggregations and KLs are dealt out.
CASES = [
    {
        "ratio": ratio,
        "surrogate": kind,
        "dual_clip": dual,
        "tis_cap": CAP if tis else 0.0,
        "tis_level": tis or "token",
        "scoring_pass": "always",
        "aggregation": next(AGGREGATIONS),
        "kl_coef": BETA,
        "kl_estimator": estimator,
        "kl_importance": bool(importance),
    }
    for (ratio, (kind, dual), tis), (estimator, importance) in zip(
        itertools.product(LEVELS, KINDS, TIS), ESTIMATORS, strict=False
    )
]
NAMES = [
    "-".join(str(case[key]) for key in ("ratio", "surrogate", "dual_clip", "tis_cap", "tis_level"))
    for case in CASES
]


def config(settings):
    sampling = SamplingParams(max_tokens=MAX_TOKENS)
    cfg = tiny.rl_config(clip_low=LOW, clip_high=HIGH, sampling=sampling, **settings)
    cfg.validate()
    return cfg


def make(seed=0):
    """Ratios of either sign beyond every bound; the third row has no tokens."""
    rng = np.random.default_rng(seed)
    old = -3 * rng.random((B, T))
    near = lambda size: (old + size * rng.normal(size=(B, T))).astype(np.float32)
    mask = (rng.random((B, T)) < 0.8).astype(np.float32)
    mask[2] = 0
    adv = np.array([1.2, -0.7, 0.4, -1.1], np.float32)
    # Far enough off as a whole, so that sequence ratios are clipped too.
    drift = np.array([0.3, 0.5, 0.0, -0.3], np.float32)[:, None]
    behavior = near(0.2) - drift / 3
    return near(0.2) + drift, old.astype(np.float32), behavior, near(0.3), mask, adv


def loss_of(cfg, data):
    """new [B, T] -> (loss, metrics), in micro-batches of `rows` rows as the learner sums them."""
    _, old, behavior, ref, mask, adv = data

    def loss(new, rows):
        weights = token_weights(mask, cfg.aggregation, MAX_TOKENS)
        total, found = 0.0, []
        for i in range(0, B, rows):
            s = slice(i, i + rows)
            own = (new[s], old[s])
            terms, metrics = policy_terms(*own, behavior[s], mask[s], adv[s, None], cfg)
            kl = kl_terms(*own, ref[s], mask[s], cfg)
            total += jnp.sum(weights[s] * (terms + cfg.kl_coef * kl))
            found.append(metrics)
        return total, found

    return loss


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_every_combination(case):
    cfg, data = config(case), make()
    new = data[0]
    run = jax.jit(jax.value_and_grad(loss_of(cfg, data), has_aux=True), static_argnums=1)
    (got, (metrics,)), grad = run(new, B)
    base = new.astype(np.float64)
    want, seen = on_paper(base, base, *data[1:], cfg)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for b, t in np.ndindex(B, T):
        step = np.zeros((B, T))
        step[b, t] = 1e-6
        ends = [on_paper(base + sign * step, base, *data[1:], cfg)[0] for sign in (1, -1)]
        np.testing.assert_allclose(grad[b, t], (ends[0] - ends[1]) / 2e-6, atol=2e-6)
    assert metrics["clip_low"][0] == seen["low"] > 0
    assert metrics["clip_high"][0] == seen["high"] > 0
    if cfg.dual_clip:
        assert metrics["clip_dual"][0] == seen["dual"] > 0
    if cfg.tis_cap:
        np.testing.assert_allclose(metrics["tis_capped"][0], seen["capped"], rtol=1e-6)
        assert seen["capped"] > 0
        np.testing.assert_allclose(metrics["tis_max"][0], CAP, rtol=1e-6)
    # And micro-batches, one of them without a token, sum to the whole.
    (split, parts), split_grad = run(new, 1)
    np.testing.assert_allclose(split, got, rtol=1e-5)
    np.testing.assert_allclose(split_grad, grad, rtol=1e-5, atol=1e-7)
    assert parts[0].keys() == metrics.keys()


def test_sequence_ratio_is_the_geometric_mean():
    new, old, *_, mask, adv = data = make(1)
    cfg = config({"ratio": "sequence"})
    _, metrics = policy_terms(new, old, old, mask, adv[:, None], cfg)
    rows = [b for b in range(B) if mask[b].any()]
    ratios = [np.prod(np.exp(new[b] - old[b])[mask[b] > 0]) ** (1 / mask[b].sum()) for b in rows]
    np.testing.assert_allclose(value(metrics, "sequence_ratio_mean"), np.mean(ratios), rtol=1e-5)
    np.testing.assert_allclose(value(metrics, "sequence_ratio_max"), np.max(ratios), rtol=1e-5)
    np.testing.assert_allclose(value(metrics, "sequence_ratio_min"), np.min(ratios), rtol=1e-5)
    assert len(rows) == 3
    empty = [x[2:3] for x in data[:5]]
    _, metrics = policy_terms(empty[0], empty[1], empty[1], empty[4], adv[2:3, None], cfg)
    assert all(metrics[f"sequence_ratio_{k}"][1] == 0 for k in ("mean", "max", "min"))


@pytest.mark.parametrize("case", CASES[::4])
def test_infinities_outside_the_mask_reach_neither_value_nor_gradient(case):
    cfg, data = config(case), make()
    mask = data[4] > 0
    new = data[0]
    wild = np.where(mask, new, np.inf).astype(np.float32)
    run = jax.jit(jax.value_and_grad(loss_of(cfg, data), has_aux=True), static_argnums=1)
    for a, b in zip(jax.tree.leaves(run(new, B)), jax.tree.leaves(run(wild, B)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_on_policy_every_surrogate_has_the_policy_gradient():
    """At theta = theta_old all are -A grad log pi; only what is added to it differs."""
    _, old, *_, mask, adv = make()
    weights = token_weights(mask, "sequence_mean")
    for ratio, (kind, dual) in itertools.product(LEVELS, KINDS):
        cfg = config({"ratio": ratio, "surrogate": kind, "dual_clip": dual})
        loss = lambda new, cfg=cfg: jnp.sum(
            weights * policy_terms(new, old, old, mask, adv[:, None], cfg)[0]
        )
        np.testing.assert_allclose(jax.grad(loss)(old), -weights * adv[:, None], atol=1e-7)


@pytest.mark.parametrize(
    ("estimator", "importance", "descends"),
    [
        ("k1", False, "nothing"),
        ("k2", False, "reverse"),
        ("k3", False, "forward"),
        ("k1", True, "reverse"),
        ("k3", True, "reverse"),
    ],
)
def test_expected_gradient_of_the_reference_kl(estimator, importance, descends):
    """Summed over a whole vocabulary: the divergence whose gradient each estimator has."""
    rng = np.random.default_rng(0)
    softmax = lambda x: np.exp(x - np.log(np.exp(x).sum()))
    new = rng.normal(size=5)
    p, q, old = softmax(new), *(softmax(rng.normal(size=5)) for _ in range(2))
    want = {
        "nothing": np.zeros(5),
        "reverse": p * (np.log(p / q) - np.sum(p * np.log(p / q))),  # of KL(p || q)
        "forward": p - q,  # of KL(q || p)
    }[descends]
    cfg = config({"kl_coef": 1.0, "kl_estimator": estimator, "kl_importance": importance})
    # Tokens come from the new policy, or with the ratio from an old one.
    source = old if importance else p

    def expected(logits):
        logp = jax.nn.log_softmax(logits)[None]
        mask = np.ones((1, 5), np.float32)
        return jnp.sum(source * kl_terms(logp, np.log(source)[None], np.log(q)[None], mask, cfg))

    got = jax.grad(expected)(jnp.asarray(new, jnp.float32))
    np.testing.assert_allclose(got, want, atol=2e-6)
