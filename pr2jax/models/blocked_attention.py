"""Flash attention (Dao et al., arXiv 2205.14135) out of plain products, for CPUs.

The softmax of a whole row, [heads, T, T], never stands in memory: rows are taken one after the
other, queries in chunks that see only the keys before their end, so that what a chunk computes
stays in the cache and half of the products are not made. The backward pass is written by hand. It
computes the weights again, transposed (keys first): XLA:CPU multiplies a matrix whose *first* axis
is contracted about five times slower, and so three of the four gradients' products have none.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30
_CHUNK, _MAX_CHUNKS = 128, 8


def _chunks(length: int) -> list[tuple[int, int]]:
    """Query chunks (start, stop): of 128, or more where that would be many (compile time)."""
    size = max(_CHUNK, -(-length // (_MAX_CHUNKS * _CHUNK)) * _CHUNK)
    return [(i, min(i + size, length)) for i in range(0, length, size)]


def _allowed(segments: Int[Array, " T"], start: int, stop: int, window: int) -> Bool[Array, "q s"]:
    """Which of the keys [0, stop) the queries [start, stop) see."""
    query, key = jnp.arange(start, stop)[:, None], jnp.arange(stop)[None, :]
    allowed = (key <= query) & (segments[start:stop, None] == segments[None, :stop])
    return allowed & (key > query - window) if window else allowed


def _row_forward(q, k, v, segments, window: int):
    """One row: q [G, R, T, d] already scaled, k [G, T, d], v [G, T, e] -> out [G, R, T, e], lse."""
    groups, repeat, length, dim = q.shape
    outs, lses = [], []
    for start, stop in _chunks(length):
        n = stop - start
        part = q[:, :, start:stop].reshape(groups, repeat * n, dim)
        keys, values = k[:, :stop], v[:, :stop]
        logits = jnp.einsum("gqd,gsd->gqs", part, keys, preferred_element_type=jnp.float32)
        seen = _allowed(segments, start, stop, window)
        logits = jnp.where(seen, logits.reshape(groups, repeat, n, stop), _MASKED)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1)
        flat = weights.reshape(groups, repeat * n, stop).astype(v.dtype)
        out = jnp.einsum("gqs,gsd->gqd", flat, values, preferred_element_type=jnp.float32)
        outs.append(out.reshape(groups, repeat, n, -1) / total[..., None])
        lses.append(top[..., 0] + jnp.log(total))
    return jnp.concatenate(outs, axis=2).astype(v.dtype), jnp.concatenate(lses, axis=2)


def _row_backward(q, k, v, segments, out, lse, dout, window: int):
    """Gradients of one row, by the scaled q, k and v."""
    groups, repeat, length, dim = q.shape
    fp32 = partial(jnp.einsum, preferred_element_type=jnp.float32)
    dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    # sum_s of weights x their gradients, without either (section 3.1 there).
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1)
    dqs = []
    for start, stop in _chunks(length):
        n = stop - start
        cut = lambda x: x[:, :, start:stop].reshape(groups, repeat * n, *x.shape[3:])  # noqa: B023
        part, dpart = cut(q), cut(dout)
        keys, values = k[:, :stop], v[:, :stop]
        seen = jnp.tile(_allowed(segments, start, stop, window).T, (1, repeat))
        logits = fp32("gsd,gqd->gsq", keys, part)
        weights = jnp.where(seen, jnp.exp(logits - cut(lse)[:, None]), 0.0)
        dweights = fp32("gsd,gqd->gsq", values, dpart)
        dlogits = (weights * (dweights - cut(delta)[:, None])).astype(q.dtype)
        dv = dv.at[:, :stop].add(fp32("gsq,gqd->gsd", weights.astype(q.dtype), dpart))
        dk = dk.at[:, :stop].add(fp32("gsq,gqd->gsd", dlogits, part))
        dq = jnp.einsum("gsd,gsq->gdq", keys, dlogits).swapaxes(1, 2)
        dqs.append(dq.reshape(groups, repeat, n, dim))
    return jnp.concatenate(dqs, axis=2), dk.astype(k.dtype), dv.astype(v.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _rows(q, k, v, segments, window):
    return _rows_forward(q, k, v, segments, window)[0]


def _rows_forward(q, k, v, segments, window):
    out, lse = lax.map(lambda row: _row_forward(*row, window), (q, k, v, segments))
    return out, (q, k, v, segments, out, lse)


def _rows_backward(window, residuals, dout):
    grads = lax.map(lambda row: _row_backward(*row, window), (*residuals, dout))
    return *grads, np.zeros(residuals[3].shape, jax.dtypes.float0)


_rows.defvjp(_rows_forward, _rows_backward)


def blocked_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T G d"],
    v: Float[Array, "B T G e"],
    segment_ids: Int[Array, "B T"],
    window: int,
) -> Float[Array, "B T H e"]:
    """softmax(q k / sqrt(d)) v on packed rows, causal within a segment (and `window`; 0: none).

    Accumulates in fp32. Memory a row is O(T x chunk), its backward's too.
    """
    batch, length, heads, dim = q.shape
    groups = k.shape[2]
    q = (q.astype(jnp.float32) * dim**-0.5).astype(q.dtype)
    q = q.reshape(batch, length, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)
    out = _rows(q, k.swapaxes(1, 2), v.swapaxes(1, 2), segment_ids, window)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, v.shape[-1])
