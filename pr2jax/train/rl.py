"""GRPO with routing replay: sample, verify, learn.

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
import numpy as np
from jaxtyping import Array

from pr2jax.core.config import ConfigError
from pr2jax.core.metrics import merge
from pr2jax.core.optim import build_optimizer
from pr2jax.core.state import TrainState, create
from pr2jax.data.packing import BatchOrder
from pr2jax.evaluation.runner import score_rollout
from pr2jax.models.predictor import RouterFeatures
from pr2jax.replay.modes import lookahead_shift, plan, selection_shift
from pr2jax.replay.routes import save_routes
from pr2jax.rl.advantages import group_advantages, zero_variance
from pr2jax.rl.batch import (
    feature_places,
    make_batch,
    put_batch,
    split_micro,
    split_mini_batches,
)
from pr2jax.rl.scoring import make_scorer, scoring_decision
from pr2jax.rl.types import LearnerBatch, policy_optim
from pr2jax.rl.update import make_mini_step
from pr2jax.sampler.types import FINISH_STOP, Rollout
from pr2jax.tasks.base import Problem
from pr2jax.tasks.sandbox import VerifierPool
from pr2jax.train.evaluator import Evaluator
from pr2jax.train.session import Session

log = logging.getLogger("pr2jax")


class RLTrainer:
    """RL as the loop sees it: one step is one rollout batch and its mini-steps.

    Metrics of a step: `reward` (mean score), `solved` (share of full scores), `response_length`,
    `stopped` (share that ended by itself), `kept_groups` (share with a signal),
    `verifier_failures`, `tokens_per_second`, `time/*`; every learner metric over the whole
    step; and under `mini_I/NAME` those of mini-step I (by layer: zero deviation and agreement).
    """

    def __init__(self, session: Session, problems: list[Problem], evaluator: Evaluator | None):
        cfg = session.cfg
        self.name, self.session, self.evaluator = "rl", session, evaluator
        self.cfg, self.plan = cfg.rl, plan(cfg.replay)
        self.steps, self.eval_every = cfg.rl.steps, cfg.rl.eval_every
        self.max_skipped_in_row = cfg.rl.max_skipped_in_row
        self.console = ("reward", "zero_deviation", "tokens_per_second")
        self.problems = problems
        if len(problems) < cfg.rl.prompts_per_batch:
            raise ConfigError(
                f"rl_task: {len(problems)} training problems do not fill a batch of "
                f"rl.prompts_per_batch={cfg.rl.prompts_per_batch}"
            )
        self.prompts = [session.encode(p) for p in problems]
        self.order = BatchOrder(len(problems), cfg.rl.prompts_per_batch, cfg.seed)
        self.optimizer = build_optimizer(policy_optim(cfg.rl.optim, cfg.model), session.specs)
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

        def shifts(params, opt_state):
            old = (self.plan, params, cfg.model, self.optimizer.cfg, opt_state)
            return selection_shift(*old), lookahead_shift(*old)

        self._shifts = jax.jit(shifts)
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
        times = {"start": time.monotonic()}
        chosen = self.order.at(index)
        shift, lookahead = self._shifts(state.params, state.opt_state)
        rollout, features = self._sample(state, index, chosen, shift)
        times["sample"] = time.monotonic()
        rollout, failures = self._verify(rollout, chosen)
        times["verify"] = time.monotonic()
        known = {"shift": shift, "lookahead": lookahead}
        state, learned = self._learn(state, index, rollout, features, known)
        times["learn"] = time.monotonic()
        if self.session.cfg.loop.save_routes and rollout.routes is not None:
            self._save_routes(rollout, index, chosen)
        metrics = _rollout_metrics(rollout) | {"verifier_failures": failures} | _times(times)
        metrics["tokens_per_second"] = rollout.loss_mask.sum() / (times["learn"] - times["start"])
        return state, {k: (float(v), 1.0) for k, v in metrics.items()} | learned

    def _sample(
        self, state: TrainState, index: int, chosen: np.ndarray, shift: Array | None
    ) -> tuple[Rollout, RouterFeatures | None]:
        cfg = self.cfg
        recorded = self.session.cfg.replay.features == "recorded"
        rollout, features = self.session.sampler.rollout(
            [self.prompts[i] for i in chosen],
            cfg.samples_per_prompt,
            cfg.sampling,
            params=state.params,
            key=self.session.key("rollout"),
            request_offset=index * cfg.rows,
            policy_version=index * cfg.mini_steps,
            shift=shift,
            feature_tokens=self.plan.features if recorded else 0,
        )
        ids = np.repeat(chosen, cfg.samples_per_prompt).astype(np.int32)
        return rollout.replace(prompt_ids=ids), features

    def _verify(self, rollout: Rollout, chosen: np.ndarray) -> tuple[Rollout, int]:
        pool = self.session.pool
        before = _failures(pool)
        problems = [self.problems[i] for i in chosen]
        n = self.cfg.samples_per_prompt
        scored, _ = score_rollout(rollout, problems, n, self.session.tokenizer, pool)
        return scored, _failures(pool) - before

    def _learn(
        self,
        state: TrainState,
        index: int,
        rollout: Rollout,
        features: RouterFeatures | None,
        known: dict[str, Array | None],
    ) -> tuple[TrainState, dict[str, Any]]:
        cfg = self.cfg
        batch = make_batch(
            rollout,
            group_advantages(rollout.rewards, rollout.group_ids),
            bucket=cfg.length_bucket,
            use_routes=self.plan.recorder == "sampler",
            features=features,
        ).replace(**known)
        batch = self._scored(state.params, batch, rollout, index)
        silent = zero_variance(rollout.rewards, rollout.group_ids)
        keep = ~silent if cfg.filter_zero_variance else np.ones_like(silent)
        minis = split_mini_batches(
            batch,
            rollout.group_ids,
            keep,
            mini_steps=cfg.mini_steps,
            micro_batch=cfg.micro_batch,
        )
        found = []
        for i, mini in enumerate(minis):
            state, metrics = self._mini(state, put_batch(mini, self.session.mesh), i > 0)
            found.append(metrics)
        out = self._merge(jax.device_get(found))
        out["kept_groups"] = (float((~silent).mean()), 1.0)
        return state, out

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
                batch = batch.replace(old_logprobs=np.asarray(scores.logprobs))
            if self.plan.recorder == "scoring":
                batch = batch.replace(routes=np.asarray(scores.routes))
        if self._reference is not None:
            # The reference routes live: it is a policy of its own.
            scores = self._score(self._reference, split.replace(routes=None, features=None))
            batch = batch.replace(ref_logprobs=np.asarray(scores.logprobs))
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

    def _save_routes(self, rollout: Rollout, index: int, chosen: np.ndarray) -> None:
        cfg = self.session.cfg
        meta = {
            "step": index,
            "mode": cfg.replay.mode,
            "num_experts": cfg.model.moe.num_experts,
            "prompt_lengths": rollout.prompt_lengths.tolist(),
            "lengths": rollout.lengths.tolist(),
            "problems": [self.problems[i].id for i in chosen],
        }
        save_routes(self.session.workdir / "routes" / f"step_{index:06d}", rollout.routes, meta)

    def evaluate(self, state: TrainState, index: int) -> dict[str, float]:
        """Held-out figures, where there is an evaluator."""
        return {} if self.evaluator is None else self.evaluator.quick(state.params, index)

    def memory(self) -> dict[str, Any]:
        """The mismatch measured last: the next step decides by it whether to score."""
        return {"mismatch": self._mismatch}

    def remember(self, memory: dict[str, Any]) -> None:
        """Takes back what `memory` gave."""
        self._mismatch = memory["mismatch"]


def _failures(pool: VerifierPool) -> int:
    """Responses so far that a verifier could not judge within its limits."""
    return sum(pool.stats[kind] for kind in ("timeouts", "crashes", "memory", "errors"))


def _rollout_metrics(rollout: Rollout) -> dict[str, float]:
    return {
        "reward": rollout.rewards.mean(),
        "solved": (rollout.rewards >= 1.0).mean(),
        "response_length": (rollout.lengths - rollout.prompt_lengths).mean(),
        "stopped": (rollout.finish == FINISH_STOP).mean(),
    }


def _times(marks: dict[str, float]) -> dict[str, float]:
    """Seconds of each phase from the moments at which they ended."""
    names, moments = list(marks), list(marks.values())
    return {f"time/{n}": b - a for n, a, b in zip(names[1:], moments, moments[1:], strict=False)}
