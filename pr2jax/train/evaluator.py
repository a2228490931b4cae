"""Held-out evaluation of a policy: quick figures while training, full ones at the ends."""

from __future__ import annotations

import dataclasses
import logging

from pr2jax.evaluation.runner import EvalResult, evaluate
from pr2jax.tasks.base import Problem
from pr2jax.train.session import Session

log = logging.getLogger("pr2jax")


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Samples answers to fixed problems and scores them; the same draws at every call."""

    session: Session
    problems: list[Problem]

    def full(self, params) -> EvalResult:
        """All problems, eval.samples each; pass@1 besides eval.ks."""
        cfg = self.session.cfg.eval
        return self._evaluate(params, self.problems, cfg.samples, cfg.ks)

    def quick(self, params, index: int) -> dict[str, float]:
        """eval.quick_problems and eval.quick_samples; {"eval/NAME": value}."""
        cfg = self.session.cfg.eval
        chosen = self.problems[: cfg.quick_problems or None]
        ks = [k for k in cfg.ks if k <= cfg.quick_samples]
        result = self._evaluate(params, chosen, cfg.quick_samples, ks)
        shown = ", ".join(f"{name} {value.mean:.3f}" for name, value in result.metrics.items())
        log.info("step %d, held out: %s", index, shown)
        return result.flat("eval/")

    def _evaluate(self, params, problems, samples: int, ks) -> EvalResult:
        session = self.session
        return evaluate(
            session.sampler,
            params,
            session.tokenizer,
            problems,
            session.pool,
            session.cfg.eval.sampling,
            samples,
            sorted({1, *ks}),  # reports and the best checkpoint go by pass@1
            session.key("evaluate"),
        )
