"""Log-probabilities of tokens out of hidden states, chunk by chunk: [B, T, V] never exists."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pr2jax.models.config import ModelConfig


def head_kernel(params: dict, cfg: ModelConfig) -> Float[Array, "D V"]:
    """The LM head, or the transposed embedding where they are tied."""
    return params["embed"]["table"].T if cfg.tie_embeddings else params["lm_head"]["kernel"]


def logits(params: dict, hidden: Float[Array, "... D"], cfg: ModelConfig):
    """hidden @ head in true fp32, [..., V]. For sampling and tests; training uses chunks."""
    flat = hidden.reshape(-1, hidden.shape[-1]).astype(jnp.float32)
    kernel = head_kernel(params, cfg).astype(jnp.float32)
    out = jnp.dot(flat, kernel, precision=lax.Precision.HIGHEST)
    return out.reshape(*hidden.shape[:-1], kernel.shape[1])


def token_logprobs(
    params: dict,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    cfg: ModelConfig,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"] | None]:
    """log p(targets[b, t] | hidden[b, t]) at a temperature, in fp32, and the entropy on request.

    Logits live for `chunk` tokens at a time (default cfg.logprob_chunk), in the forward and, by
    rematerialisation, in the backward pass.
    """
    size = min(chunk or cfg.logprob_chunk, targets.size)

    def one(args):
        h, t = args
        scaled = logits(params, h, cfg) / temperature
        norm = jax.nn.logsumexp(scaled, axis=-1)
        # A masked sum instead of a gather: its gradient is not a scatter.
        hit = t[:, None] == jnp.arange(scaled.shape[-1])
        logp = jnp.sum(jnp.where(hit, scaled, 0.0), axis=-1) - norm
        if not entropy:
            return logp, None
        return logp, norm - jnp.sum(jax.nn.softmax(scaled, axis=-1) * scaled, axis=-1)

    flat_h, flat_t = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if size == targets.size:
        logp, ent = one((flat_h, flat_t))
    else:
        pad = -targets.size % size
        flat_h = jnp.pad(flat_h, ((0, pad), (0, 0))).reshape(-1, size, hidden.shape[-1])
        flat_t = jnp.pad(flat_t, (0, pad)).reshape(-1, size)
        logp, ent = lax.map(jax.checkpoint(one), (flat_h, flat_t))
    shape = lambda a: None if a is None else a.reshape(-1)[: targets.size].reshape(targets.shape)
    return shape(logp), shape(ent)
