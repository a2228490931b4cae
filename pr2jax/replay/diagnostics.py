"""What replay did, as pure functions to metrics: unreduced pairs (sum, weight).

A name that ends in `_max` holds (extreme, 1); `core.metrics.merge` joins parts of a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pr2jax.core.metrics import Metrics
from pr2jax.core.params import Tree
from pr2jax.models.config import ModelConfig
from pr2jax.models.router import agreement as overlap
from pr2jax.models.router import select
from pr2jax.models.transformer import RouterOutput, selection_biases

Rule = Callable[[Float[Array, "L B C E"]], Int[Array, "L B C K"]]


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


def selection_rule(params: Tree, model_cfg: ModelConfig) -> Rule:
    """The routers' own choice of experts from logits of all MoE layers.

    With the selection biases of `params`, where there are any: a route of older logits is then
    the one that they give today.
    """
    choose = functools.partial(select, cfg=model_cfg.moe)
    biases = selection_biases(params, model_cfg)
    if biases is None:
        return lambda logits: choose(logits, None)
    return lambda logits: jax.vmap(choose)(logits, biases)


def flip_diagnostics(
    logits_old: Float[Array, "L B C E"],
    logits_now: Float[Array, "L B C E"],
    mask: Bool[Array, "B C"],
    rule: Rule,
    agreement: Int[Array, "L B C"] | None = None,
) -> Metrics:
    """The un-shifted old route against the live one, at the tokens whose features were kept.

    `flips`: share of (token, layer) whose un-shifted sets differ, overall and by layer.
    `old_route_zero_deviation`: share of tokens without a flip in any layer; `old_route_agreement`:
    |old & live| / k. With `agreement` (of the *used* route, from the same forward):
    `paired_zero_deviation` and `paired_agreement`, the used route's on the same tokens; they minus
    the old route's are what the shift won.

    Args:
      rule: the router's own selection rule (`selection_rule`).
    """
    old, now = rule(logits_old), rule(logits_now)
    top_k = now.shape[-1]
    common = overlap(old, now)
    out = _per_layer("flips", (common < top_k).astype(jnp.float32), mask)
    pairs = {"old_route": common} | ({} if agreement is None else {"paired": agreement})
    for name, found in pairs.items():
        same = jnp.all(found == top_k, axis=0).astype(jnp.float32)
        out[f"{name}_zero_deviation"] = _mean(same, mask)
        out[f"{name}_agreement"] = _mean(found.astype(jnp.float32) / top_k, mask)
    return out


def logits_kl(
    logits_now: Float[Array, "L B C E"], logits: Float[Array, "L B C E"], mask: Bool[Array, "B C"]
) -> tuple[Array, Array]:
    """(sum over tokens, tokens) of KL(softmax(now) || softmax(logits)), summed over layers, nats.

    PR2's predictor loss of any logits; of the un-shifted old ones it is the loss of W_p = 0.
    """
    now, other = jax.nn.log_softmax(logits_now), jax.nn.log_softmax(logits)
    return _mean(jnp.sum(jnp.exp(now) * (now - other), axis=(0, -1)), mask)


def push(inputs: Float[Array, "L B C D"], shift: Float[Array, "L D E"]) -> Float[Array, "L B C E"]:
    """h S, in fp32."""
    inputs = inputs.astype(jnp.float32)
    return jnp.einsum("lbcd,lde->lbce", inputs, shift, precision=jax.lax.Precision.HIGHEST)


def shift_ratio(
    inputs: Float[Array, "L B C D"],
    shift: Float[Array, "L D E"],
    logits: Float[Array, "L B C E"],
    mask: Bool[Array, "B C"],
) -> Metrics:
    """|h S| / |p|, Euclidean norms over experts: how hard the shift pushes, by layer.

    `inputs` and `logits` are those that the shift met, of the old policy.
    """
    size = jnp.linalg.norm(logits, axis=-1)
    ratio = jnp.linalg.norm(push(inputs, shift), axis=-1) / jnp.maximum(size, 1e-30)
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
