"""The router: logits, scores, selection, gates, and its losses. All in fp32.

Selection and gates are apart on purpose. Selection may read shifted logits (predicted routes) or
be replaced by a recorded one; gates always come from the live, dense, un-shifted logits at the
experts in use, so that gradients reach the router whatever chose the experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pr2jax.models.config import MoEConfig


def project(x: Float[Array, "... D"], kernel: Float[Array, "D E"]) -> Float[Array, "... E"]:
    """x @ kernel in true fp32: TPUs otherwise multiply fp32 in fewer bits, and routes flip."""
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    with jax.named_scope("router"):
        out = jnp.dot(flat, kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


def scores(logits: Float[Array, "... E"], cfg: MoEConfig) -> Float[Array, "... E"]:
    """Softmax over all experts, or the sigmoid of each logit."""
    return jax.nn.softmax(logits, axis=-1) if cfg.score == "softmax" else jax.nn.sigmoid(logits)


def selection_scores(
    logits: Float[Array, "... E"], bias: Float[Array, " E"] | None, cfg: MoEConfig
) -> Float[Array, "... E"]:
    """What top-k is taken of: logits, or biased scores; -inf outside the chosen groups.

    Without a bias or groups, logits order experts as their scores do, and do not underflow.
    Group scores are the sum of each group's best two (DeepSeek-V3).
    """
    if bias is None and cfg.num_groups == 1:
        return logits
    choice = scores(logits, cfg)
    if bias is not None:
        choice = choice + lax.stop_gradient(bias.astype(jnp.float32))
    if cfg.num_groups > 1:
        size = cfg.live // cfg.num_groups
        grouped = choice.reshape(*choice.shape[:-1], cfg.num_groups, size)
        group_score = lax.top_k(grouped, min(2, size))[0].sum(-1)
        _, best = lax.top_k(group_score, cfg.top_groups)
        allowed = jnp.any(best[..., None] == jnp.arange(cfg.num_groups), axis=-2)
        grouped = jnp.where(allowed[..., None], grouped, -jnp.inf)
        choice = grouped.reshape(choice.shape)
    return choice


def live_columns(leaf: Float[Array, "... E"], cfg: MoEConfig) -> Float[Array, "... V"]:
    """The router's (or predictor's) columns of the experts that take part, the first V."""
    return leaf[..., : cfg.live] if cfg.masked else leaf


def select(
    logits: Float[Array, "... E"], bias: Float[Array, " E"] | None, cfg: MoEConfig
) -> Int[Array, "... K"]:
    """The top-k experts, best first; exact, ties to the lower id."""
    return lax.top_k(lax.stop_gradient(selection_scores(logits, bias, cfg)), cfg.top_k)[1]


def gather_experts(values: Float[Array, "... E"], ids: Int[Array, "... K"]):
    """values at ids, by a masked sum: exact, and its gradient is not a scatter."""
    onehot = ids[..., None] == jnp.arange(values.shape[-1])
    return jnp.sum(jnp.where(onehot, values[..., None, :], 0.0), axis=-1)


def _normalised(logits: Float[Array, "... E"], cfg: MoEConfig) -> Float[Array, "... E"]:
    """Scores over their sum, as a softmax of log-scores.

    A forced expert may have drifted to a score of 1e-22; dividing by such a sum is finite, but
    its gradient divides by the square, which underflows to 0.
    """
    log_scores = logits if cfg.score == "softmax" else jax.nn.log_sigmoid(logits)
    return jax.nn.softmax(log_scores, axis=-1)


def gates(
    logits: Float[Array, "... E"], ids: Int[Array, "... K"], cfg: MoEConfig
) -> Float[Array, "... K"]:
    """The weight of each used expert, from dense un-shifted logits (PR2, Section 3).

    For softmax scores, normalising before or after the choice is the same function.
    """
    if cfg.normalize == "none":
        chosen = gather_experts(scores(logits, cfg), ids)
    else:
        chosen = _normalised(gather_experts(logits, ids), cfg)
    return chosen * cfg.routed_scaling


def agreement(used: Int[Array, "... K"], live: Int[Array, "... K"]) -> Int[Array, "..."]:
    """|used ∩ live|: how many of the used experts the live router would choose."""
    return jnp.sum(used[..., :, None] == live[..., None, :], axis=(-1, -2), dtype=jnp.int32)


def margin(choice: Float[Array, "... E"], top_k: int) -> Float[Array, "..."]:
    """p_(k) - p_(k+1), the distance to the selection boundary; 0 when every expert is chosen."""
    if top_k >= choice.shape[-1]:
        return jnp.zeros(choice.shape[:-1], jnp.float32)
    best = lax.top_k(choice, top_k + 1)[0]
    return best[..., top_k - 1] - best[..., top_k]


def router_stats(
    logits: Float[Array, "B T E"],
    ids: Int[Array, "B T K"],
    mask: Bool[Array, "B T"],
    cfg: MoEConfig,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, " E"]]:
    """(load-balancing loss, z-loss, assignments an expert), over real tokens only.

    Load balancing is E * sum_e f_e P_e with f_e the share of assignments and P_e the mean
    normalised score, 1 at perfect balance (Switch Transformer, Eq. 4); the z-loss is the mean of
    logsumexp(logits)^2 (ST-MoE, Eq. 5).
    """
    real = mask.astype(jnp.float32)
    tokens = jnp.maximum(real.sum(), 1.0)
    onehot = jnp.sum(ids[..., None] == jnp.arange(cfg.live), axis=-2)
    load = jnp.einsum("bte,bt->e", onehot.astype(jnp.float32), real)
    mean_prob = jnp.einsum("bte,bt->e", _normalised(logits, cfg), real) / tokens
    balance = cfg.live * jnp.sum(load / (tokens * cfg.top_k) * mean_prob)
    z = jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * real) / tokens
    return balance, z, load


def router_entropy(
    logits: Float[Array, "B T E"], mask: Bool[Array, "B T"], cfg: MoEConfig
) -> Float[Array, ""]:
    """Entropy in nats of the normalised scores, mean over real tokens."""
    log_scores = logits if cfg.score == "softmax" else jax.nn.log_sigmoid(logits)
    log_p = jax.nn.log_softmax(lax.stop_gradient(log_scores), axis=-1)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    real = mask.astype(jnp.float32)
    return jnp.sum(entropy * real) / jnp.maximum(real.sum(), 1.0)


def gini(load: Float[Array, "*L E"]) -> Float[Array, "*L"]:
    """Gini coefficient of assignments over experts: 0 at balance, 1 - 1/E where one has all."""
    count = load.shape[-1]
    rank = jnp.arange(1, count + 1, dtype=jnp.float32)
    weighted = jnp.sum((2 * rank - count - 1) * jnp.sort(load, axis=-1), axis=-1)
    return weighted / (count * jnp.maximum(jnp.sum(load, axis=-1), 1.0))


def update_selection_bias(
    bias: Float[Array, "L E"], load: Float[Array, "L E"], rate: float
) -> Float[Array, "L E"]:
    """Auxiliary-loss-free balancing: under-loaded experts gain `rate`, others lose it.

    b_e += rate * sign(mean(load) - load_e) (Wang et al. 2024, Algorithm 1).
    """
    return bias + rate * jnp.sign(load.mean(axis=-1, keepdims=True) - load)
