"""How router logits drift while a rollout batch is learned from, and how far h foretells it.

The drift is dP = p_now - p_old at the same token and layer, as routes see it: what is added to
every expert alike changes no choice, so its mean over experts is taken out. A linear map W [D, E]
of the router's input, dP ~ h W, is all that PR2's predictor or a lookahead can express; fitted
on one half of a window's own tokens and judged on the other it is an oracle: what a predictor
could win at most in this window, had it known the future. Window: the time from a rollout's start
to some moment of learning from it.

`h` are router inputs at the rollout, `p` un-shifted logits, weights or masks say which tokens
count; L counts MoE layers. Everything is fp32.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pr2jax.core.metrics import Metrics
from pr2jax.models.router import agreement
from pr2jax.replay.diagnostics import Rule, push

RIDGE = 1e-3


def drift(
    p_old: Float[Array, "L B C E"], p_now: Float[Array, "L B C E"]
) -> Float[Array, "L B C E"]:
    """dP, centred over experts."""
    moved = p_now - p_old
    return moved - jnp.mean(moved, axis=-1, keepdims=True)


def fit(
    h: Float[Array, "L B C D"],
    dp: Float[Array, "L B C E"],
    mask: Bool[Array, "B C"],
    ridge: float = RIDGE,
) -> Float[Array, "L D E"]:
    """The W of each layer that minimises sum |dP - h W|^2 + r |W|^2 over the tokens of the mask.

    r = `ridge` times the mean eigenvalue of h^T h, so that it does not depend on the number of
    tokens or on the size of h. No intercept: W_p has none.
    """
    x = jnp.where(mask[..., None], h, 0.0).astype(jnp.float32).reshape(h.shape[0], -1, h.shape[-1])
    y = jnp.where(mask[..., None], dp, 0.0).reshape(dp.shape[0], -1, dp.shape[-1])
    highest = jax.lax.Precision.HIGHEST
    gram = jnp.einsum("lnd,lne->lde", x, x, precision=highest)
    size = h.shape[-1]
    weight = ridge * jnp.trace(gram, axis1=1, axis2=2) / size
    # Where there is no token the system is 0 W = 0: any positive diagonal gives W = 0.
    weight = jnp.where(weight > 0, weight, 1.0)
    both = jnp.einsum("lnd,lne->lde", x, y, precision=highest)
    return jnp.linalg.solve(gram + weight[:, None, None] * jnp.eye(size), both)


def explained(
    h: Float[Array, "L B C D"],
    dp: Float[Array, "L B C E"],
    shift: Float[Array, "L D E"],
    mask: Bool[Array, "B C"],
) -> tuple[Array, Array]:
    """(R2, 1): the share of the drift that `shift` foretells, mean over layers.

    1 - sum |dP - h S|^2 / sum |dP|^2 in each layer: 0 for the un-shifted old logits, below 0 where
    the shift does harm. (0, 0) where a layer has not drifted at all.
    """
    foretold = push(h, shift)
    foretold = foretold - jnp.mean(foretold, axis=-1, keepdims=True)
    total = lambda x: jnp.sum(jnp.where(mask[..., None], x, 0.0) ** 2, axis=(1, 2, 3))
    moved = total(dp)
    share = 1.0 - total(dp - foretold) / jnp.maximum(moved, 1e-30)
    there = jnp.all(moved > 0)
    return jnp.where(there, jnp.mean(share), 0.0), there.astype(jnp.float32)


def cosine(a: Float[Array, "L D E"], b: Float[Array, "L D E"]) -> tuple[Array, Array]:
    """(cosine of two maps, 1), mean over layers, as their routes differ: centred over experts.

    (0, 0) where one of them is zero.
    """
    a, b = (x - jnp.mean(x, axis=-1, keepdims=True) for x in (a, b))
    product = jnp.sum(a * b, axis=(1, 2))
    norms = jnp.sqrt(jnp.sum(a**2, axis=(1, 2)) * jnp.sum(b**2, axis=(1, 2)))
    there = jnp.all(norms > 0)
    value = jnp.mean(product / jnp.maximum(norms, 1e-30))
    return jnp.where(there, value, 0.0), there.astype(jnp.float32)


def route_match(
    routes: Int[Array, "L B C K"], live: Int[Array, "L B C K"], mask: Bool[Array, "B C"]
) -> Metrics:
    """`zero_deviation`: share of tokens whose experts are the live ones in all layers;
    `agreement`: |routes & live| / k."""
    common, top_k = agreement(routes, live), live.shape[-1]
    same = jnp.all(common == top_k, axis=0)
    tokens = jnp.sum(mask, dtype=jnp.float32)
    share = jnp.sum(jnp.where(mask, common, 0)) / (top_k * common.shape[0])
    return {
        "zero_deviation": (jnp.sum(same & mask, dtype=jnp.float32), tokens),
        "agreement": (share.astype(jnp.float32), tokens),
    }


def window_report(
    h: Float[Array, "L B C D"],
    p_old: Float[Array, "L B C E"],
    p_now: Float[Array, "L B C E"],
    mask: Bool[Array, "B C"],
    first: Bool[Array, " B"],
    rule: Rule,
    *,
    used: Int[Array, "L B C K"],
    shifts: Mapping[str, Float[Array, "L D E"]],
) -> tuple[Metrics, Float[Array, "L D E"]]:
    """What the drift of a window was, what an oracle makes of it, and what given shifts do.

    Everything is measured on the tokens of the rows that are not `first`: `old_*` of the un-shifted
    old route, `used_*` of the logged one, `oracle_*` of the routes of p_old + h W with W fitted on
    the first rows, and NAME_* of every shift given; `oracle_r2` and NAME_r2 (`explained`).
    `split_cosine`: of the W of both halves, what is left of 1 by the noise of fitting alone.
    `size`: root mean square of the drift over that of the (centred) logits.

    Args:
      first: the rows that the oracle is fitted on; rows of a group belong on one side.
      rule: the router's own selection rule.
      used: the logged experts.
      shifts: maps S [L, D, E]; routes are chosen from p_old + h S.

    Returns:
      metrics, and the W fitted on all tokens.
    """
    h = h.astype(jnp.float32)
    dp = drift(p_old, p_now)
    fitted, judged = mask & first[:, None], mask & ~first[:, None]
    oracle = fit(h, dp, fitted)
    live = rule(p_now)
    out: Metrics = {"split_cosine": cosine(oracle, fit(h, dp, judged))}
    named = {"old": rule(p_old), "used": used}
    for name, shift in {"oracle": oracle, **shifts}.items():
        out[f"{name}_r2"] = explained(h, dp, shift, judged)
        named[name] = rule(p_old + push(h, shift))
    for name, routes in named.items():
        match = route_match(routes, live, judged)
        out |= {f"{name}_{key}": value for key, value in match.items()}
    square = lambda x: jnp.sum(jnp.where(judged[..., None], x, 0.0) ** 2)
    size = jnp.sqrt(square(dp) / jnp.maximum(square(drift(0.0, p_old)), 1e-30))
    out["size"] = (size, jnp.any(judged).astype(jnp.float32))
    return out, fit(h, dp, mask)
