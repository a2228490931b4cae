"""Supervised fine-tuning: packed rows, the loss on answers only."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from pr2jax.core import hosts
from pr2jax.core.config import ConfigError
from pr2jax.core.optim import OptimConfig, build_optimizer
from pr2jax.core.sharding import batch_sharding
from pr2jax.core.state import TrainState, create
from pr2jax.data.packing import BatchOrder, PackedRows, answer_example, pack
from pr2jax.data.tokenizer import Tokenizer
from pr2jax.tasks.base import Problem
from pr2jax.train.evaluator import Evaluator
from pr2jax.train.session import Session
from pr2jax.train.supervised import make_packed_step

log = logging.getLogger("pr2jax")


def pack_problems(problems: list[Problem], tokenizer: Tokenizer, row_length: int) -> PackedRows:
    """All solved problems, packed. Raises ConfigError where one does not fit."""
    unsolved = [p.id for p in problems if p.solution is None]
    if unsolved:
        raise ConfigError(f"sft.task: problem {unsolved[0]} has no solution to learn from")
    try:
        examples = [answer_example(tokenizer, p.input, p.solution) for p in problems]
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
        self._step = make_packed_step(
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
        return PackedRows(*(hosts.put(field, batch_sharding(mesh, 2)) for field in rows))

    def step(self, state: TrainState, index: int) -> tuple[TrainState, dict[str, Any]]:
        """One optimizer step."""
        return self._step(state, self.batch(index))

    def consumed(self, index: int) -> list[int]:
        """Which of the packed rows step `index` learns from."""
        return self.order.at(index).tolist()

    def evaluate(self, state: TrainState, index: int) -> dict[str, float]:
        """Held-out figures, where there is an evaluator."""
        return {} if self.evaluator is None else self.evaluator.quick(state.params, index)

    def memory(self) -> dict[str, Any]:
        """Nothing: batches are a function of the position."""
        return {}

    def remember(self, memory: dict[str, Any]) -> None:
        """There is nothing to take back."""
