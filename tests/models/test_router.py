"""Scores, selection, gates and losses of the router against float64, one token at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.models import router
from pr2jax.models.config import MoEConfig
from tests.models import oracle

RNG = np.random.default_rng(0)
N, D, E, K = 40, 16, 12, 3
LOGITS = RNG.normal(size=(N, E)).astype(np.float32)
BASE = MoEConfig(num_experts=E, top_k=K)
FAMILIES = {
    "post": BASE,
    "none": dataclasses.replace(BASE, normalize="none"),
    "pre": dataclasses.replace(BASE, normalize="pre"),
    "sigmoid": dataclasses.replace(BASE, score="sigmoid", normalize="post", routed_scaling=2.5),
    "sigmoid_raw": dataclasses.replace(BASE, score="sigmoid", normalize="none"),
    "groups": dataclasses.replace(
        BASE, score="sigmoid", selection_bias=True, num_groups=4, top_groups=2
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_selection_and_gates(name):
    cfg = FAMILIES[name]
    bias = RNG.normal(size=E).astype(np.float32) if cfg.selection_bias else None
    ids = router.select(LOGITS, bias, cfg)
    weights = router.gates(LOGITS, ids, cfg)
    for n in range(N):
        logits = np.float64(LOGITS[n])
        expected = oracle.select(logits, bias, cfg)
        np.testing.assert_array_equal(ids[n], expected)
        np.testing.assert_allclose(weights[n], oracle.gates(logits, expected, cfg), rtol=1e-5)


def test_bias_moves_selection_and_no_gate():
    cfg = dataclasses.replace(BASE, score="sigmoid", selection_bias=True)
    bias = np.zeros(E, np.float32)
    bias[7] = 10.0
    ids = router.select(LOGITS, bias, cfg)
    assert (np.asarray(ids[:, 0]) == 7).all()
    weights = router.gates(LOGITS, ids, cfg)
    expected = [
        oracle.gates(np.float64(x), np.asarray(i), cfg) for x, i in zip(LOGITS, ids, strict=True)
    ]
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    # The bias is no trained parameter: nothing flows to it.
    through = lambda b: jnp.sum(router.selection_scores(jnp.asarray(LOGITS), b, cfg))
    assert not np.asarray(jax.grad(through)(jnp.asarray(bias))).any()


def test_groups_outside_the_best_are_never_chosen():
    cfg = FAMILIES["groups"]
    ids = np.asarray(router.select(LOGITS, np.zeros(E, np.float32), cfg))
    assert max(len({e // 3 for e in row}) for row in ids) <= 2
    choice = np.asarray(router.selection_scores(LOGITS, np.zeros(E, np.float32), cfg))
    assert (np.isinf(choice).sum(-1) == 6).all()


def test_ties_go_to_the_lower_id():
    tied = np.zeros((3, E), np.float32)
    tied[1, [4, 9]] = 1.0
    tied[2, [2, 5, 7, 11]] = 2.0
    ids = router.select(tied, None, BASE)
    np.testing.assert_array_equal(ids, [[0, 1, 2], [4, 9, 0], [2, 5, 7]])


def test_very_negative_logits_still_order_experts():
    # Softmax scores underflow to 0 here; logits do not.
    logits = -1000.0 * np.arange(E, dtype=np.float32)[None] + 3000.0
    np.testing.assert_array_equal(router.select(logits[:, ::-1], None, BASE), [[11, 10, 9]])


@pytest.mark.parametrize("name", ["post", "none", "pre", "sigmoid"])
def test_gate_gradient_reaches_forced_drifted_experts(name):
    cfg = FAMILIES[name]
    # The experts that the live router ranks last.
    forced = np.argsort(LOGITS, -1)[:, :K]
    weight = RNG.normal(size=(N, K))
    value = lambda z: jnp.sum(router.gates(z, forced, cfg) * weight)
    grad = np.asarray(jax.grad(value)(jnp.asarray(LOGITS)), np.float64)
    assert (np.abs(np.take_along_axis(grad, forced, -1)) > 1e-7).all()
    # Central differences of the float64 formula.
    for n in (0, 7):
        for e in range(E):
            step = np.eye(E)[e] * 1e-5
            at = lambda z: oracle.gates(z, forced[n], cfg) @ weight[n]  # noqa: B023
            z = np.float64(LOGITS[n])
            fd = (at(z + step) - at(z - step)) / 2e-5
            np.testing.assert_allclose(grad[n, e], fd, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("name", ["post", "pre", "sigmoid"])
def test_forced_experts_of_vanishing_score_have_finite_gradients(name):
    cfg = FAMILIES[name]
    logits = np.zeros((1, E), np.float32)
    logits[0, :K] = [-60.0, -61.0, -90.0]  # softmax and sigmoid scores about 1e-26
    forced = np.arange(K)[None]
    weights = router.gates(logits, forced, cfg)
    np.testing.assert_allclose(
        weights[0], oracle.gates(np.float64(logits[0]), forced[0], cfg), 1e-5
    )
    grad = jax.grad(lambda z: router.gates(z, forced, cfg)[0, 0])(jnp.asarray(logits))[0]
    g = np.exp(-1) / (1 + np.exp(-1)) ** 2 * cfg.routed_scaling  # d sigmoid at a distance of 1
    np.testing.assert_allclose(grad[:3], [g, -g, 0], rtol=1e-4, atol=1e-9)


def test_agreement_and_margin():
    used = np.array([[0, 1, 2], [3, 4, 5], [9, 8, 7]])
    live = np.array([[2, 0, 1], [5, 6, 7], [0, 1, 2]])
    np.testing.assert_array_equal(router.agreement(used, live), [3, 1, 0])
    ordered = -np.sort(-np.float64(LOGITS), -1)
    np.testing.assert_allclose(
        router.margin(LOGITS, K), ordered[:, K - 1] - ordered[:, K], atol=1e-6
    )
    assert not np.asarray(router.margin(LOGITS, E)).any()


def test_gather_experts_is_exact():
    ids = RNG.integers(0, E, (N, K))
    np.testing.assert_array_equal(
        router.gather_experts(jnp.asarray(LOGITS), jnp.asarray(ids)),
        np.take_along_axis(LOGITS, ids, -1),
    )


@pytest.mark.parametrize("name", ["post", "sigmoid"])
def test_losses_and_load_over_real_tokens(name):
    cfg = FAMILIES[name]
    logits = RNG.normal(size=(2, 9, E))
    mask = RNG.random((2, 9)) < 0.6
    ids = oracle.top_k(logits, K)
    balance, z, load = router.router_stats(jnp.float32(logits), ids, mask, cfg)
    share, prob, squares, counts = np.zeros(E), np.zeros(E), 0.0, np.zeros(E)
    n = mask.sum()
    for b, t in np.argwhere(mask):
        score = oracle.softmax(logits[b, t])
        if cfg.score == "sigmoid":
            score = oracle.sigmoid(logits[b, t])
            score = score / score.sum()
        prob += score / n
        squares += np.log(np.exp(logits[b, t]).sum()) ** 2 / n
        for e in ids[b, t]:
            counts[e] += 1
            share[e] += 1 / (n * K)
    np.testing.assert_allclose(load, counts)
    np.testing.assert_allclose(balance, E * share @ prob, rtol=1e-5)
    np.testing.assert_allclose(z, squares, rtol=1e-5)


def test_perfect_balance_is_one():
    ids = np.arange(E * K).reshape(1, E, K) % E
    balance, _, load = router.router_stats(jnp.zeros((1, E, E)), ids, np.ones((1, E), bool), BASE)
    assert float(balance) == pytest.approx(1.0)
    np.testing.assert_array_equal(load, np.full(E, K))


def test_bias_update_lifts_the_underloaded():
    load = np.array([[4.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    new = router.update_selection_bias(jnp.ones((2, 4)), load, 0.001)
    np.testing.assert_allclose(new, [[0.999, 1.001, 1, 1], [1, 1, 1, 1]])


def test_project_is_fp32_at_highest_precision():
    x = RNG.normal(size=(5, 7, D)).astype(np.float32)
    w = RNG.normal(size=(D, E)).astype(np.float32)
    text = jax.jit(router.project).lower(x.astype(jnp.bfloat16), w).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) == 1
    assert "precision = [HIGHEST, HIGHEST]" in dots[0]
    assert "bf16" not in dots[0]
    np.testing.assert_allclose(router.project(x, w), np.float64(x) @ w, atol=1e-5)
