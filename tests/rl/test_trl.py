"""Losses, gradients, advantages and importance weights against TRL's own code, same numbers.

Where its conventions differ from ours:

* its eps in a z-score is 1e-4 (ours 1e-6), and its std the sample one, as ours;
* its cispo clips at epsilon_high itself (ours 1 + clip_high) and has no lower bound (clip_low=1);
* its delta bounds the ratio of every sign of advantage, ours where the advantage is negative:
  the same for delta > 1 + epsilon_high;
* its KL is weighted by the ratio unless told not to (kl_importance);
* its dapo and cispo divide by the tokens of the whole generation batch, ours by those of the
  mini-batch; its dr_grpo and grpo count every row, ours those that have tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.rl import losses
from pr2jax.rl.advantages import group_advantages, overlong_penalty
from pr2jax.rl.objective import kl_terms, policy_terms
from pr2jax.sampler.types import SamplingParams
from tests.rl import tiny

ROWS, LENGTH, MAX_TOKENS = 6, 7, 11
EPS = {"epsilon": 0.2, "epsilon_high": 0.28}
SEQUENCE = {"importance_sampling_level": "sequence"}
NARROW = {"epsilon": 0.03, "epsilon_high": 0.04}
# name: (TRL's settings, ours); "beta" and "tis" are ours to hand over.
LOSSES = {
    "grpo": (EPS | {"loss_type": "grpo"}, {"aggregation": "sequence_mean"}),
    "bnpo": (EPS | {"loss_type": "bnpo"}, {"aggregation": "token_mean"}),
    "dapo": (EPS | {"loss_type": "dapo"}, {"aggregation": "token_mean"}),
    "dr_grpo": (
        EPS | {"loss_type": "dr_grpo", "max_completion_length": MAX_TOKENS},
        {"aggregation": "fixed"},
    ),
    "gspo": (
        NARROW | SEQUENCE | {"loss_type": "grpo"},
        {"ratio": "sequence", "aggregation": "sequence_mean", "clip_low": 0.03, "clip_high": 0.04},
    ),
    "gspo, dapo's mean": (
        NARROW | SEQUENCE | {"loss_type": "dapo"},
        {"ratio": "sequence", "clip_low": 0.03, "clip_high": 0.04},
    ),
    "delta": (EPS | {"loss_type": "bnpo", "delta": 1.5}, {"dual_clip": 1.5}),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.3},
        {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.3},
    ),
    "beta": (EPS | {"loss_type": "bnpo", "use_bias_correction_kl": False}, {"kl_coef": 0.1}),
    "beta, corrected": (EPS | {"loss_type": "bnpo"}, {"kl_coef": 0.1, "kl_importance": True}),
    "tis": (EPS | {"loss_type": "bnpo"}, {"tis_cap": 1.2, "scoring_pass": "always"}),
    "gspo, tis by sequence": (
        NARROW | SEQUENCE | {"loss_type": "grpo"},
        {
            "ratio": "sequence",
            "aggregation": "sequence_mean",
            "clip_low": 0.03,
            "clip_high": 0.04,
            "tis_cap": 1.2,
            "tis_level": "sequence",
            "scoring_pass": "always",
        },
    ),
}
ADVANTAGES = {
    "grpo": ("grpo", {"scale_rewards": "group"}),
    "dr_grpo": ("grpo", {"scale_rewards": "none"}),
    "batch": ("grpo", {"scale_rewards": "batch"}),
    "rloo": ("rloo", {"beta": 0.0}),
}
CAP = 1.2


def make(seed):
    """Log-probs whose ratios reach beyond every bound; every row has tokens."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, LENGTH)
    old = -3 * rng.random(shape)
    near = lambda size: old + size * rng.normal(size=shape)
    mask = np.arange(LENGTH) < np.array([7, 1, 3, 5, 2, 6])[:, None]
    return {
        "new": near(0.4),
        "old": old,
        "behavior": near(0.2),
        "ref": near(0.3),
        "mask": mask.astype(np.float64),
        "advantages": rng.normal(size=ROWS),
    }


