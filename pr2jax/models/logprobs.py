"""Log-probabilities of tokens out of hidden states, chunk by chunk: [B, T, V] never exists."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pr2jax.core.sharding import RULES, mesh_axes, row_axes
from pr2jax.models.config import ModelConfig


def head_kernel(params: dict, cfg: ModelConfig) -> Float[Array, "D V"]:
    """The LM head, or the transposed embedding where they are tied."""
    return params["embed"]["table"].T if cfg.tie_embeddings else params["lm_head"]["kernel"]


def logits(params: dict, hidden: Float[Array, "... D"], cfg: ModelConfig):
    """hidden @ head in true fp32, [..., V]. For sampling and tests; training uses chunks."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    out = _product(flat, head_kernel(params, cfg))
    return out.reshape(*hidden.shape[:-1], out.shape[-1])


def _product(hidden: Float[Array, "N D"], kernel: Float[Array, "D V"]) -> Float[Array, "N V"]:
    wide = lambda a: a.astype(jnp.float32)
    with jax.named_scope("lm_head"):
        return jnp.dot(wide(hidden), wide(kernel), precision=lax.Precision.HIGHEST)


def _total(x: Float[Array, "N V"], axes: tuple[str, ...]) -> Float[Array, " N"]:
    """The sum over a vocabulary that is split over mesh axes."""
    part = jnp.sum(x, axis=-1)
    return lax.psum(part, axes) if axes else part


def _logsumexp(x: Float[Array, "N V"], axes: tuple[str, ...]) -> Float[Array, " N"]:
    if not axes:
        return jax.nn.logsumexp(x, axis=-1)
    largest = lax.pmax(lax.stop_gradient(jnp.max(x, axis=-1)), axes)
    return largest + jnp.log(_total(jnp.exp(x - largest[:, None]), axes))


def _chunked(one, hidden, targets, size: int):
    """`one(hidden [size, D], targets [size])` over all tokens, a chunk of them at a time."""
    flat_h, flat_t = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if size >= targets.size:
        return one((flat_h, flat_t))
    pad = -targets.size % size
    flat_h = jnp.pad(flat_h, ((0, pad), (0, 0))).reshape(-1, size, hidden.shape[-1])
    flat_t = jnp.pad(flat_t, (0, pad)).reshape(-1, size)
    out = lax.map(jax.checkpoint(one), (flat_h, flat_t))
    return jax.tree.map(lambda a: a.reshape(-1)[: targets.size], out)


def token_logprobs(
    params: dict,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    cfg: ModelConfig,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"] | None]:
    """log p(targets[b, t] | hidden[b, t]) at a temperature, in fp32, and the entropy on request.

    Logits live for `chunk` tokens at a time (default cfg.logprob_chunk), in the forward and, by
    rematerialisation, in the backward pass. On a mesh each device goes through its own rows, the
    head gathered once before the chunks and its gradient scattered once after them.
    """

    embed, vocab = (
        () if mesh is None else mesh_axes(mesh, RULES, axis) for axis in ("embed", "vocab")
    )

    def one(kernel, args):
        h, t = args
        scaled = _product(h, kernel) / temperature
        norm = _logsumexp(scaled, vocab)
        # A masked sum instead of a gather: its gradient is not a scatter.
        first = lax.axis_index(vocab) * kernel.shape[1] if vocab else 0
        hit = t[:, None] - first == jnp.arange(kernel.shape[1])
        logp = _total(jnp.where(hit, scaled, 0.0), vocab) - norm
        if not entropy:
            return logp, None
        return logp, norm - _total(jnp.exp(scaled - norm[:, None]) * scaled, vocab)

    def rows(hidden, targets, kernel):
        if embed:
            kernel = lax.all_gather(kernel, embed, axis=0, tiled=True)
        out = _chunked(partial(one, kernel), hidden, targets, chunk or cfg.logprob_chunk)
        return jax.tree.map(lambda a: a.reshape(targets.shape), out)

    kernel = head_kernel(params, cfg)
    if mesh is None:
        return rows(hidden, targets, kernel)
    act = PartitionSpec(row_axes(mesh, targets.shape[0]) or None)
    return jax.shard_map(
        rows,
        mesh=mesh,
        in_specs=(act, act, PartitionSpec(embed or None, vocab or None)),
        out_specs=act,
        check_vma=False,
    )(hidden, targets, kernel)
