"""What replay did, as pure functions to metrics: unreduced pairs (sum, weight).

A name that ends in `_max` holds (extreme, 1); `core.metrics.merge` joins parts of a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pr2jax.core.metrics import Metrics
from pr2jax.models.router import agreement as overlap
from pr2jax.models.transformer import RouterOutput


def _mean(values: Array, mask: Array) -> tuple[Array, Array]:
    """(sum, count) of the finite values inside the mask (a margin can be infinite: no rival)."""
    counted = (jnp.broadcast_to(mask, values.shape) > 0) & jnp.isfinite(values)
    return jnp.sum(jnp.where(counted, values, 0.0)), jnp.sum(counted, dtype=jnp.float32)


def _per_layer(name: str, values: Float[Array, "L B S"], mask: Array) -> Metrics:
    """Overall mean, and one of each layer under `name/layer_i`."""
    out = {name: _mean(values, mask)}
    for layer in range(values.shape[0]):
        out[f"{name}/layer_{layer}"] = _mean(values[layer], mask)
    return out


def replay_diagnostics(router: RouterOutput, token_mask: Bool[Array, "B T"], top_k: int) -> Metrics:
    """How far the logged routes are from what the live, un-shifted router chooses.

    `zero_deviation`: share of tokens whose logged set equals the live top-k in *all* MoE layers,
    and by layer in that one. `agreement`: |logged & live| / k, overall and by layer. `margin`:
    p_(k) - p_(k+1) of the live selection scores, overall and by layer. All in the same forward,
    which uses the logged experts where they are replayed.
    """
    same = router.agreement == top_k
    whole = jnp.all(same, axis=0).astype(jnp.float32)
    share = router.agreement.astype(jnp.float32) / top_k
    return (
        _per_layer("zero_deviation", same.astype(jnp.float32), token_mask)
        | {"zero_deviation": _mean(whole, token_mask)}
        | _per_layer("agreement", share, token_mask)
        | _per_layer("margin", router.margin, token_mask)
    )


def flip_diagnostics(
    logits_old: Float[Array, "L B C E"],
    logits_now: Float[Array, "L B C E"],
    mask: Bool[Array, "B C"],
    select: Callable[[Float[Array, "L B C E"]], Int[Array, "L B C K"]],
    agreement: Int[Array, "L B C"] | None = None,
) -> Metrics:
    """The un-shifted old route against the live one, at the tokens whose features were kept.

    `flips`: share of (token, layer) whose un-shifted sets differ, overall and by layer.
    `old_route_zero_deviation`: share of tokens without a flip in any layer. With `agreement`
    (of the *used* route, from the same forward): `paired_zero_deviation`, the used route's on the
    same tokens; it minus the old route's is what the shift won.

    Args:
      select: the router's own selection rule.
    """
    old, now = select(logits_old), select(logits_now)
    top_k = now.shape[-1]
    flipped = overlap(old, now) < top_k
    out = _per_layer("flips", flipped.astype(jnp.float32), mask)
    kept = ~jnp.any(flipped, axis=0)
    out["old_route_zero_deviation"] = _mean(kept.astype(jnp.float32), mask)
    if agreement is not None:
        same = jnp.all(agreement == top_k, axis=0).astype(jnp.float32)
        out["paired_zero_deviation"] = _mean(same, mask)
    return out


def shift_ratio(
    inputs: Float[Array, "L B C D"],
    shift: Float[Array, "L D E"],
    logits: Float[Array, "L B C E"],
    mask: Bool[Array, "B C"],
) -> Metrics:
    """|h S| / |p|, Euclidean norms over experts: how hard the shift pushes, by layer.

    `inputs` and `logits` are those that the shift met, of the old policy.
    """
    push = jnp.einsum("lbcd,lde->lbce", inputs.astype(jnp.float32), shift)
    size = jnp.linalg.norm(logits, axis=-1)
    ratio = jnp.linalg.norm(push, axis=-1) / jnp.maximum(size, 1e-30)
    return _per_layer("shift_ratio", ratio, mask)


def mismatch(
    logp_a: Float[Array, "B T"], logp_b: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> Metrics:
    """Two policies' log-probs of tokens sampled from a.

    `abs`: mean |delta|; `abs_max`: largest |delta|; `k1`: mean log(a / b) and `k3`: mean
    (r - 1 - log r), r = b / a, estimators of KL(a || b) (Schulman 2020).
    """
    delta = jnp.where(mask > 0, logp_b - logp_a, 0.0)
    return {
        "abs": _mean(jnp.abs(delta), mask),
        "abs_max": (jnp.max(jnp.abs(delta)), jnp.float32(1.0)),
        "k1": _mean(-delta, mask),
        "k3": _mean(jnp.expm1(delta) - delta, mask),
    }
