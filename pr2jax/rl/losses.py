"""Per-token terms of the policy loss and the weights that aggregate them.

Everything is [B, T] in *input* alignment (entry t is about the prediction of token t + 1), and
places outside the mask may hold anything: they are replaced before they enter an exponential.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Aggregation = Literal["token_mean", "sequence_mean"]


def token_weights(mask: Float[Array, "*N B T"], aggregation: Aggregation) -> Float[Array, "*N B T"]:
    """Weights w such that sum(w * term) is the mini-batch's mean. They sum to 1, or to 0.

    `token_mean`: over all its tokens (DAPO). `sequence_mean`: over the tokens of a sequence, then
    over sequences that have any (GRPO). The weights are of the whole mini-batch, so its
    micro-batches, summed, have exactly its gradient.
    """
    mask = mask.astype(jnp.float32)
    if aggregation == "token_mean":
        return mask / jnp.maximum(jnp.sum(mask), 1.0)
    if aggregation != "sequence_mean":
        raise ValueError(f"aggregation {aggregation!r} is not token_mean or sequence_mean")
    count = jnp.sum(mask, axis=-1, keepdims=True)
    sequences = jnp.maximum(jnp.sum(count > 0), 1)
    return mask / jnp.maximum(count, 1.0) / sequences


def log_ratio(
    logp_new: Float[Array, "B T"], logp_old: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """log(pi_new / pi_old) of each sampled token, 0 outside the mask."""
    return jnp.where(mask > 0, logp_new - logp_old, 0.0)


def clipped_surrogate(
    log_ratios: Float[Array, "B T"],
    advantages: Float[Array, "B 1"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Bool[Array, "B T"]]:
    """PPO's pessimistic loss with separate bounds (DAPO's clip-higher, arXiv 2503.14476, Eq. 10).

    Returns:
      -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and where the lower and the upper bound
      were active (the gradient there is zero).
    """
    ratio = jnp.exp(log_ratios)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    low = (ratio < 1.0 - clip_low) & (advantages < 0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0)
    return loss, low, high


def reference_kl(
    logp_new: Float[Array, "B T"], logp_ref: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """k3 estimate of KL(new || ref): r - 1 - log r, r = ref / new (GRPO, arXiv 2402.03300, Eq. 4).

    Never negative; 0 outside the mask.
    """
    delta = jnp.where(mask > 0, logp_ref - logp_new, 0.0)
    return jnp.expm1(delta) - delta


def effective_sample_size(
    ratio_sum: Float[Array, ""], ratio_square_sum: Float[Array, ""], count: Float[Array, ""]
) -> Float[Array, ""]:
    """(sum r)^2 / (n sum r^2) in (0, 1]: 1 when every importance ratio is the same."""
    return ratio_sum**2 / jnp.maximum(count * ratio_square_sum, 1e-30)
