"""One optimizer step on one mini-batch: the policy's gradient, and the predictor's apart from it.

The two gradients come from two calls of `jax.grad` that share no path: the policy's loss gives
the router logits as an auxiliary output, and the predictor's loss sees them as constants. So the
predictor cannot move the policy, nor the policy the predictor, by construction.

Metrics of a step, unreduced (value, weight); see `replay.diagnostics` for those of replay and
`rl.objective` for those of ratios, clips and corrections: `loss`; `policy_loss`, `reference_kl` and
`entropy` (means by the aggregation's weights); `ratio_ess`; `old/*` (theta_old against now) and
`behavior/*` (sampler against now; at mini-step 1 the rollout/training mismatch); `load_balance`,
`router_z`, `predictor_loss`, `old_logits_kl` and `shifted_logits_kl` (the same KL of un-shifted
and of shifted logits), `shift_ratio`, `tokens`, `skipped`, and the optimizer's `learning_rate`,
`grad_norm*`, `update_norm`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pr2jax.core.config import ConfigError
from pr2jax.core.metrics import Metrics, merge
from pr2jax.core.optim import Optimizer
from pr2jax.core.params import Tree, map_with_path
from pr2jax.core.state import TrainState, all_finite, select_finite
from pr2jax.models.config import ModelConfig, num_moe_layers
from pr2jax.models.logprobs import token_logprobs
from pr2jax.models.predictor import RouterFeatures, margin_weights, predictor_loss
from pr2jax.models.router import agreement, update_selection_bias
from pr2jax.models.transformer import (
    Record,
    RouterOutput,
    forward,
    predictor_params,
    selection_biases,
)
from pr2jax.replay.diagnostics import (
    flip_diagnostics,
    logits_kl,
    mismatch,
    push,
    replay_diagnostics,
    selection_rule,
    shift_ratio,
)
from pr2jax.replay.modes import PREDICTOR_PATTERN, ReplayConfig, check_model, gates, plan
from pr2jax.replay.routes import decode, to_inputs
from pr2jax.rl.losses import effective_sample_size, token_weights
from pr2jax.rl.objective import kl_terms, policy_terms
from pr2jax.rl.types import PREDICTOR_GROUP, LearnerBatch, RLConfig

MiniStep = Callable[[TrainState, LearnerBatch, Bool[Array, ""] | bool], tuple[TrainState, Metrics]]


@struct.dataclass
class _Sums:
    """What adds up over micro-batches. `metrics` merge by kind."""

    grads: Tree
    loss: Float[Array, ""]
    predictor_grad: Float[Array, "L D E"] | None
    predictor_sums: Float[Array, " L"] | None
    predictor_weights: Float[Array, " L"] | None
    load: Float[Array, "L E"] | None
    metrics: Metrics


@dataclasses.dataclass(frozen=True)
class _Step:
    """The static side of a mini-step."""

    model: ModelConfig
    rl: RLConfig
    replay: ReplayConfig
    dtype: jnp.dtype
    mesh: Mesh | None

    @property
    def needs_stats(self) -> bool:
        rl = self.rl
        wanted = rl.load_balance_coef or rl.z_coef or rl.bias_update_rate
        return bool(wanted) and num_moe_layers(self.model) > 0


def _add(a: _Sums, b: _Sums) -> _Sums:
    total = jax.tree.map(jnp.add, a.replace(metrics={}), b.replace(metrics={}))
    return total.replace(metrics=merge(a.metrics, b.metrics))


def _places(features: RouterFeatures) -> Int[Array, "B C"]:
    """Positions that can be gathered: 0 where no token is kept."""
    return jnp.where(features.mask, features.positions, 0)


def _policy_loss(
    params: Tree,
    batch: LearnerBatch,
    weights: Float[Array, "B T"],
    share: Float[Array, ""],
    step: _Step,
) -> tuple[Float[Array, ""], tuple[Metrics, RouterOutput]]:
    """This micro-batch's part of the mini-batch's loss, its metrics, and what its routers saw.

    Args:
      weights: token weights of the whole mini-batch at these tokens (input alignment).
      share: the part of the mini-batch's real tokens that stands here.
    """
    rl, moe = step.rl, num_moe_layers(step.model) > 0
    keep = batch.features is not None
    out = forward(
        params,
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        cfg=step.model,
        routes=None if batch.routes is None else decode(batch.routes),
        record=Record(_places(batch.features), inputs=False) if keep else None,
        diagnostics=moe,
        stats=step.needs_stats,
        dtype=step.dtype,
        mesh=step.mesh,
    )
    logp, entropy = token_logprobs(
        params,
        out.hidden,
        to_inputs(batch.tokens),
        cfg=step.model,
        temperature=rl.sampling.temperature,
        entropy=True,
        mesh=step.mesh,
    )
    mask = to_inputs(batch.loss_mask)
    old = to_inputs(batch.old_logprobs)
    behavior = to_inputs(batch.behavior_logprobs)
    terms, policy_metrics = policy_terms(logp, old, behavior, mask, batch.advantages[:, None], rl)
    policy = jnp.sum(weights * terms)
    mean_entropy = jnp.sum(jnp.where(mask > 0, weights * entropy, 0.0))
    loss = policy
    if rl.entropy_coef:
        loss = loss - rl.entropy_coef * mean_entropy
    weight = jnp.sum(weights)
    metrics = {"policy_loss": (policy, weight), "entropy": (mean_entropy, weight)}
    if batch.ref_logprobs is not None:
        reference = to_inputs(batch.ref_logprobs)
        kl = jnp.sum(weights * kl_terms(logp, old, reference, mask, rl))
        loss = loss + rl.kl_coef * kl
        metrics["reference_kl"] = (kl, weight)
    if step.needs_stats:
        balance, z = jnp.mean(out.router.load_balance), jnp.mean(out.router.z)
        loss = loss + share * (rl.load_balance_coef * balance + rl.z_coef * z)
        metrics |= {"load_balance": (share * balance, share), "router_z": (share * z, share)}
    metrics |= policy_metrics
    for name, other in (("old", old), ("behavior", behavior)):
        found = mismatch(other, logp, mask)
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
    router = out.router
    if moe:
        if batch.logged is not None and batch.routes is None:
            # Nothing is replayed: the log is held against the experts that live routing uses.
            router = router.replace(agreement=agreement(decode(batch.logged), out.routes))
        metrics |= replay_diagnostics(router, mask > 0, step.model.moe.top_k)
    return loss, (metrics, router)


def _predictor_terms(params: Tree, batch: LearnerBatch, logits_now: Array, step: _Step):
    """Gradient of the predictor's summed loss by W_p [L, D, E]; per-layer sums and weights."""
    cfg, todo = step.replay, plan(step.replay)
    weights = None
    if cfg.loss_weighting == "margin":
        weights = margin_weights(
            logits_now,
            step.model.moe.top_k,
            max_weight=cfg.margin_max,
            min_margin=cfg.margin_min,
        )

    def total(w_p):
        sums, counts = predictor_loss(
            w_p, batch.features, logits_now, weights, gates(todo, step.model), batch.lookahead
        )
        return jnp.sum(sums), (sums, counts)

    w_p = predictor_params(params, step.model).astype(jnp.float32)
    grad, (sums, counts) = jax.grad(total, has_aux=True)(w_p)
    return grad, sums, counts


