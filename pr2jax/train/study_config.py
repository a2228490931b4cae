"""Configuration of what runs or uses other runs: studies, plans, sampling from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pr2jax.core.config import ConfigError
from pr2jax.sampler.types import SamplingParams
from pr2jax.tasks.base import TaskConfig


@dataclass(frozen=True)
class GenerateConfig:
    """Sampling from a checkpoint to JSONL: prompts from a text file (a line each), or a task.

    Attributes:
      samples: of each prompt.
      output: the file's name in the workdir.
    """

    prompts: str = ""
    task: TaskConfig | None = None
    samples: int = 1
    output: str = "samples.jsonl"
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        if self.prompts and self.task is not None:
            raise ConfigError("prompts: give a file of prompts or a task, not both")
        if self.samples < 1:
            raise ConfigError(f"samples: must be at least 1, got {self.samples}")


@dataclass(frozen=True)
class RegimeConfig:
    """How hard problems are for a checkpoint (train/regimes.py): by their avg@samples, the mean
    score of so many answers each. Those with low <= avg@samples <= high are the regime's."""

    samples: int = 16
    low: float = 0.0
    high: float = 1.0

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        if self.samples < 1:
            raise ConfigError(f"samples: must be at least 1, got {self.samples}")
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise ConfigError(f"low: 0 <= low={self.low} <= high={self.high} <= 1 must hold")


# Of the IsoCompute study; extremely hard is pass@128 = 0.
REGIMES = {
    "easy": RegimeConfig(16, 0.3, 0.6),
    "hard": RegimeConfig(16, 0.0, 0.0625),
    "extremely_hard": RegimeConfig(128, 0.0, 0.0),
}


@dataclass(frozen=True)
class CellConfig:
    """One setting of a study, run once for each of the study's first `seeds` seeds.

    Attributes:
      name: of the cell, in tables and folders.
      group: cells of a group stand in one table and one figure.
      overrides: "dotted.key=value" each, values as JSON or plain text.
      against: the cell of the same group that it is compared with, seed by seed (empty: none).
      priority: smaller ones run first.
    """

    name: str
    group: str = ""
    overrides: tuple[str, ...] = ()
    seeds: int = 1
    against: str = ""
    priority: int = 0


@dataclass(frozen=True)
class StudyConfig:
    """Many runs of this configuration (train/study.py).

    Attributes:
      kind: what the runs are of and what is reported: `replay` (mode rl; train/study_report.py),
        `growth` (mode pretrain; train/growth_report.py), `law` (mode pretrain;
        train/law_report.py) or `budget` (mode rl; train/budget_report.py).
      cells: what differs between the runs.
      warmup: start all cells of a seed from one SFT run of that seed, else from `init_from`. Kind
        `budget` has one base model: the SFT run of the first seed, for all.
      workers: runs at a time.
      cores_per_worker: cores that a run is pinned to (0: not pinned).
      steady_from: rollout batches at the start that figures leave out.
      report_every: finished cells between two reports.
      runs_csv: kinds `law`, `budget`: a table of runs that are there already, in place of cells
        (columns: scaling/fitting.py, scaling/sampling_runs.py).
      held_out: kind `law`: share of the runs, those with most compute, that the law is judged by.
      resamples: kinds `law`, `budget`: refits that the law's intervals come from.
    """

    cells: tuple[CellConfig, ...] = ()
    kind: Literal["replay", "growth", "law", "budget"] = "replay"
    warmup: bool = True
    workers: int = 1
    cores_per_worker: int = 1
    steady_from: int = 0
    report_every: int = 5
    runs_csv: str = ""
    held_out: float = 0.2
    resamples: int = 100

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        for key, least in (("workers", 1), ("cores_per_worker", 0), ("report_every", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key}: must be >= {least}, got {getattr(self, key)}")
        if self.steady_from < 0:
            raise ConfigError(f"steady_from: must be >= 0, got {self.steady_from}")
        if self.kind != "replay" and self.steady_from:
            raise ConfigError("steady_from: only kind 'replay' has it")
        if self.kind in ("growth", "law") and self.warmup:
            raise ConfigError("warmup: only kinds 'replay' and 'budget' have one")
        if self.runs_csv and (self.kind not in ("law", "budget") or self.cells):
            raise ConfigError(
                "runs_csv: only kinds 'law' and 'budget' read it, and in place of cells"
            )
        if not 0.0 < self.held_out < 1.0:
            raise ConfigError(f"held_out: must lie between 0 and 1, got {self.held_out}")
        if self.resamples < 2:
            raise ConfigError(f"resamples: must be >= 2, got {self.resamples}")
        names = {(cell.group, cell.name) for cell in self.cells}
        for i, cell in enumerate(self.cells):
            if cell.seeds < 1:
                raise ConfigError(f"cells[{i}].seeds: must be >= 1, got {cell.seeds}")
            if cell.against and (cell.group, cell.against) not in names:
                raise ConfigError(
                    f"cells[{i}].against: group {cell.group!r} has no cell {cell.against!r}"
                )


@dataclass(frozen=True)
class PlanConfig:
    """What mode `plan` is asked (train/plan.py).

    Attributes:
      compute: what there is, in `unit`.
      unit: rollouts (responses), or sampled tokens.
      tokens_per_rollout: for unit `tokens` (0: as the sweep of `fit` measured).
      fit: a sweep's folder or its law.json; empty takes the published law.
      regime: how hard the problems are for the base model (`REGIMES`; `mixed`: of all kinds).
        Empty: easy, or what the sweep's were.
      prompts: B_p (0: the law's; of the published ones 32, and 64 for problems that are not easy).
    """

    compute: float = 1e6
    unit: Literal["rollouts", "tokens"] = "rollouts"
    tokens_per_rollout: float = 0.0
    fit: str = ""
    regime: Literal["", "easy", "hard", "extremely_hard", "mixed"] = ""
    prompts: int = 0

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        if not 0.0 < self.compute < float("inf"):
            raise ConfigError(f"compute: must be above 0, got {self.compute}")
        for key in ("tokens_per_rollout", "prompts"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key}: must be >= 0, got {getattr(self, key)}")
        if self.tokens_per_rollout and self.unit != "tokens":
            raise ConfigError("tokens_per_rollout: only unit 'tokens' reads it")
