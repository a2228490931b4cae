"""Every grouped matmul against float64 loops, in value and gradient, for awkward loads."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.models.experts import (
    ExpertWeights,
    apply_experts,
    choose_block_size,
    plan_dispatch,
)
from pr2jax.models.ragged import experts_ragged
from tests.models import oracle

D, F, E = 6, 5, 7


def make(ids, seed=0):
    rng = np.random.default_rng(seed)
    n, k = ids.shape
    return {
        "x": rng.normal(size=(n, D)),
        "weights": ExpertWeights(
            rng.normal(size=(E, D, F)), rng.normal(size=(E, D, F)), rng.normal(size=(E, F, D))
        ),
        "gates": rng.random((n, k)),
        "dy": rng.normal(size=(n, D)),
    }


def distinct(n, k, seed=0):
    return np.argsort(np.random.default_rng(seed).random((n, E)), -1)[:, :k].astype(np.int32)


LOADS = {
    "even": distinct(24, 2),
    "fewer_assignments_than_experts": distinct(2, 2),
    "one_token": distinct(1, 3),
    "one_expert_gets_everything": np.full((13, 1), 4, np.int32),
    "empty_experts": np.array([[0, 6], [6, 0], [0, 6], [3, 6], [6, 0]], np.int32),
    "all_experts": distinct(3, E),
    # An id of E or above is no expert's: another device's, padding, or nothing at all.
    "some_of_no_expert": np.where(distinct(24, 2) > 3, E + 2, distinct(24, 2)),
    "all_of_no_expert": np.full((9, 2), E, np.int32),
}


def by_hand(ids, x, weights, gates, dy, experts=E):
    """Value and gradients of sum(y * dy), one assignment at a time, float64."""
    y, dx, dgates = np.zeros_like(x), np.zeros_like(x), np.zeros_like(gates)
    dw = ExpertWeights(*map(np.zeros_like, weights))
    for n, row in enumerate(ids):
        for k, e in enumerate(row):
            if e >= experts:
                continue
            wg, wu, wd = (w[e] for w in weights)
            g, u = x[n] @ wg, x[n] @ wu
            s = oracle.sigmoid(g)
            h = g * s * u
            y[n] += gates[n, k] * h @ wd
            dgates[n, k] = dy[n] @ (h @ wd)
            dh = gates[n, k] * wd @ dy[n]
            du, dg = dh * g * s, dh * u * (s + g * s * (1 - s))
            dx[n] += wg @ dg + wu @ du
            dw.gate[e] += np.outer(x[n], dg)
            dw.up[e] += np.outer(x[n], du)
            dw.down[e] += np.outer(h, gates[n, k] * dy[n])
    return y, dx, dw, dgates


def run(ids, case, impl, block, dtype=jnp.float32):
    """(y, dx, dweights, dgates) as the implementation computes them."""

    def apply(x, weights, gates):
        if impl == "pieces":
            return experts_ragged(x, *weights, gates, jnp.asarray(ids), ids.size, rows=block)
        return apply_experts(x, weights, gates, jnp.asarray(ids), impl=impl, block=block)

    def fn(x, weights, gates, dy):
        y, pull = jax.vjp(apply, x, weights, gates)
        return y, *pull(dy)

    cast = lambda t: jax.tree.map(lambda a: jnp.asarray(a, dtype), t)
    return oracle.compiled(fn)(
        cast(case["x"]),
        cast(case["weights"]),
        jnp.float32(case["gates"]),
        jnp.float32(case["dy"]),
    )


SETTINGS = [("dense", 0), ("batched", 4), ("ragged", 0), ("blocks", 0), ("blocks", 1)]
AWKWARD = ("even", "empty_experts", "some_of_no_expert")
CASES = [(load, *s) for load in AWKWARD for s in SETTINGS] + [
    (load, "blocks", b)
    for load, b in (
        ("fewer_assignments_than_experts", 0),
        ("one_token", 2),
        ("one_expert_gets_everything", 5),
        ("all_experts", 64),
        ("all_of_no_expert", 4),
    )
]
# Ragged products in pieces of so many sorted assignments: some, one, more than there are.
CASES += [
    (load, "pieces", rows)
    for load, rows in (
        ("even", 20),
        ("empty_experts", 3),
        ("one_expert_gets_everything", 5),
        ("some_of_no_expert", 7),
        ("all_of_no_expert", 4),
        ("one_token", 3),
    )
]


@pytest.mark.parametrize("load,impl,block", CASES)
def test_value_and_gradients(load, impl, block):
    ids = LOADS[load]
    case = make(ids)
    expected = by_hand(ids, case["x"], case["weights"], case["gates"], case["dy"])
    got = run(ids, case, impl, block)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_bf16_products_fp32_combine():
    ids = LOADS["even"]
    case = make(ids)
    exact = by_hand(ids, case["x"], case["weights"], case["gates"], case["dy"])
    got = run(ids, case, "blocks", 8, jnp.bfloat16)
    assert got[0].dtype == jnp.float32
    assert got[1].dtype == got[2].gate.dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        error = np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
        assert error < 0.03  # some products of relative error 2^-8 each


@pytest.mark.parametrize("block", [1, 3, 8, 64])
@pytest.mark.parametrize("load", LOADS)
def test_plan_places_every_assignment_once(load, block):
    ids = LOADS[load]
    plan = jax.device_get(oracle.compiled(partial(plan_dispatch, num_experts=E, block=block))(ids))
    valid = plan.valid.astype(bool)
    here = np.flatnonzero(ids.reshape(-1) < E)
    assert sorted(plan.assignment[valid]) == list(here)  # dropless, none twice
    np.testing.assert_array_equal(plan.here, ids < E)
    np.testing.assert_array_equal(plan.token[valid], plan.assignment[valid] // ids.shape[1])
    expert_of_slot = np.repeat(plan.block_expert, block)
    np.testing.assert_array_equal(expert_of_slot[valid], ids.reshape(-1)[plan.assignment[valid]])
    np.testing.assert_array_equal(plan.assignment[plan.slot.reshape(-1)[here]], here)
    assert valid[plan.slot.reshape(-1)[here]].all()
    # Compute follows the assignments: blocks in use = sum over experts of ceil(load / block).
    in_use = sum(-(-int((ids == e).sum()) // block) for e in range(E))
    assert plan.num_blocks == in_use <= len(plan.block_expert)
    assert not valid[in_use * block :].any()


def test_loop_runs_over_the_blocks_in_use_only():
    # Weights of unused experts are NaN, and so would be a product with them; and the compiled
    # loop's bound is data: one program serves loads of different block counts.
    case = make(LOADS["even"])
    fn = oracle.compiled(lambda x, w, g, ids: apply_experts(x, w, g, ids, impl="blocks", block=4))
    for ids in (np.full((24, 2), 4, np.int32), LOADS["even"] % 3):
        used = np.isin(np.arange(E), ids)[:, None, None]
        weights = ExpertWeights(*(np.where(used, w, np.nan) for w in case["weights"]))
        y = fn(
            jnp.float32(case["x"]),
            ExpertWeights(*map(jnp.float32, weights)),
            jnp.float32(case["gates"]),
            ids,
        )
        assert np.isfinite(y).all()
    text = fn.lower(
        jnp.float32(case["x"]),
        ExpertWeights(*map(jnp.float32, case["weights"])),
        jnp.float32(case["gates"]),
        ids,
    ).as_text()
    assert "stablehlo.while" in text
    # No product covers more than one block of rows.
    rows = {
        line.split("-> tensor<")[1].split("x")[0]
        for line in text.splitlines()
        if "dot_general" in line and f"x{F}x" in line.replace("f32", "x")
    }
    assert rows <= {"4"}


def test_block_size_follows_the_load():
    for experts in (8, 16, 128):
        sizes = [choose_block_size(a, experts) for a in (1, 128, 512, 4096, 65536, 10**6)]
        assert sizes == sorted(sizes)
        assert all(8 <= s <= 256 and s & (s - 1) == 0 for s in sizes)
    # A decode step of 128 assignments does not pay for blocks of 256; nor for reading an expert's
    # weights twice because nine rows fell to it.
    assert choose_block_size(128, 16) == 16


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="impl: 'fast' is not one of blocks"):
        apply_experts(
            jnp.ones((1, D)),
            make(LOADS["even"])["weights"],
            None,
            jnp.zeros((1, 1), int),
            impl="fast",
        )