def _flips(
    params: Tree, batch: LearnerBatch, router: RouterOutput, logits_now: Array, step: _Step
) -> Metrics:
    """The un-shifted old route and logits against the live ones; the shifted ones beside them."""
    old, rule = batch.features, selection_rule(params, step.model)
    used = jnp.take_along_axis(router.agreement, _places(old)[None], axis=2)
    out = flip_diagnostics(old.logits, logits_now, old.mask, rule, used)
    out["old_logits_kl"] = logits_kl(logits_now, old.logits, old.mask)
    if batch.shift is not None:
        out |= shift_ratio(old.inputs, batch.shift, old.logits, old.mask)
        shifted = old.logits + push(old.inputs, batch.shift)
        out["shifted_logits_kl"] = logits_kl(logits_now, shifted, old.mask)
    return out


def _micro_sums(params: Tree, batch: LearnerBatch, weights, share, step: _Step) -> _Sums:
    """Gradients and metrics of one micro-batch."""
    grad_fn = jax.value_and_grad(_policy_loss, has_aux=True)
    (loss, (metrics, router)), grads = grad_fn(params, batch, weights, share, step)
    predictor_grad = sums = counts = None
    if batch.features is not None:
        logits_now = jax.lax.stop_gradient(router.logits)
        metrics = metrics | _flips(params, batch, router, logits_now, step)
        if plan(step.replay).predictor:
            predictor_grad, sums, counts = _predictor_terms(params, batch, logits_now, step)
    return _Sums(grads, loss, predictor_grad, sums, counts, router.load, metrics)


