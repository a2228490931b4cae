"""Supervised fine-tuning: packed rows, the loss on answers only."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pr2jax.core.config import ConfigError
from pr2jax.core.optim import OptimConfig, Optimizer, build_optimizer
from pr2jax.core.sharding import batch_sharding
from pr2jax.core.state import TrainState, all_finite, create, select_finite
from pr2jax.data.packing import BatchOrder, PackedRows, answer_example, pack
from pr2jax.data.tokenizer import Tokenizer
from pr2jax.models.config import ModelConfig, num_moe_layers
from pr2jax.models.logprobs import token_logprobs
from pr2jax.models.transformer import forward
from pr2jax.rl.update import with_selection_biases
from pr2jax.tasks.base import Problem
from pr2jax.train.config import SFTConfig
from pr2jax.train.evaluator import Evaluator
from pr2jax.train.session import Session

log = logging.getLogger("pr2jax")


def sft_loss(params, batch: PackedRows, *, model: ModelConfig, cfg: SFTConfig, dtype, mesh):
    """Cross-entropy in nats, mean over the batch's target tokens, and the router's losses.

    Returns (loss, (metrics, assignments an expert [L, E] or None)).
    """
    stats = num_moe_layers(model) > 0
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
    logp, _ = token_logprobs(params, out.hidden, shift(batch.tokens), cfg=model)
    mask = shift(batch.loss_mask)
    count, one = jnp.sum(mask), jnp.float32(1.0)
    total = -jnp.sum(logp * mask)
    loss = total / jnp.maximum(count, 1.0)
    real = jnp.sum(batch.segment_ids > 0).astype(jnp.float32)
    metrics = {"loss": (total, count), "tokens": (real, one)}
    if stats:
        balance, z = jnp.mean(out.router.load_balance), jnp.mean(out.router.z)
        loss = loss + cfg.load_balance_coef * balance + cfg.z_coef * z
        busiest = jnp.max(out.router.load, axis=-1) / jnp.mean(out.router.load, axis=-1)
        metrics |= {
            "load_balance": (balance, one),
            "router_z": (z, one),
            "load_max": (jnp.max(busiest), one),
        }
    return loss, (metrics, out.router.load)


def make_sft_step(
    model: ModelConfig, cfg: SFTConfig, optimizer: Optimizer, *, dtype, mesh: Mesh | None
) -> Callable[[TrainState, PackedRows], tuple[TrainState, dict[str, Any]]]:
    """The jitted (state, batch) -> (state, metrics); a non-finite step changes nothing.

    Metrics: `loss` (targets only), `tokens` (real ones), `load_balance` (1 at balance),
    `router_z`, `load_max` (the busiest expert's load over the mean, worst layer), `skipped`, and
    the optimizer's.
    """
    loss_fn = functools.partial(sft_loss, model=model, cfg=cfg, dtype=dtype, mesh=mesh)

    @functools.partial(jax.jit, donate_argnums=(0,))
    def step(state: TrainState, batch: PackedRows):
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (metrics, load)), grads = gradient(state.params, batch)
        params, opt_state, moved = optimizer.update(grads, state.opt_state, state.params)
        params = with_selection_biases(params, state.params, load, model, cfg.bias_update_rate)
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        ok = all_finite(loss, grads)
        metrics = metrics | moved
        metrics["skipped"] = (1.0 - ok.astype(jnp.float32), jnp.float32(1.0))
        return select_finite(ok, new, state), metrics

    return step


def pack_problems(problems: list[Problem], tokenizer: Tokenizer, row_length: int) -> PackedRows:
    """All solved problems, packed. Raises ConfigError where one does not fit."""
    unsolved = [p.id for p in problems if p.solution is None]
    if unsolved:
        raise ConfigError(f"sft.task: problem {unsolved[0]} has no solution to learn from")
    try:
        examples = [answer_example(tokenizer, p.prompt, p.solution) for p in problems]
        rows, report = pack(examples, row_length, pad_id=tokenizer.pad_id)
    except ValueError as error:
        raise ConfigError(f"sft: {error} (tokenizer, or sft.row_length={row_length})") from None
    log.info(
        "SFT data: %d problems in %d rows of %d tokens, %.0f%% filled",
        report.examples,
        report.rows,
        row_length,
        100 * report.fill,
    )
    return rows


class SFTTrainer:
    """SFT as the loop sees it; batch `index` is a function of the seed and `index`."""

    def __init__(
        self,
        session: Session,
        problems: list[Problem],
        *,
        steps: int,
        evaluator: Evaluator | None,
        name: str = "sft",
        optim: OptimConfig | None = None,
    ):
        cfg = session.cfg.sft
        self.name, self.steps = name, steps
        self.eval_every = cfg.eval_every
        self.max_skipped_in_row = cfg.max_skipped_in_row
        self.console = ("loss", "tokens", "learning_rate")
        self.evaluator, self.session = evaluator, session
        self.rows = pack_problems(problems, session.tokenizer, cfg.row_length)
        self.order = BatchOrder(len(self.rows.tokens), cfg.batch, session.cfg.seed)
        self.optimizer = build_optimizer(optim or cfg.optim, session.specs)
        self._step = make_sft_step(
            session.cfg.model, cfg, self.optimizer, dtype=session.dtype, mesh=session.mesh
        )

    def initial_state(self, params) -> TrainState:
        """A state around `params` at step 0."""
        return create(params, self.optimizer)

    def batch(self, index: int) -> PackedRows:
        """Rows of batch `index`."""
        chosen = self.order.at(index)
        rows = PackedRows(*(np.ascontiguousarray(field[chosen]) for field in self.rows))
        mesh = self.session.mesh
        if mesh is None:
            return rows
        return jax.device_put(rows, batch_sharding(mesh, 2))

    def step(self, state: TrainState, index: int) -> tuple[TrainState, dict[str, Any]]:
        """One optimizer step."""
        return self._step(state, self.batch(index))

    def evaluate(self, state: TrainState, index: int) -> dict[str, float]:
        """Held-out figures, where there is an evaluator."""
        return {} if self.evaluator is None else self.evaluator.quick(state.params, index)

    def memory(self) -> dict[str, Any]:
        """Nothing: batches are a function of the position."""
        return {}

    def remember(self, memory: dict[str, Any]) -> None:
        """There is nothing to take back."""
