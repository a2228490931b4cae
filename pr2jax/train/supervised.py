"""Next-token learning from packed rows: the loss and the steps of pre-training and SFT."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from pr2jax.core import hosts
from pr2jax.core.hosts import Global, OwnHost
from pr2jax.core.optim import Optimizer
from pr2jax.core.sharding import batch_sharding, replicated
from pr2jax.core.state import TrainState, all_finite, select_finite
from pr2jax.data.packing import PackedRows
from pr2jax.models.config import ModelConfig, num_moe_layers
from pr2jax.models.logprobs import token_logprobs
from pr2jax.models.router import gini
from pr2jax.models.transformer import ForwardOutput, forward
from pr2jax.rl.update import with_selection_biases


class RouterLosses(Protocol):
    """What a configuration says of the router: weights of its two losses (mean over MoE layers)
    and the step of its selection bias after each update."""

    load_balance_coef: float
    z_coef: float
    bias_update_rate: float


def target_logprobs(
    params, batch: PackedRows, *, model: ModelConfig, stats: bool, dtype, mesh: Mesh | None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], ForwardOutput]:
    """Log-probability in nats of the token after each position, 1 where that one is a target
    (else 0), and the forward's output."""
    out = forward(
        params,
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        cfg=model,
        stats=stats,
        dtype=dtype,
        mesh=mesh,
    )
    shift = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
    # A target is predicted from the position before it; the first of a segment is never one.
    logp, _ = token_logprobs(params, out.hidden, shift(batch.tokens), cfg=model, mesh=mesh)
    return logp, shift(batch.loss_mask), out


def packed_loss(
    params,
    batch: PackedRows,
    count: Float[Array, ""] | None = None,
    share: float = 1.0,
    *,
    model: ModelConfig,
    cfg: RouterLosses,
    dtype,
    mesh,
):
    """Cross-entropy of a batch, or of a part of one, and the router's losses.

    Nats summed over target tokens, over the `count` of them in the whole batch (None: this is
    it); the router's losses by `share`, what the part is of the batch. Returns (loss, (metrics,
    assignments an expert [L, E] or None)); all of it adds over parts.
    """
    stats = num_moe_layers(model) > 0
    logp, mask, out = target_logprobs(
        params, batch, model=model, stats=stats, dtype=dtype, mesh=mesh
    )
    one = jnp.float32(1.0)
    total, own = -jnp.sum(logp * mask), jnp.sum(mask)
    loss = total / jnp.maximum(own if count is None else count, 1.0)
    real = jnp.sum(batch.segment_ids > 0).astype(jnp.float32)
    metrics = {"loss": (total, own), "tokens": (real, jnp.float32(share))}
    if stats:
        balance, z = jnp.mean(out.router.load_balance), jnp.mean(out.router.z)
        loss = loss + share * (cfg.load_balance_coef * balance + cfg.z_coef * z)
        busiest = jnp.max(out.router.load, axis=-1) / jnp.mean(out.router.load, axis=-1)
        metrics |= {
            "load_balance": (balance, one),
            "router_z": (z, one),
            "load_max": (jnp.max(busiest), one),
            "load_gini": (jnp.mean(gini(out.router.load)), one),
            "load_dead": (jnp.mean(out.router.load == 0.0), one),
            "router_entropy": (jnp.mean(out.router.entropy), one),
        }
    return loss, (metrics, out.router.load)


def _parts(batch: PackedRows, count: int) -> PackedRows:
    """The batch as [count, rows / count, T], each part with its share of every device's rows."""
    cut = lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
    return PackedRows(*(cut(field) for field in batch))


def _gradient(loss_fn, params, batch: PackedRows, parts: int):
    """((loss, (metrics, load)), gradients in fp32) of the batch, part by part."""
    count = jnp.sum(batch.loss_mask[:, 1:]).astype(jnp.float32)
    run = lambda part: jax.value_and_grad(loss_fn, has_aux=True)(params, part, count, 1.0 / parts)
    if parts == 1:
        return run(batch)
    cut = _parts(batch, parts)
    shapes = jax.eval_shape(run, jax.tree.map(lambda x: x[0], cut))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, run(part)), None)
    return jax.lax.scan(add, zeros, cut)[0]


def make_packed_step(
    model: ModelConfig,
    cfg: RouterLosses,
    optimizer: Optimizer,
    *,
    dtype,
    mesh: Mesh | None,
    accumulate: int = 1,
) -> Callable[[TrainState, PackedRows], tuple[TrainState, dict[str, Any]]]:
    """The jitted (state, batch) -> (state, metrics); a non-finite step changes nothing.

    The gradient is summed over `accumulate` parts of the batch, one after another. That is exact
    but for the load-balancing loss (a product of two means), which is each part's own.

    Metrics: `loss` (targets only), `tokens` (real ones), `load_balance` (1 at balance),
    `router_z`, `load_max` (the busiest expert's load over the mean, worst layer), `load_gini` (of
    expert usage), `load_dead` (share of experts without a token) and `router_entropy` (nats a
    token), means over layers (and parts), `skipped`, and the optimizer's.
    """
    loss_fn = functools.partial(packed_loss, model=model, cfg=cfg, dtype=dtype, mesh=mesh)

    @functools.partial(jax.jit, donate_argnums=(0,))
    def step(state: TrainState, batch: PackedRows):
        (loss, (metrics, load)), grads = _gradient(loss_fn, state.params, batch, accumulate)
        params, opt_state, moved = optimizer.update(grads, state.opt_state, state.params)
        params = with_selection_biases(params, state.params, load, model, cfg.bias_update_rate)
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        ok = all_finite(loss, grads)
        metrics = metrics | moved
        metrics["skipped"] = (1.0 - ok.astype(jnp.float32), jnp.float32(1.0))
        return select_finite(ok, new, state), metrics

    return step


def make_packed_score(
    model: ModelConfig, *, dtype, mesh: Mesh | None
) -> Callable[[Any, PackedRows], tuple[Float[Array, " B"], Float[Array, " B"]]]:
    """The jitted (params, batch) -> (nats of its targets, how many) for each row, whole on every
    device."""

    @functools.partial(jax.jit, out_shardings=None if mesh is None else replicated(mesh))
    def score(params, batch: PackedRows):
        logp, mask, _ = target_logprobs(
            params, batch, model=model, stats=False, dtype=dtype, mesh=mesh
        )
        return -jnp.sum(logp * mask, axis=1), jnp.sum(mask, axis=1)

    return score


def place_rows(
    rows: OwnHost[PackedRows], mesh: Mesh | None, total: int | None = None, first: int = 0
) -> Global[PackedRows]:
    """A batch of `total` rows as global arrays over the mesh (no mesh: as they are), of which this
    host gives those from `first` on."""
    if mesh is None:
        return PackedRows(*(np.ascontiguousarray(field) for field in rows))
    sharding, total = batch_sharding(mesh, 2), total or len(rows.tokens)
    return PackedRows(*(hosts.put_own(field, sharding, total, first) for field in rows))
