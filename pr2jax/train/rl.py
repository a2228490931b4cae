"""GRPO with routing replay: gather (train/rollouts.py), learn.

The life of one batch: prompts are chosen by position; the sampler draws responses on the
learner's parameters, logging routes chosen from (possibly shifted) router logits; verifiers
score them; advantages are taken within groups; the batch is cut into mini-steps, each one
optimizer update that replays the logged routes.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from pr2jax.core import goodput, hosts
from pr2jax.core.metrics import merge
from pr2jax.core.optim import build_optimizer
from pr2jax.core.state import TrainState, create
from pr2jax.replay.modes import plan
from pr2jax.rl.batch import (
    feature_places,
    make_batch,
    put_batch,
    split_micro,
    split_mini_batches,
)
from pr2jax.rl.scoring import make_scorer, scoring_decision
from pr2jax.rl.signal import learning_signal
from pr2jax.rl.types import LearnerBatch, policy_optim
from pr2jax.rl.update import make_mini_step
from pr2jax.sampler.types import Rollout
from pr2jax.tasks.base import Problem
from pr2jax.train.evaluator import Evaluator
from pr2jax.train.probe import DriftProbe
from pr2jax.train.rollouts import Gathered, RolloutSource
from pr2jax.train.session import Session

log = logging.getLogger("pr2jax")


class RLTrainer:
    """RL as the loop sees it: one step is one rollout batch and its mini-steps.

    Metrics of a step: those of its batch (`RolloutSource`); `kept_groups` (share with a signal),
    `tokens_per_second`, `time/learn`; every learner metric over the whole step; and under
    `mini_I/NAME` those of mini-step I (by layer: zero deviation and agreement); `probe/*` of
    batches that are probed (`train/probe.py`).
    """

    def __init__(self, session: Session, problems: list[Problem], evaluator: Evaluator | None):
        cfg = session.cfg
        self.name, self.session, self.evaluator = "rl", session, evaluator
        self.cfg, self.plan = cfg.rl, plan(cfg.replay)
        self.steps, self.eval_every = cfg.rl.steps, cfg.rl.eval_every
        self.max_skipped_in_row = cfg.rl.max_skipped_in_row
        self.console = ("reward", "zero_deviation", "tokens_per_second")
        self.optimizer = build_optimizer(policy_optim(cfg.rl.optim, cfg.model), session.specs)
        self.source = RolloutSource(session, problems, self.optimizer.cfg)
        self._mini = make_mini_step(
            cfg.model,
            cfg.rl,
            cfg.replay,
            self.optimizer,
            dtype=session.dtype,
            mesh=session.mesh,
        )
        self._score = make_scorer(
            cfg.model,
            temperature=cfg.rl.sampling.temperature,
            dtype=session.dtype,
            mesh=session.mesh,
        )
        self.probe = DriftProbe(session, self._score, self.optimizer.cfg)
        self._reference = None
        self._mismatch: float | None = None
        self._decided: tuple[bool, bool] | None = None
        log.info("batch: %s", cfg.rl.describe())
        log.info("replay: %s", self.plan)

    def initial_state(self, params) -> TrainState:
        """A state around `params`, which also become the reference policy where one is kept."""
        if self.cfg.kl_coef > 0:
            self._reference = jax.tree.map(jnp.copy, params)
        return create(params, self.optimizer)

    def step(self, state: TrainState, index: int) -> tuple[TrainState, dict[str, Any]]:
        """One rollout batch: sample, verify, learn."""
        with goodput.during("generate"):
            gathered = self.source.gather(state, index)
        start = time.monotonic()
        state, learned = self._learn(state, index, gathered)
        seconds = time.monotonic() - start
        metrics = gathered.metrics | {"time/learn": seconds}
        tokens = gathered.rollout.loss_mask.sum()
        metrics["tokens_per_second"] = tokens / (gathered.seconds + seconds)
        return state, {k: (float(v), 1.0) for k, v in metrics.items()} | learned

    def _learn(
        self, state: TrainState, index: int, gathered: Gathered
    ) -> tuple[TrainState, dict[str, Any]]:
        cfg, rollout = self.cfg, gathered.rollout
        signal = learning_signal(rollout, cfg, gathered.keep)
        batch = make_batch(
            rollout.replace(loss_mask=signal.loss_mask),
            signal.advantages,
            bucket=cfg.length_bucket,
            use_routes=self.plan.recorder == "sampler",
            features=gathered.features,
        ).replace(shift=gathered.shift, lookahead=gathered.lookahead)
        batch = self._scored(state.params, batch, rollout, index)
        minis = split_mini_batches(
            batch,
            rollout.group_ids,
            signal.keep,
            mini_steps=cfg.mini_steps,
            micro_batch=cfg.micro_batch,
        )
        window = self.probe.window(state, batch, rollout, index)
        found, steps = [], minis * cfg.epochs
        for i, mini in enumerate(steps):
            if window and 0 < i == len(steps) - 1:
                window.measure("last", state.params, i)
            state, metrics = self._mini(state, put_batch(mini, self.session.mesh), i > 0)
            found.append(metrics)
        out = self._merge(hosts.to_host(found))
        if window and steps:
            window.measure("window", state.params, len(steps))
            out |= window.close()
        return state, out | {name: (value, 1.0) for name, value in signal.metrics.items()}

    def _scored(self, params, batch: LearnerBatch, rollout: Rollout, index: int) -> LearnerBatch:
        """Adds what passes under theta_old give: old and reference log-probs, routes, features."""
        cfg, replay, mesh = self.cfg, self.session.cfg.replay, self.session.mesh
        wanted, reason = scoring_decision(
            cfg.scoring_pass, self.plan, self._mismatch, cfg.mismatch_limit
        )
        decided = (wanted, self._mismatch is None)
        if decided != self._decided:
            log.info("scoring pass %s: %s", "on" if wanted else "off", reason)
            self._decided = decided
        recompute = self.plan.features > 0 and replay.features == "recomputed"
        split = None
        if wanted or recompute or self._reference is not None:
            split = put_batch(split_micro(batch, cfg.micro_batch), mesh)
        if wanted or recompute:
            places = self._places(rollout, batch, index) if recompute else None
            scores = self._score(params, split, places)
            if recompute:
                batch = batch.replace(features=scores.features)
            if wanted:
                batch = batch.replace(old_logprobs=hosts.to_host(scores.logprobs))
            if self.plan.recorder == "scoring":
                batch = batch.replace(routes=hosts.to_host(scores.routes))
        if self._reference is not None:
            # The reference routes live: it is a policy of its own.
            scores = self._score(self._reference, split.replace(routes=None, features=None))
            batch = batch.replace(ref_logprobs=hosts.to_host(scores.logprobs))
        return batch

    def _places(self, rollout: Rollout, batch: LearnerBatch, index: int):
        cfg, replay = self.cfg, self.session.cfg.replay
        places, mask = feature_places(
            rollout.prompt_lengths,
            rollout.lengths,
            self.plan.features,
            tokens=replay.tokens,
            seed=index * cfg.rows,
            max_length=batch.tokens.shape[1],
        )
        split = lambda x: jnp.asarray(x).reshape(-1, cfg.micro_batch, x.shape[1])
        return split(places), split(mask)

    def _merge(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        """Metrics of the step, and of each mini-step under its own name."""
        if not found:
            return {}
        total, out = dict(found[0]), {}
        for other in found[1:]:
            total = merge(total, other)
        for i, metrics in enumerate(found, start=1):
            by_layer = ("zero_deviation/", "agreement/")
            short = {
                k: v for k, v in metrics.items() if "/layer_" not in k or k.startswith(by_layer)
            }
            out |= {f"mini_{i}/{k}": v for k, v in short.items()}
        first = found[0]
        for key in ("abs", "abs_max", "k1", "k3"):
            out[f"mismatch/{key}"] = first[f"behavior/{key}"]
        value, weight = first["behavior/abs"]
        self._mismatch = float(value) / max(float(weight), 1.0)
        return out | total

    def evaluate(self, state: TrainState, index: int) -> dict[str, float]:
        """Held-out figures, where there is an evaluator."""
        return {} if self.evaluator is None else self.evaluator.quick(state.params, index)

    def consumed(self, index: int) -> list[str]:
        """Ids of the problems that step `index`, the last one, learned from."""
        return self.source.consumed(index)

    def filtered(self, index: int) -> list[str]:
        """Ids of those that its dynamic sampling passed over."""
        return self.source.filtered(index)

    def open_journal(self, workdir: epath.Path) -> None:
        """Batches are in `workdir`/journal from here on, before they are learned from."""
        self.source.open_journal(workdir)

    def trim_journal(self, position: int) -> None:
        """Removes journalled batches before `position`."""
        self.source.trim_journal(position)

    def memory(self) -> dict[str, Any]:
        """The mismatch measured last: the next step decides by it whether to score; and where
        the next batch begins in the order of prompts."""
        return {"mismatch": self._mismatch, "source": self.source.memory()}

    def remember(self, memory: dict[str, Any]) -> None:
        """Takes back what `memory` gave."""
        self._mismatch = memory["mismatch"]
        self.source.remember(memory["source"])
