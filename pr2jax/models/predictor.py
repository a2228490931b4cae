"""The route predictor of PR2 (arXiv 2606.00395): its features, its loss, and which tokens it sees.

Per MoE layer a zero-initialised W_p [D, E] without bias predicts how the router's logits will have
moved by the time they are trained on: rho_hat = softmax(p_old + h_old W_p) (Eq. 4-6). Its loss
(Eq. 7-8) is, summed over layers and averaged over tokens,

    KL( stop_gradient(softmax(p_now)) || softmax(p_old + stop_gradient(h_old) W_p) )

with p_now the live router's logits at the same token of the current mini-step. Where something
else shifts the selection too (lookahead), its part stands beside p_old, and W_p learns the rest.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from pr2jax.core.hosts import Global

DepthGate = Literal["none", "linear", "sqrt", "cosine"]


@struct.dataclass
class RouterFeatures:
    """Router logits and inputs kept when a route was logged, at up to C tokens a row.

    Attributes:
      positions: input positions of the kept tokens; any value where `mask` is False.
      mask: which of the C places hold a token.
      logits: un-shifted router logits p_old, float32.
      inputs: router inputs h_old, bfloat16.
    """

    positions: Global[Int[Array, "B C"]]
    mask: Global[Bool[Array, "B C"]]
    logits: Global[Float[Array, "L B C E"]]
    inputs: Global[Float[Array, "L B C D"]]


def depth_gates(kind: DepthGate, num_layers: int, floor: float = 0.0) -> Float[Array, " L"]:
    """Gates gamma_l in [floor, 1] on h W_p, from 1 at the first MoE layer to `floor` at the last.

    With x = l / (L - 1): `linear` 1 - (1 - floor) x; `sqrt` 1 - (1 - floor) sqrt(x); `cosine`
    floor + (1 - floor) (1 + cos(pi x)) / 2; `none` 1. An option of a later open reproduction of
    PR2, not of the paper.
    """
    x = jnp.arange(num_layers, dtype=jnp.float32) / max(num_layers - 1, 1)
    decay = {
        "none": jnp.zeros_like(x),
        "linear": x,
        "sqrt": jnp.sqrt(x),
        "cosine": (1.0 - jnp.cos(jnp.pi * x)) / 2.0,
    }
    if kind not in decay:
        raise ValueError(f"depth gate {kind!r} is none of {sorted(decay)}")
    return 1.0 - (1.0 - floor) * decay[kind]


def margin_weights(
    logits: Float[Array, "*S E"], top_k: int, *, max_weight: float, min_margin: float
) -> Float[Array, "*S"]:
    """min(max_weight, 1 / max(margin, min_margin)), margin = p_(k) - p_(k+1) of the logits.

    Tokens near the top-k boundary weigh more. Not normalised: `predictor_loss` divides by the
    sum of the weights, which is the same as weights divided by their mean. All equal when k = E,
    where there is no boundary.
    """
    if top_k >= logits.shape[-1]:
        return jnp.ones(logits.shape[:-1], jnp.float32)
    top = jax.lax.top_k(logits, top_k + 1)[0]
    margin = top[..., -2] - top[..., -1]
    return jnp.minimum(max_weight, 1.0 / jnp.maximum(margin, min_margin))


def predictor_loss(
    w_p: Float[Array, "L D E"],
    features: RouterFeatures,
    logits_now: Float[Array, "L B C E"],
    token_weights: Float[Array, "L B C"] | None = None,
    gates: Float[Array, " L"] | None = None,
    beside: Float[Array, "L D E"] | None = None,
) -> tuple[Float[Array, " L"], Float[Array, " L"]]:
    """The predictor's loss (PR2, Eq. 7-8) as per-layer sums and weights over the kept tokens.

    The loss is sum over layers of sums / weights; sums and weights add over micro-batches, so
    micro-batching is exact. Only `w_p` receives a gradient.

    Args:
      w_p: the predictor.
      features: p_old and h_old at the kept tokens.
      logits_now: p_now, the live router's logits at the same tokens.
      token_weights: relative weights of the tokens; equal when None.
      gates: gamma_l on h W_p; 1 when None.
      beside: the part S of the selection shift that is not W_p's: h S is added to p_old.
    """
    # Whatever lies at unused places must not reach a sum or a gradient, NaN included.
    clean = lambda x: jnp.where(features.mask[None, ..., None], jax.lax.stop_gradient(x), 0.0)
    h = clean(features.inputs).astype(jnp.float32)
    shift = jnp.einsum("lbcd,lde->lbce", h, w_p, precision=jax.lax.Precision.HIGHEST)
    if gates is not None:
        shift = shift * gates[:, None, None, None]
    if beside is not None:
        known = jax.lax.stop_gradient(beside)
        shift = shift + jnp.einsum("lbcd,lde->lbce", h, known, precision=jax.lax.Precision.HIGHEST)
    student = jax.nn.log_softmax(clean(features.logits) + shift, axis=-1)
    teacher = jax.nn.log_softmax(clean(logits_now), axis=-1)
    kl = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    weights = jnp.ones_like(kl) if token_weights is None else jax.lax.stop_gradient(token_weights)
    weights = jnp.where(features.mask, weights, 0.0)
    return jnp.sum(weights * kl, axis=(1, 2)), jnp.sum(weights, axis=(1, 2))


def _hash(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The 32-bit finalizer of MurmurHash3: every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def reservoir_slot(
    index: Int[Array, "..."], capacity: int, seed: Int[Array, "..."] | int
) -> Int[Array, "..."]:
    """The place of item `index` in a deterministic reservoir, or `capacity` to drop it.

    Algorithm R (Vitter 1985): items 0..C-1 fill the reservoir; item i >= C replaces a uniformly
    drawn place with probability C / (i + 1). After any number of items the reservoir is a uniform
    sample of them, so a response can be sub-sampled before its length is known. The draw is a
    hash of (seed, index): the same whoever asks, in whatever batch. (Its modulo bias is
    (i + 1) / 2^32.)
    """
    index = jnp.asarray(index, jnp.uint32)
    seed = jnp.asarray(seed).astype(jnp.uint32)
    draw = _hash(_hash(seed + jnp.uint32(0x9E3779B9)) ^ (index * jnp.uint32(0x9E3779B1)))
    place = jnp.where(index < capacity, index, draw % (index + 1))
    return jnp.minimum(place, jnp.uint32(capacity)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("capacity", "max_length"))
def reservoir_positions(
    length: Int[Array, " B"], capacity: int, seed: Int[Array, " B"], *, max_length: int
) -> tuple[Int[Array, "B C"], Bool[Array, "B C"]]:
    """What the reservoir of `reservoir_slot` holds after `length` items, at once.

    Args:
      length: items seen, a row each; at most `max_length`.
      capacity: C.
      seed: seed of each row's reservoir.
      max_length: static bound on the lengths.

    Returns:
      item indices and whether the place is filled.
    """
    items = jnp.arange(max_length, dtype=jnp.int32)

    def one(n, s):
        slots = jnp.where(items < n, reservoir_slot(items, capacity, s), capacity)
        # Within one place the latest item stands; -1 is a place never filled.
        held = jnp.full((capacity + 1,), -1, jnp.int32).at[slots].max(items)[:capacity]
        return jnp.maximum(held, 0), held >= 0

    return jax.vmap(one)(length, jnp.broadcast_to(jnp.asarray(seed), length.shape))