def accumulate(params: Tree, batch: LearnerBatch, step: _Step) -> _Sums:
    """Sums over the micro-batches that hold rows; exactly those of the mini-batch as a whole.

    (But for the load-balancing loss, a product of two means, which is taken per micro-batch and
    averaged by real tokens.)
    """
    rl = step.rl
    mask = jax.vmap(to_inputs)(batch.loss_mask)
    weights = token_weights(mask, rl.aggregation, rl.sampling.max_tokens)
    real = jnp.sum(batch.lengths, axis=1).astype(jnp.float32)
    shares = real / jnp.maximum(jnp.sum(real), 1.0)

    def micro(i):
        one = jax.tree.map(lambda x: x[i], batch.only_rows())
        one = one.replace(shift=batch.shift, lookahead=batch.lookahead)
        return _micro_sums(params, one, weights[i], shares[i], step)

    if batch.tokens.shape[0] == 1:
        return micro(0)
    # Fillers stand last: a loop with a traced bound does no work for micro-batches of them.
    used = jnp.sum(real > 0)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro, 0))
    return jax.lax.fori_loop(0, used, lambda i, total: _add(total, micro(i)), zero)


def _with_predictor(grads: Tree, grad: Array | None, params: Tree, cfg: ModelConfig) -> Tree:
    """`grads` with the predictor's [L, D, E] gradient (None: zero) in the predictor's leaves."""
    if grad is None:
        own = jax.tree.map(jnp.zeros_like, grads)
    else:
        # Stacking is linear, so its transpose puts every layer's gradient back in its leaf.
        stack = lambda tree: predictor_params(tree, cfg).astype(jnp.float32)
        own = jax.vjp(stack, params)[1](grad)[0]
    pick = lambda path, a, b: b if re.search(PREDICTOR_PATTERN, path) else a
    return map_with_path(pick, grads, own)


def with_selection_biases(
    new: Tree, old: Tree, load: Float[Array, "L E"] | None, model: ModelConfig, rate: float
) -> Tree:
    """`new`, but selection biases move from `old` by their own rule, or stay (rate 0).

    `load`: assignments an expert (`RouterOutput.load`); read only for a rate above 0.
    """
    biases = selection_biases(old, model)
    if biases is None:
        return new
    moved = update_selection_bias(biases, load, rate) - biases if rate else jnp.zeros_like(biases)
    delta = jax.vjp(lambda tree: selection_biases(tree, model), old)[1](moved)[0]
    pick = lambda path, n, o, d: o + d if path.endswith("router/selection_bias") else n
    return map_with_path(pick, new, old, delta)


