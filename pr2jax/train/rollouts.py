"""The sampling half of an RL step: prompts by position, responses, verdicts."""

from __future__ import annotations

import dataclasses
import time

import jax
import numpy as np
from jaxtyping import Array, Float

from pr2jax.core.config import ConfigError
from pr2jax.core.optim import OptimConfig
from pr2jax.core.state import TrainState
from pr2jax.data.packing import BatchOrder
from pr2jax.evaluation.runner import score_rollout
from pr2jax.models.predictor import RouterFeatures
from pr2jax.replay.modes import lookahead_shift, plan, selection_shift
from pr2jax.replay.routes import save_routes
from pr2jax.sampler.types import FINISH_STOP, Rollout
from pr2jax.tasks.base import Problem
from pr2jax.tasks.sandbox import VerifierPool
from pr2jax.train.session import Session


@dataclasses.dataclass(frozen=True)
class Gathered:
    """A scored rollout batch and what the learner must know of how it was made.

    Attributes:
      rollout: rewards, reasons and prompt ids (indices of the training problems) filled in.
      features: router features that the sampler recorded, or None.
      shift, lookahead: what was added to the routers' selection logits, and the part of it that
        is not the predictor's; [L, D, E] or None.
      metrics: plain figures of the batch.
      seconds: wall time of gathering it.
    """

    rollout: Rollout
    features: RouterFeatures | None
    shift: Float[Array, "L D E"] | None
    lookahead: Float[Array, "L D E"] | None
    metrics: dict[str, float]
    seconds: float


class RolloutSource:
    """Rollout batches by position, scored.

    Metrics of a batch: `reward` (mean score), `solved` (share of full scores),
    `response_length`, `stopped` (share that ended by itself), `verifier_failures`,
    `time/sample`, `time/verify`.
    """

    def __init__(self, session: Session, problems: list[Problem], optim: OptimConfig):
        """`optim`: the policy's optimizer settings, which lookahead reads.

        Raises ConfigError where the problems do not fill a batch, or a prompt does not fit.
        """
        cfg = session.cfg
        self.session, self.problems = session, problems
        self.cfg, self.plan = cfg.rl, plan(cfg.replay)
        if len(problems) < cfg.rl.prompts_per_batch:
            raise ConfigError(
                f"rl_task: {len(problems)} training problems do not fill a batch of "
                f"rl.prompts_per_batch={cfg.rl.prompts_per_batch}"
            )
        self.prompts = [session.encode(p) for p in problems]
        self.order = BatchOrder(len(problems), cfg.rl.prompts_per_batch, cfg.seed)

        def shifts(params, opt_state):
            old = (self.plan, params, cfg.model, optim, opt_state)
            return selection_shift(*old), lookahead_shift(*old)

        self._shifts = jax.jit(shifts)

    def gather(self, state: TrainState, index: int) -> Gathered:
        """The batch of position `index`, sampled with `state` and scored."""
        start = time.monotonic()
        chosen = self.order.at(index)
        shift, lookahead = self._shifts(state.params, state.opt_state)
        rollout, features = self._sample(state, index, chosen, shift)
        sampled = time.monotonic()
        rollout, failures = self._verify(rollout, chosen)
        verified = time.monotonic()
        if self.session.cfg.loop.save_routes and rollout.routes is not None:
            self._save_routes(rollout, index, chosen)
        metrics = _rollout_metrics(rollout) | {
            "verifier_failures": failures,
            "time/sample": sampled - start,
            "time/verify": verified - sampled,
        }
        seconds = time.monotonic() - start
        return Gathered(rollout, features, shift, lookahead, metrics, seconds)

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
