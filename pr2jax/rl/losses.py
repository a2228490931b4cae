"""Per-token terms of the policy loss and the weights that aggregate them.

Small pieces that compose: a log-ratio by token or by sequence, a surrogate of it (`clipped` or
`weighted_logprob`), bounds and corrections on that, and weights that sum tokens to a loss;
`rl.objective` puts them together as `RLConfig` says.

Everything is [B, T] in *input* alignment (entry t is about the prediction of token t + 1), or
[B, 1] where it is a sequence's. Places outside the mask may hold anything: they are replaced
before they enter an exponential.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Aggregation = Literal["token_mean", "sequence_mean", "fixed"]
KLEstimator = Literal["k1", "k2", "k3"]
Level = Literal["token", "sequence"]


def token_weights(
    mask: Float[Array, "*N B T"], aggregation: Aggregation, max_tokens: int | None = None
) -> Float[Array, "*N B T"]:
    """Weights w such that sum(w * term) is the mini-batch's loss.

    `token_mean`: over all its tokens (DAPO, arXiv 2503.14476). `sequence_mean`: over the tokens
    of a sequence, then over sequences (GRPO, arXiv 2402.03300). `fixed`: every token weighs
    1 / (sequences * max_tokens), whatever its sequence's length (Dr. GRPO, arXiv 2503.20783).
    Only `fixed` reads `max_tokens`. Sequences without tokens do not count. The first two sum to
    1, or to 0 where there are no tokens at all. The weights are of the whole mini-batch, so its
    micro-batches, summed, have exactly its gradient.

    Raises ValueError for an unknown aggregation.
    """
    mask = mask.astype(jnp.float32)
    if aggregation == "token_mean":
        return mask / jnp.maximum(jnp.sum(mask), 1.0)
    if aggregation not in ("sequence_mean", "fixed"):
        raise ValueError(f"aggregation {aggregation!r} is not token_mean, sequence_mean or fixed")
    count = jnp.sum(mask, axis=-1, keepdims=True)
    sequences = jnp.maximum(jnp.sum(count > 0), 1)
    if aggregation == "fixed":
        return mask / max_tokens / sequences
    return mask / jnp.maximum(count, 1.0) / sequences


def log_ratio(
    logp_new: Float[Array, "B T"], logp_old: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """log(pi_new / pi_old) of each sampled token, 0 outside the mask."""
    return jnp.where(mask > 0, logp_new - logp_old, 0.0)


def sequence_log_ratio(
    log_ratios: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, "B 1"]:
    """The mean of a sequence's log-ratios (GSPO, arXiv 2507.18071, Eq. 7); 0 without tokens.

    Its gradient runs through all tokens of the sequence (Eq. 10). The paper's GSPO-token
    (Eq. 13-14) only differs where a sequence's tokens have several advantages.
    """
    count = jnp.sum(mask, axis=-1, keepdims=True)
    return jnp.sum(log_ratios, axis=-1, keepdims=True) / jnp.maximum(count, 1.0)


def clipped_surrogate(
    log_ratios: Float[Array, "B T"] | Float[Array, "B 1"],
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


def dual_clip(
    loss: Float[Array, "B T"],
    log_ratios: Float[Array, "B T"],
    advantages: Float[Array, "B 1"],
    bound: float,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Bounds a clipped loss where A < 0 by -bound A, bound > 1 (arXiv 1912.09729, Eq. 5).

    There PPO's minimum is r A, which has no bound as r grows. Returns the loss, and where the
    bound was active (the gradient there is zero).
    """
    hit = (advantages < 0) & (jnp.exp(log_ratios) > bound)
    return jnp.where(hit, -bound * advantages, loss), hit


def weighted_logprob(
    log_ratios: Float[Array, "B T"] | Float[Array, "B 1"],
    logp: Float[Array, "B T"],
    advantages: Float[Array, "B 1"],
    mask: Float[Array, "B T"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Bool[Array, "B T"]]:
    """CISPO: the clipped ratio is a constant weight of the log-prob (arXiv 2506.13585, Eq. 4-5).

    No token loses its gradient. clip_low = 1 leaves the ratio without a lower bound, as the
    paper does.

    Returns:
      -stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A log pi, and where the ratio lay below
      and above the bounds, whatever the advantage's sign.
    """
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratios))
    weight = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -weight * advantages * jnp.where(mask > 0, logp, 0.0)
    shape = loss.shape
    low, high = ratio < 1.0 - clip_low, ratio > 1.0 + clip_high
    return loss, jnp.broadcast_to(low, shape), jnp.broadcast_to(high, shape)


def truncated_importance(
    logp_old: Float[Array, "B T"],
    logp_behavior: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    cap: float,
    level: Level = "token",
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """min(pi_old / pi_behavior, cap): corrects for a sampler that is not the learner.

    Truncated importance sampling: IMPALA's rho (arXiv 1802.01561, Sec. 4.1) with the learner's
    old policy over its sampler's. `level` "sequence" takes the product of a sequence's ratios,
    [B, 1]. Where nothing was sampled the weight is 1.

    Returns:
      The weights, and where the cap was active.
    """
    logs = log_ratio(logp_old, logp_behavior, mask)
    if level == "sequence":
        logs = jnp.sum(logs, axis=-1, keepdims=True)
    ratio = jax.lax.stop_gradient(jnp.exp(logs))
    return jnp.minimum(ratio, cap), ratio > cap


def reference_kl(
    logp_new: Float[Array, "B T"],
    logp_ref: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    estimator: KLEstimator = "k3",
    log_ratios: Float[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """One-sample estimates of KL(new || ref), by d = log new - log ref; 0 outside the mask.

    Source: http://joschu.net/blog/kl-approx. As values on tokens of the new policy:

    * k1: d. Unbiased; may be negative; high variance.
    * k2: d^2 / 2. Biased, of low variance.
    * k3: exp(-d) - 1 + d. Unbiased and never negative (GRPO, arXiv 2402.03300, Eq. 4).

    As a term of a loss it is their gradient that acts, and there the order differs:

    * k1's, grad log new, has expectation zero: it holds nothing back and only adds noise.
    * k2's, d grad log new, is an unbiased gradient of KL(new || ref).
    * k3's, (1 - ref / new) grad log new, is in expectation the gradient of KL(ref || new).

    With `log_ratios`, log(new / old), estimates are weighted by that ratio and its gradient
    (DeepSeek-V3.2, arXiv 2512.02556): on tokens of the old policy k1 and k3 are then unbiased in
    value and in gradient, and stay so over mini-steps.
    """
    delta = jnp.where(mask > 0, logp_ref - logp_new, 0.0)
    if estimator == "k1":
        kl = -delta
    elif estimator == "k2":
        kl = 0.5 * jnp.square(delta)
    elif estimator == "k3":
        kl = jnp.expm1(delta) - delta
    else:
        raise ValueError(f"estimator {estimator!r} is not k1, k2 or k3")
    return kl if log_ratios is None else jnp.exp(log_ratios) * kl


def effective_sample_size(
    ratio_sum: Float[Array, ""], ratio_square_sum: Float[Array, ""], count: Float[Array, ""]
) -> Float[Array, ""]:
    """(sum r)^2 / (n sum r^2) in (0, 1]: 1 when every importance ratio is the same."""
    return ratio_sum**2 / jnp.maximum(count * ratio_square_sum, 1e-30)
