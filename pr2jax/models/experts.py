"""Grouped SwiGLU over experts, dropless: compute follows the assignments that are there.

Four implementations of one function, `apply_experts`:
  blocks  (CPU) assignments are sorted by expert and padded to blocks of rows that share an expert;
          a loop with a dynamic trip count multiplies each block by its expert's weights, so that
          empty blocks cost nothing. The backward pass is written by hand: it gathers where
          automatic differentiation would scatter, and adds weight gradients in place.
  batched (GPU) the same blocks as one batched matmul over a static worst-case count of them.
  ragged  (TPU) `jax.lax.ragged_dot` on the sorted rows (ragged.py); on CPU E times the work.
  dense   every expert on every token, the oracle of the tests.
An id of E or above stands for no expert: that assignment costs nothing and adds nothing. So are
left out the experts of other devices (ring.py), padding, and responses that have ended.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pr2jax.models.ragged import experts_ragged, silu_mul

IMPLEMENTATIONS = ("blocks", "batched", "ragged", "dense")
BY_PLATFORM = {"cpu": "blocks", "gpu": "batched", "cuda": "batched", "tpu": "ragged"}


class ExpertWeights(NamedTuple):
    """SwiGLU weights of all experts."""

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]


class Dispatch(NamedTuple):
    """Where each assignment goes: slots are rows of the sorted, block-padded layout."""

    token: Int[Array, " slots"]  # the token a slot reads (any token when not valid)
    valid: Float[Array, " slots"]  # 1 where an assignment stands in the slot
    assignment: Int[Array, " slots"]  # which flattened (token, k) it is
    slot: Int[Array, "N K"]  # the slot of each assignment; 0 for one of no expert
    here: Bool[Array, "N K"]  # whether the assignment is to an expert
    block_expert: Int[Array, " blocks"]
    num_blocks: Int[Array, ""]  # blocks in use


def choose_block_size(num_assignments: int, num_experts: int) -> int:
    """Rows a block, a power of two between 8 and 256, by an expert's mean load m.

    About m / 2, so that little of the last block is empty; but 2m for loads of a decode step (to
    32), where a second block of an expert costs another reading of its weights.
    """
    mean = max(1, num_assignments / num_experts)
    rows = max(mean / 2, min(2 * mean, 32))
    return int(min(256, max(8, 2 ** round(np.log2(rows)))))


def plan_dispatch(ids: Int[Array, "N K"], num_experts: int, block: int) -> Dispatch:
    """Sorts assignments by expert and lays them out in blocks of `block` rows (static bound)."""
    n, k = ids.shape
    total = n * k
    flat = ids.reshape(total)
    max_blocks = min(total, (total + num_experts * (block - 1)) // block)
    order = jnp.argsort(flat, stable=True)
    experts = jnp.arange(num_experts)
    counts = jnp.sum(flat[:, None] == experts, axis=0, dtype=jnp.int32)
    first = jnp.cumsum(counts) - counts
    blocks = (counts + block - 1) // block
    block_end = jnp.cumsum(blocks)
    block_first = block_end - blocks
    block_ids = jnp.arange(max_blocks)
    block_expert = jnp.minimum(
        jnp.sum(block_ids[:, None] >= block_end[None, :], axis=1, dtype=jnp.int32), num_experts - 1
    )
    within = (block_ids - block_first[block_expert])[:, None] * block + jnp.arange(block)
    valid = within < counts[block_expert][:, None]
    rank = jnp.where(valid, first[block_expert][:, None] + within, 0).reshape(-1)
    assignment = order[rank]
    sorted_experts = flat[order]
    slot_sorted = block_first[sorted_experts] * block + jnp.arange(total) - first[sorted_experts]
    slot_sorted = jnp.where(sorted_experts < num_experts, slot_sorted, 0)
    slot = jnp.zeros(total, jnp.int32).at[order].set(slot_sorted, unique_indices=True)
    return Dispatch(
        token=assignment // k,
        valid=valid.reshape(-1).astype(jnp.float32),
        assignment=assignment,
        slot=slot.reshape(n, k),
        here=ids < num_experts,
        block_expert=block_expert,
        num_blocks=block_end[-1],
    )


def _blocks_forward(x, weights: ExpertWeights, plan: Dispatch, block: int):
    """y [slots, D], and the pre-activations [slots, F] that the backward pass needs."""
    d, f = weights.gate.shape[1:]
    xs = x[plan.token]
    slots = xs.shape[0]
    # Of few rows: XLA:CPU spends more on packing a bfloat16 matrix than the product would take.
    wide = (lambda a: a.astype(jnp.float32)) if block < 32 else (lambda a: a)

    def body(b, carry):
        ys, gs, us = carry
        e = plan.block_expert[b]
        start = b * block
        rows = lax.dynamic_slice(xs, (start, 0), (block, d))
        take = lambda w: wide(lax.dynamic_index_in_dim(w, e, keepdims=False))
        product = lambda a, w: (wide(a) @ take(w)).astype(x.dtype)
        g = product(rows, weights.gate)
        u = product(rows, weights.up)
        y = product(silu_mul(g, u), weights.down)
        put = lambda buf, v: lax.dynamic_update_slice(buf, v, (start, 0))
        return put(ys, y), put(gs, g), put(us, u)

    init = (
        jnp.zeros((slots, d), x.dtype),
        jnp.zeros((slots, f), x.dtype),
        jnp.zeros((slots, f), x.dtype),
    )
    return lax.fori_loop(0, plan.num_blocks, body, init)


def _turned(w: Array) -> Array:
    """Every expert's matrix transposed, all of it in one dimension.

    Of a two-dimensional transpose the compiler makes a product with another axis contracted
    again; and those are slow on XLA:CPU (twice for the second factor's last axis in bfloat16, and
    a product that contracts the first one's first axis is made in float32).
    """
    return w.swapaxes(-1, -2).reshape(-1)


def _blocks_backward(x, weights: ExpertWeights, plan: Dispatch, block, gs, us, gates, dy):
    """Gradients of x, weights and gates; dy [N, D] in fp32."""
    d, f = weights.gate.shape[1:]
    xs = x[plan.token]
    slots = xs.shape[0]
    gate_slot = gates.reshape(-1)[plan.assignment] * plan.valid
    dys = (dy[plan.token] * plan.valid[:, None]).astype(x.dtype)
    into = _turned(jnp.concatenate([weights.gate, weights.up], axis=2))  # experts of [2F, D]
    down = _turned(weights.down)  # experts of [D, F]
    put = lambda buf, v, start: lax.dynamic_update_slice(buf, v, (start,) + (0,) * (v.ndim - 1))

    def body(b, carry):
        dxs, dgates, dgus, xt, ht = carry
        e = plan.block_expert[b]
        start = b * block
        rows = lambda a, width: lax.dynamic_slice(a, (start, 0), (block, width))
        take = lambda w, n, m: lax.dynamic_slice(w, (e * n * m,), (n * m,)).reshape(n, m)
        xb, g, u, dyb = rows(xs, d), rows(gs, f), rows(us, f), rows(dys, d)
        gate = lax.dynamic_slice(gate_slot, (start,), (block,))
        h, pull = jax.vjp(silu_mul, g, u)
        dh = dyb @ take(down, d, f)
        dgate = jnp.sum((dh * h).astype(jnp.float32), axis=1)
        scale = gate[:, None].astype(x.dtype)
        dgu = jnp.concatenate(pull(dh * scale), axis=1)
        return (
            put(dxs, dgu @ take(into, 2 * f, d), start),
            put(dgates, dgate, start),
            put(dgus, dgu, start),
            put(xt, xb.T.reshape(-1), start * d),
            put(ht, (h * scale).T.reshape(-1), start * f),
        )

    init = (
        jnp.zeros((slots, d), x.dtype),
        jnp.zeros((slots,), jnp.float32),
        # Not in the place of gs and us: the loop would copy both, whole, at every trip.
        jnp.zeros((slots, 2 * f), x.dtype),
        jnp.zeros((slots * d,), x.dtype),
        jnp.zeros((slots * f,), x.dtype),
    )
    dxs, dgates, dgus, xt, ht = lax.fori_loop(0, plan.num_blocks, body, init)
    dw = _weight_gradients(weights, plan, block, xt, ht, dgus, dys)
    dx = jnp.sum(_returned(dxs, plan).astype(jnp.float32), axis=1).astype(x.dtype)
    return dx, dw, _returned(dgates, plan)


def _weight_gradients(weights: ExpertWeights, plan: Dispatch, block, xt, ht, dgus, dys):
    """Sums over each expert's blocks of x^T [dg du] and (gate h)^T dy, accumulated in fp32.

    `xt` and `ht` hold every block transposed, row by row, in one dimension (see `_turned`).
    """
    experts, d, f = weights.gate.shape

    def body(b, carry):
        e = plan.block_expert[b]
        rows = lambda a: lax.dynamic_slice(a, (b * block, 0), (block, a.shape[1]))
        turned = lambda a, n: lax.dynamic_slice(a, (b * block * n,), (block * n,)).reshape(n, block)
        dot = lambda a, c: lax.dot(a, c, preferred_element_type=jnp.float32)
        add = lambda buf, v: lax.dynamic_update_index_in_dim(
            buf, lax.dynamic_index_in_dim(buf, e, keepdims=False) + v, e, 0
        )
        into, down = carry
        return add(into, dot(turned(xt, d), rows(dgus))), add(down, dot(turned(ht, f), rows(dys)))

    zeros = jnp.zeros((experts, d, 2 * f), jnp.float32), jnp.zeros((experts, f, d), jnp.float32)
    into, down = lax.fori_loop(0, plan.num_blocks, body, zeros)
    return ExpertWeights(
        into[..., :f].astype(weights.gate.dtype),
        into[..., f:].astype(weights.up.dtype),
        down.astype(weights.down.dtype),
    )


def _returned(rows, plan: Dispatch):
    """What the slots hold, at their assignments [N, K, ...]; zeros for those of no expert."""
    here = plan.here.reshape(*plan.here.shape, *(1,) * (rows.ndim - 1))
    return jnp.where(here, rows[plan.slot], 0)


def _combine(ys, plan: Dispatch, gates):
    """fp32 sum over the K experts of a token."""
    rows = _returned(ys, plan).astype(jnp.float32)
    return jnp.einsum("nkd,nk->nd", rows, gates, precision=lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _experts_blocks(x, weights, gates, ids, block):
    plan = plan_dispatch(ids, weights.gate.shape[0], block)
    ys, _, _ = _blocks_forward(x, weights, plan, block)
    return _combine(ys, plan, gates)


def _experts_blocks_fwd(x, weights, gates, ids, block):
    plan = plan_dispatch(ids, weights.gate.shape[0], block)
    ys, gs, us = _blocks_forward(x, weights, plan, block)
    return _combine(ys, plan, gates), (x, weights, gates, plan, gs, us)


def _experts_blocks_bwd(block, residuals, dy):
    x, weights, gates, plan, gs, us = residuals
    dx, dweights, dgates = _blocks_backward(x, weights, plan, block, gs, us, gates, dy)
    dids = np.zeros(plan.slot.shape, jax.dtypes.float0)
    return dx, dweights, dgates.astype(gates.dtype), dids


_experts_blocks.defvjp(_experts_blocks_fwd, _experts_blocks_bwd)


def _experts_batched(x, weights, gates, ids, block):
    plan = plan_dispatch(ids, weights.gate.shape[0], block)
    xs = x[plan.token].reshape(-1, block, x.shape[1])
    wg, wu, wd = (w[plan.block_expert] for w in weights)
    h = silu_mul(jnp.einsum("nbd,ndf->nbf", xs, wg), jnp.einsum("nbd,ndf->nbf", xs, wu))
    ys = jnp.einsum("nbf,nfd->nbd", h, wd).reshape(-1, x.shape[1])
    return _combine(ys, plan, gates)


def _experts_dense(x, weights, gates, ids):
    onehot = ids[..., None] == jnp.arange(weights.gate.shape[0])
    mix = jnp.sum(gates[..., None] * onehot, axis=1)
    h = silu_mul(
        jnp.einsum("nd,edf->enf", x, weights.gate), jnp.einsum("nd,edf->enf", x, weights.up)
    )
    ys = jnp.einsum("enf,efd->end", h, weights.down).astype(jnp.float32)
    return jnp.einsum("end,ne->nd", ys, mix, precision=lax.Precision.HIGHEST)


def apply_experts(
    x: Float[Array, "N D"],
    weights: ExpertWeights,
    gates: Float[Array, "N K"],
    ids: Int[Array, "N K"],
    *,
    impl: str,
    block: int = 0,
    share: float = 1.0,
) -> Float[Array, "N D"]:
    """sum_k gates[n, k] * SwiGLU_{ids[n, k]}(x[n]), combined in fp32; no assignment is dropped.

    Args:
      ids: experts; E and above are none.
      impl: one of IMPLEMENTATIONS.
      block: rows a block (0: by the load).
      share: of the assignments, how many to expect here. Nothing is wrong where there are more.

    Raises ValueError for another `impl`.
    """
    if impl == "dense":
        return _experts_dense(x, weights, gates, ids)
    expected = max(1, round(ids.size * share))
    if impl == "ragged":
        return experts_ragged(x, *weights, gates, ids, expected)
    size = block or choose_block_size(expected, weights.gate.shape[0])
    if impl == "batched":
        return _experts_batched(x, weights, gates, ids, size)
    if impl == "blocks":
        return _experts_blocks(x, weights, gates, ids, size)
    raise ValueError(f"impl: {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