def _finish(total: _Sums, params: Tree, step: _Step, active: Bool[Array, ""]):
    """(gradients, final metrics, whether the predictor has anything to learn)."""
    metrics = dict(total.metrics)
    square, count = metrics.pop("ratio_square")
    one = jnp.float32(1.0)
    metrics["loss"] = (total.loss, one)
    metrics["ratio_ess"] = (effective_sample_size(metrics["ratio_mean"][0], square, count), one)
    metrics["tokens"] = (count, one)
    grad = None
    if total.predictor_grad is not None:
        weights = total.predictor_weights
        active = active & jnp.all(weights > 0)
        scale = 1.0 / jnp.maximum(weights, 1e-30)
        per_layer = total.predictor_sums * scale
        # `where`, so that a gradient nobody applies cannot make the step non-finite.
        grad = jnp.where(active, total.predictor_grad * scale[:, None, None], 0.0)
        seen = (weights > 0).astype(jnp.float32)
        metrics["predictor_loss"] = (jnp.sum(per_layer), jnp.max(seen))
        for i in range(weights.shape[0]):
            metrics[f"predictor_loss/layer_{i}"] = (per_layer[i], seen[i])
    return _with_predictor(total.grads, grad, params, step.model), metrics, active


def make_mini_step(
    model_cfg: ModelConfig,
    rl_cfg: RLConfig,
    replay_cfg: ReplayConfig,
    optimizer: Optimizer,
    *,
    dtype: jnp.dtype = jnp.float32,
    mesh: Mesh | None = None,
    donate: bool = True,
) -> MiniStep:
    """Builds the jitted (state, batch, predictor_active) -> (state, metrics).

    `batch` is one mini-batch, micro-split ([n, b, ...]); its mini-batch mean is over real tokens
    (or sequences) of all micro-batches. `predictor_active` is False in mini-step 1 of a rollout
    batch (PR2, Algorithm 3): W_p and its optimizer state then stay as they are, bit for bit. A
    step whose loss or gradient is not finite changes nothing and is counted in the state.

    Args:
      dtype: of the forward's products.
      donate: whether the given state's buffers are reused (the caller must not touch it again).

    Raises ConfigError for a mode that the model or the optimizer cannot serve.
    """
    check_model(replay_cfg, model_cfg)
    todo = plan(replay_cfg)
    if todo.predictor and PREDICTOR_GROUP not in optimizer.trained:
        raise ConfigError(
            f"rl.optim.groups: mode {replay_cfg.mode!r} needs a trainable group "
            f"{PREDICTOR_GROUP!r} that matches {PREDICTOR_PATTERN!r}"
        )
    if rl_cfg.bias_update_rate and not (model_cfg.moe and model_cfg.moe.selection_bias):
        raise ConfigError("rl.bias_update_rate: the model's router has no selection bias")
    step = _Step(model_cfg, rl_cfg, replay_cfg, dtype, mesh)

    def mini_step(state, batch, predictor_active):
        if (batch.routes is not None) != (todo.recorder != "none"):
            raise ValueError(f"mode {replay_cfg.mode!r}: routes must be given iff it replays them")
        if todo.predictor and batch.features is None:
            raise ValueError(f"mode {replay_cfg.mode!r} needs router features in the batch")
        if todo.predictor and todo.lookahead and batch.lookahead is None:
            raise ValueError(f"mode {replay_cfg.mode!r} needs the lookahead in the batch")
        total = accumulate(state.params, batch, step)
        active = jnp.asarray(predictor_active, bool) & todo.predictor
        grads, metrics, active = _finish(total, state.params, step, active)
        gate = {PREDICTOR_GROUP: active} if PREDICTOR_GROUP in optimizer.trained else None
        params, opt_state, moved = optimizer.update(grads, state.opt_state, state.params, gate)
        params = with_selection_biases(
            params, state.params, total.load, model_cfg, rl_cfg.bias_update_rate
        )
        ok = all_finite(total.loss, grads)
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        metrics |= moved
        metrics["skipped"] = (1.0 - ok.astype(jnp.float32), jnp.float32(1.0))
        return select_finite(ok, new, state), metrics

    return jax.jit(mini_step, donate_argnums=(0,) if donate else ())
