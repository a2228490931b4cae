"""The policy's surrogate loss as `RLConfig` composes it, with the metrics of its parts.

Ratio (by token or sequence), surrogate (PPO's clip or CISPO's weight), dual clip and truncated
importance sampling are independent of each other and of the aggregation; what each is stands in
`rl.losses`. An option that is off adds nothing to the program, nor to its metrics.

Metrics, unreduced (value, weight): of token ratios `ratio_mean|_max|_min`, `ratio_square`
and `log_ratio_square`;
`clip_low`, `clip_high`: share of tokens beyond a bound of the ratio that is used (of `ppo`: whose
gradient the clip removed); with ratio="sequence" `sequence_ratio_mean|_max|_min` over sequences;
with `dual_clip` the share `clip_dual`; with `tis_cap` the weight's `tis_mean|_max` and the share
`tis_capped` (by sequences for tis_level="sequence").
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pr2jax.core.metrics import Metrics
from pr2jax.rl import losses
from pr2jax.rl.types import RLConfig


def policy_terms(
    logp: Float[Array, "B T"],
    old: Float[Array, "B T"],
    behavior: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    advantages: Float[Array, "B 1"],
    cfg: RLConfig,
) -> tuple[Float[Array, "B T"], Metrics]:
    """The loss of each token, to be summed by `token_weights`, and its metrics.

    With ratio="sequence" a token carries its sequence's term, so weights that are equal within a
    sequence make it GSPO's. Metrics of micro-batches merge to those of the mini-batch.

    Args:
      logp, old, behavior: log-probs now, under theta_old, and by the sampler; input alignment.
      mask: 1 where the predicted token was sampled.
    """
    log_ratios = losses.log_ratio(logp, old, mask)
    used, metrics = log_ratios, {}
    if cfg.ratio == "sequence":
        used = losses.sequence_log_ratio(log_ratios, mask)
        metrics = _spread("sequence_ratio", jnp.exp(used), jnp.any(mask > 0, -1, keepdims=True))
    bounds = (cfg.clip_low, cfg.clip_high)
    if cfg.surrogate == "cispo":
        terms, low, high = losses.weighted_logprob(used, logp, advantages, mask, *bounds)
    else:
        terms, low, high = losses.clipped_surrogate(used, advantages, *bounds)
    if cfg.dual_clip:
        terms, hit = losses.dual_clip(terms, used, advantages, cfg.dual_clip)
        metrics["clip_dual"] = _share(hit, mask)
    if cfg.tis_cap:
        weight, capped = losses.truncated_importance(
            old, behavior, mask, cfg.tis_cap, cfg.tis_level
        )
        terms = weight * terms
        metrics |= _tis_metrics(weight, capped, mask)
    return terms, metrics | _ratio_metrics(log_ratios, low, high, mask)


def kl_terms(
    logp: Float[Array, "B T"],
    old: Float[Array, "B T"],
    ref: Float[Array, "B T"],
    mask: Float[Array, "B T"],
    cfg: RLConfig,
) -> Float[Array, "B T"]:
    """The reference KL's estimate of each token, before `kl_coef`; arguments as above."""
    log_ratios = losses.log_ratio(logp, old, mask) if cfg.kl_importance else None
    return losses.reference_kl(logp, ref, mask, cfg.kl_estimator, log_ratios)


def _share(hit: Bool[Array, "B T"], mask: Float[Array, "B T"]):
    """(tokens that were hit, tokens); `hit` may be [B, 1]."""
    return jnp.sum(jnp.where(mask > 0, hit, 0.0)), jnp.sum(mask)


def _spread(name: str, values: Array, real: Bool[Array, "B T"]) -> Metrics:
    """Mean and extremes of `values` where `real`; extremes weigh 0 where there is nothing."""
    count = jnp.sum(real, dtype=jnp.float32)
    some = jnp.minimum(count, 1.0)
    return {
        f"{name}_mean": (jnp.sum(jnp.where(real, values, 0.0)), count),
        f"{name}_max": (jnp.max(jnp.where(real, values, -jnp.inf)), some),
        f"{name}_min": (jnp.min(jnp.where(real, values, jnp.inf)), some),
    }


def _tis_metrics(weight: Array, capped: Array, mask: Float[Array, "B T"]) -> Metrics:
    real = mask > 0 if weight.shape == mask.shape else jnp.any(mask > 0, -1, keepdims=True)
    found = _spread("tis", weight, real)
    found["tis_capped"] = (jnp.sum(jnp.where(real, capped, 0.0)), found["tis_mean"][1])
    return found


def _ratio_metrics(log_ratios, low, high, mask) -> Metrics:
    """Importance ratios: mean, extremes, second moment, clipped shares."""
    real, count = mask > 0, jnp.sum(mask)
    ratio = jnp.exp(log_ratios)
    total = lambda x: jnp.sum(jnp.where(real, x, 0.0))
    return _spread("ratio", ratio, real) | {
        "ratio_square": (total(ratio**2), count),
        "log_ratio_square": (total(log_ratios**2), count),
        "clip_low": (total(low), count),
        "clip_high": (total(high), count),
    }