def config(settings):
    return tiny.rl_config(sampling=SamplingParams(max_tokens=MAX_TOKENS), **settings)


def ours(case, cfg):
    """Loss and gradient by the current log-probs."""
    x = {key: jnp.asarray(value, jnp.float32) for key, value in case.items()}

    def loss(new):
        weights = losses.token_weights(x["mask"], cfg.aggregation, cfg.sampling.max_tokens)
        terms, _ = policy_terms(
            new, x["old"], x["behavior"], x["mask"], x["advantages"][:, None], cfg
        )
        kl = kl_terms(new, x["old"], x["ref"], x["mask"], cfg)
        return jnp.sum(weights * (terms + cfg.kl_coef * kl))

    return jax.value_and_grad(loss)(x["new"])


def tis(case, level):
    found = losses.truncated_importance(case["old"], case["behavior"], case["mask"], CAP, level)
    return found[0]


@pytest.fixture(scope="module")
def cases():
    return {name: make(seed) for seed, name in enumerate(LOSSES)}


@pytest.fixture(scope="module")
def rewards():
    return np.random.default_rng(9).choice([0.0, 0.25, 1.0], size=16).astype(np.float32)


@pytest.fixture(scope="module")
def trl(reference, cases, rewards):
    arrays = {f"{n}/{key}": value for n, case in cases.items() for key, value in case.items()}
    arrays |= {f"weights/{key}": cases["tis"][key] for key in ("mask", "old", "behavior")}
    params = {"losses": [], "overlong": {"lengths": [0, 7, 8, 9, 10, 11, 12]}}
    for name, (settings, mine) in LOSSES.items():
        case = {"name": name, "settings": settings, "beta": mine.get("kl_coef", 0.0)}
        if "tis_cap" in mine:
            # In float64 and by hand: TRL multiplies by what it is given.
            x = cases[name]
            logs = (x["old"] - x["behavior"]) * x["mask"]
            if mine.get("tis_level") == "sequence":
                logs = logs.sum(1, keepdims=True)
            arrays[f"{name}/tis"] = np.minimum(np.exp(logs), CAP)
            case["correction"] = True
        params["losses"].append(case)
    params["overlong"] |= {"max_tokens": MAX_TOKENS, "buffer": 4}
    params["advantages"] = [
        {"name": name, "kind": kind, "generations": 4, "settings": settings}
        for name, (kind, settings) in ADVANTAGES.items()
    ]
    params["weights"] = [
        {"name": level, "mode": f"{level}_truncate", "cap": CAP} for level in ("token", "sequence")
    ]
    return reference("trl_losses", arrays | {"rewards": rewards}, params)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient(name, cases, trl):
    cfg = config(LOSSES[name][1])
    cfg.validate()
    value, grad = ours(cases[name], cfg)
    np.testing.assert_allclose(value, trl[f"{name}/loss"], rtol=2e-5)
    np.testing.assert_allclose(grad, trl[f"{name}/grad"], rtol=2e-5, atol=1e-7)
    assert np.any(trl[f"{name}/grad"] != 0)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages(name, rewards, trl):
    got = group_advantages(rewards, np.repeat(np.arange(4), 4), name, eps=1e-4)
    np.testing.assert_allclose(got, trl[f"{name}/advantages"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights(level, cases, trl):
    want = trl[f"{level}/tis"]
    np.testing.assert_allclose(tis(cases["tis"], level), want, rtol=1e-6)
    assert want.max() == pytest.approx(CAP)
    assert np.any(want < CAP)


def test_overlong(trl):
    """TRL's goes on at -1 beyond max_tokens, which a sampler here never exceeds."""
    lengths = np.array([0, 7, 8, 9, 10, 11, 12])
    np.testing.assert_array_equal(overlong_penalty(lengths, MAX_TOKENS, 4), trl["overlong"])
