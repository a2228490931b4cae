"""When to grow: stages of a run and their budgets (EMO, arXiv 2605.13247).

Budgets come from a scaling law (the stage that ends with E experts ends where that pool would be
compute-optimal, all stretched to the run's length), from shares, or by hand. Growth with
`masked_copy` cuts a stage in two phases: newborns masked, then everyone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pr2jax.core.config import ConfigError
from pr2jax.emo.expansion import GrowthConfig, grown_config, unmasked_config
from pr2jax.models.config import ModelConfig
from pr2jax.models.flops import active_params
from pr2jax.scaling.laws import JointMoELaw, stage_shares


@dataclass(frozen=True)
class EMOConfig:
    """The stages of a run that grows its experts.

    Attributes:
      experts: of each stage, rising, the first those of the configured model (empty: no growth).
      budget: where the stages' lengths come from: `law`, `shares` (of the run's steps, adding up
        to 1) or `steps` (of each stage, adding up to the run's).
      shares, steps: of each stage, where the budget is theirs.
      law: the joint MoE law; its expert count is E / k.
      law_params: N in the law (0: the model's active parameters without embeddings).
      growth: how newborns start.
      rewarmup_steps: over which the learning rate rises again after growth.
      unmask_steps: after growth by `masked_copy`, when newborns begin to take part.
      measure_steps: steps of each stage's model that the plan times before the run (0: none).
    """

    experts: tuple[int, ...] = ()
    budget: Literal["law", "shares", "steps"] = "law"
    shares: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    law: JointMoELaw = field(default_factory=JointMoELaw)
    law_params: float = 0.0
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    rewarmup_steps: int = 500
    unmask_steps: int = 0
    measure_steps: int = 3

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        rising = all(a < b for a, b in zip(self.experts, self.experts[1:], strict=False))
        if not rising or (self.experts and self.experts[0] < 1):
            raise ConfigError(f"experts: {self.experts} must rise from stage to stage")
        for key in ("shares", "steps"):
            given = getattr(self, key)
            if (self.budget == key) != bool(given):
                need = "needs them" if self.budget == key else f"is {self.budget!r}, which has none"
                raise ConfigError(f"{key}: budget {need}")
            if given and (len(given) != len(self.experts) or min(given) <= 0):
                raise ConfigError(
                    f"{key}: {given} must give each of the {len(self.experts)} stages something"
                )
        if self.shares and abs(sum(self.shares) - 1.0) > 1e-3:
            raise ConfigError(f"shares: {self.shares} add up to {sum(self.shares):.4f}, not 1")
        for key in ("law_params", "rewarmup_steps", "unmask_steps", "measure_steps"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key}: must be >= 0, got {getattr(self, key)}")
        if (self.growth.init == "masked_copy") != (self.unmask_steps > 0):
            raise ConfigError(
                "unmask_steps: growth.init 'masked_copy' needs it, and it alone can use it"
            )


@dataclass(frozen=True)
class Phase:
    """A part of the run with one model: from step `start` to `stop`; `stage` counts pools.

    `grows` says whether it begins with newborns, `unmasks` whether its newborns were masked.
    """

    index: int
    stage: int
    model: ModelConfig
    start: int
    stop: int
    grows: bool
    unmasks: bool


def shares(cfg: EMOConfig, model: ModelConfig) -> np.ndarray:
    """Share of the run's steps of each stage. Raises ConfigError where a law gives none."""
    if cfg.budget == "shares":
        return np.array(cfg.shares) / sum(cfg.shares)
    if cfg.budget == "steps":
        return np.array(cfg.steps) / sum(cfg.steps)
    pools = np.array(cfg.experts) / model.moe.top_k
    return stage_shares(cfg.law, cfg.law_params or law_params(model), pools)


def law_params(model: ModelConfig) -> float:
    """N of the law: active parameters without the embedding and the head."""
    tables = model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)
    return float(active_params(model) - tables)


def boundaries(cfg: EMOConfig, model: ModelConfig, steps: int) -> list[int]:
    """The step at which each stage ends; the last is `steps`.

    Raises ConfigError where given steps do not add up, or a stage would have none.
    """
    if cfg.budget == "steps" and sum(cfg.steps) != steps:
        raise ConfigError(f"steps: {cfg.steps} add up to {sum(cfg.steps)}; the run has {steps}")
    ends = np.rint(np.cumsum(shares(cfg, model)) * steps).astype(int).tolist()
    lengths = np.diff([0, *ends])
    if lengths.min() < 1:
        raise ConfigError(
            f"experts: of {steps} steps, the stage of {cfg.experts[int(lengths.argmin())]} experts "
            "would have none"
        )
    return ends


def plan_phases(cfg: EMOConfig, model: ModelConfig, steps: int) -> list[Phase]:
    """The run's phases, in order; `model` is that of the first stage.

    Raises ConfigError("key: why") for stages that do not fit the model or the run.
    """
    if model.moe is None or model.moe.num_experts != cfg.experts[0]:
        has = 0 if model.moe is None else model.moe.num_experts
        raise ConfigError(f"experts: begin with {cfg.experts[0]}, and the model has {has}")
    phases: list[Phase] = []

    def add(stage, model, start, stop, grows=False, unmasks=False):
        phases.append(Phase(len(phases), stage, model, start, stop, grows, unmasks))

    start = 0
    for stage, stop in enumerate(boundaries(cfg, model, steps)):
        if stage == 0:
            add(stage, model, start, stop)
        elif cfg.growth.init != "masked_copy":
            model = grown_config(model, cfg.experts[stage])
            add(stage, model, start, stop, grows=True)
        else:
            unmask = start + cfg.unmask_steps
            if unmask >= stop:
                raise ConfigError(
                    f"unmask_steps: {cfg.unmask_steps} leave nothing of the {stop - start} steps "
                    f"of the stage of {cfg.experts[stage]} experts"
                )
            masked = grown_config(model, cfg.experts[stage], masked=True)
            add(stage, masked, start, unmask, grows=True)
            model = unmasked_config(masked)
            add(stage, model, unmask, stop, unmasks=True)
        start = stop
    return phases


def growth_steps(phases: list[Phase]) -> tuple[int, ...]:
    """Steps at which the pool grows: where the learning rate is warmed up again."""
    return tuple(phase.start for phase in phases if phase.grows)


def with_schedule(optim, phases: list[Phase], rewarmup_steps: int):
    """`optim` (an OptimConfig) with the warm-ups of every growth."""
    return dataclasses.replace(
        optim, rewarmup_at=growth_steps(phases), rewarmup_steps=rewarmup_steps
    )
