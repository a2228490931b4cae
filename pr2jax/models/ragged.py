"""Grouped SwiGLU by `jax.lax.ragged_dot`, in pieces of the sorted assignments: the TPU's path.

Assignments are sorted by expert, those of no expert last, and worked off in pieces of a fixed
number of rows, as many pieces as hold assignments. So neither the work nor a buffer is of the
worst case (on an expert-parallel mesh, every token of the ring choosing this device's experts),
and nothing is dropped: an overloaded device takes another piece. The backward pass is by hand: it
goes over the pieces again, keeps nothing of the forward but its inputs (so that under a
rematerialised layer the experts are computed twice and not three times), and adds weight gradients
up in fp32.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

# Rows of a piece, at least: fewer rows do not pay for another reading of the weights.
MIN_PIECE = 4096
# Pieces that the expected load is cut into. Of the last one half is idle on average.
PIECES = 4


class _Order(NamedTuple):
    """The assignments sorted by expert; those of no expert stand last."""

    assignment: Int[Array, " M"]  # padded to whole pieces
    ends: Int[Array, " E"]  # where each expert's assignments end
    sizes: Int[Array, " E"]


class _Piece(NamedTuple):
    assignment: Int[Array, " P"]
    token: Int[Array, " P"]
    valid: Float[Array, " P"]
    sizes: Int[Array, " E"]


def piece_rows(expected: int, total: int) -> int:
    """Rows a piece, for `expected` of `total` assignments: a quarter, in whole tiles of 128."""
    rows = max(MIN_PIECE, -(-expected // PIECES))
    return min(-(-rows // 128) * 128, total)


def _sort(ids, num_experts: int, rows: int) -> _Order:
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return _Order(jnp.pad(order, (0, -flat.size % rows)), jnp.cumsum(sizes), sizes)


def _pieces(order: _Order, rows: int, body, init):
    """`body(piece, carry)` over every piece that holds assignments."""
    used = -(-order.ends[-1] // rows)
    if order.assignment.size == rows:
        return lax.cond(used > 0, lambda c: body(0, c), lambda c: c, init)
    return lax.fori_loop(0, used, body, init)


def _piece(order: _Order, i, rows: int, top_k: int) -> _Piece:
    start = i * rows
    assignment = lax.dynamic_slice(order.assignment, (start,), (rows,))
    valid = start + jnp.arange(rows) < order.ends[-1]
    within = lambda a: jnp.clip(a - start, 0, rows)
    sizes = within(order.ends) - within(order.ends - order.sizes)
    return _Piece(assignment, assignment // top_k, valid.astype(jnp.float32), sizes)


def _dot(lhs, rhs, sizes, *, contract: int = 1):
    """Rows of group e times rhs[e], which is contracted along its dimension `contract`."""
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (contract,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return lax.ragged_dot_general(lhs, rhs, sizes, numbers)


def _outer(lhs, rhs, sizes):
    """lhs^T rhs over each group's rows, [E, ., .] in fp32."""
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return lax.ragged_dot_general(lhs, rhs, sizes, numbers, preferred_element_type=jnp.float32)


def silu_mul(gate, up):
    """What a SwiGLU expert makes of its two products."""
    return jax.nn.silu(gate) * up


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _experts(x, w_gate, w_up, w_down, gates, ids, rows):
    order = _sort(ids, w_gate.shape[0], rows)
    flat_gates = gates.reshape(-1)

    def body(i, y):
        piece = _piece(order, i, rows, ids.shape[1])
        xs = x[piece.token]
        h = silu_mul(_dot(xs, w_gate, piece.sizes), _dot(xs, w_up, piece.sizes))
        out = _dot(h, w_down, piece.sizes).astype(jnp.float32)
        # Rows past the last group hold anything.
        out = jnp.where(piece.valid[:, None] > 0, out, 0.0)
        return y.at[piece.token].add(out * flat_gates[piece.assignment][:, None])

    return _pieces(order, rows, body, jnp.zeros(x.shape, jnp.float32))


def _experts_fwd(x, w_gate, w_up, w_down, gates, ids, rows):
    y = _experts(x, w_gate, w_up, w_down, gates, ids, rows)
    return y, (x, w_gate, w_up, w_down, gates, ids)


def _experts_bwd(rows, residuals, dy):
    x, w_gate, w_up, w_down, gates, ids = residuals
    order = _sort(ids, w_gate.shape[0], rows)
    flat_gates = gates.reshape(-1)

    def body(i, carry):
        dx, dw_gate, dw_up, dw_down, dgates = carry
        piece = _piece(order, i, rows, ids.shape[1])
        xs, sizes = x[piece.token], piece.sizes
        clean = lambda a: jnp.where(piece.valid[:, None] > 0, a, 0)
        g, u = clean(_dot(xs, w_gate, sizes)), clean(_dot(xs, w_up, sizes))
        h, pull = jax.vjp(silu_mul, g, u)
        gate = (flat_gates[piece.assignment] * piece.valid)[:, None]
        dys = clean(dy[piece.token]).astype(x.dtype)
        dh = clean(_dot(dys, w_down, sizes, contract=2))
        dgate = jnp.sum((dh * h).astype(jnp.float32), axis=1)
        scale = gate.astype(x.dtype)
        dg, du = pull(dh * scale)
        dxs = _dot(dg, w_gate, sizes, contract=2) + _dot(du, w_up, sizes, contract=2)
        return (
            dx.at[piece.token].add(clean(dxs).astype(jnp.float32)),
            dw_gate + _outer(xs, dg, sizes),
            dw_up + _outer(xs, du, sizes),
            dw_down + _outer(h * scale, dys, sizes),
            dgates.at[piece.assignment].add(dgate),
        )

    zeros = lambda a: jnp.zeros(a.shape, jnp.float32)
    init = tuple(map(zeros, (x, w_gate, w_up, w_down, flat_gates)))
    dx, dw_gate, dw_up, dw_down, dgates = _pieces(order, rows, body, init)
    dw = (
        d.astype(w.dtype)
        for d, w in zip((dw_gate, dw_up, dw_down), (w_gate, w_up, w_down), strict=True)
    )
    dids = np.zeros(ids.shape, jax.dtypes.float0)
    return dx.astype(x.dtype), *dw, dgates.reshape(gates.shape).astype(gates.dtype), dids


_experts.defvjp(_experts_fwd, _experts_bwd)


def experts_ragged(
    x: Float[Array, "N D"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    gates: Float[Array, "N K"],
    ids: Int[Array, "N K"],
    expected: int,
    rows: int = 0,
) -> Float[Array, "N D"]:
    """sum_k gates[n, k] * SwiGLU_{ids[n, k]}(x[n]) in fp32; ids of E and above add nothing.

    `expected`: assignments to size the pieces for; `rows`: of a piece (0: `piece_rows`).
    """
    return _experts(x, w_gate, w_up, w_down, gates, ids, rows or piece_rows(expected, ids.size))
