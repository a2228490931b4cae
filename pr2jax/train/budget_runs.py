"""The runs of a sweep of the sampling budget, out of what they wrote, or out of a table."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pr2jax.core.config import ConfigError
from pr2jax.core.metrics import read_jsonl
from pr2jax.scaling.sampling_runs import COLUMNS, SweepRun, read_runs
from pr2jax.train.config import Config

if TYPE_CHECKING:
    from pr2jax.train.study import Job

RUNS_CSV = "runs.csv"
EXTRA = ("best", "worst", "tokens")
_BUDGETS = 4  # nested ones that tables show: halves of the largest
_WINDOW = 0.75  # a figure at C is the mean of the evaluations in (0.75 C, C]


@dataclasses.dataclass(frozen=True)
class Course:
    """A run's evaluations: `run` (avg@4), and best@4, worst@4 and tokens a rollout beside them
    (NaN where they were not measured)."""

    run: SweepRun
    best: np.ndarray
    worst: np.ndarray
    tokens: np.ndarray

    def at(self, values: np.ndarray, compute: float) -> float:
        """Mean of `values` over the evaluations up to a budget; NaN where there is none."""
        there = (self.run.compute > _WINDOW * compute) & (self.run.compute <= compute)
        return float(values[there].mean()) if there.any() else float("nan")


def course(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Course:
    """A run's course out of its configuration and its metrics.

    Raises ConfigError where its evaluations lack best@k and worst@k.
    """
    rl, k = config["rl"], config["eval"]["quick_samples"]
    keys = [f"eval/{name}@{k}" for name in ("avg", "best", "worst")]
    found = [row for row in rows if keys[0] in row]
    if not found or keys[1] not in found[0]:
        raise ConfigError(f"eval.ks: must hold eval.quick_samples={k}; {keys[1]} was not measured")
    tokens = [row["response_length"] for row in rows if "response_length" in row]
    each = rl["prompts_per_batch"] * rl["samples_per_prompt"]
    compute = np.array([row["step"] * each for row in found], np.float64)
    columns = [np.array([row[key] for row in found], np.float64) for key in keys]
    run = SweepRun(
        rl["samples_per_prompt"], rl["prompts_per_batch"], config["seed"], compute, columns[0]
    )
    mean = float(np.mean(tokens)) if tokens else float("nan")
    return Course(run, columns[1], columns[2], np.full(len(found), mean))


def gather(cfg: Config, root: Path, jobs: Sequence[Job]) -> list[Course]:
    """The runs so far: of `study.runs_csv`, or of the sweep (written to runs.csv).

    Raises ConfigError("study.runs_csv: ...").
    """
    if cfg.study.runs_csv:
        try:
            return read_courses(cfg.study.runs_csv)
        except ConfigError as error:
            raise ConfigError(f"study.runs_csv: {error}") from None
    done = [job for job in jobs if job.cell is not None and job.done]
    courses = [course(job.config, read_jsonl(job.folder)) for job in done]
    with open(root / RUNS_CSV, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow([*COLUMNS, *EXTRA])
        for c in courses:
            for i, (compute, score) in enumerate(zip(c.run.compute, c.run.score, strict=True)):
                rest = [f"{values[i]:.6g}" for values in (c.best, c.worst, c.tokens)]
                row = [c.run.n, c.run.prompts, c.run.seed, int(compute), f"{score:.6g}", *rest]
                out.writerow(row)
    return courses


def read_courses(path: str | Path) -> list[Course]:
    """Runs of a table (scaling/sampling_runs.py), with best, worst and tokens where it has them."""
    runs = read_runs(path)
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [{k.strip(): v for k, v in row.items()} for row in csv.DictReader(file)]
    courses = []
    for run in runs:
        key = (run.n, run.prompts, run.seed)
        own = [r for r in rows if tuple(int(float(r[c])) for c in COLUMNS[:3]) == key]
        own.sort(key=lambda row: float(row["compute"]))
        rest = [np.array([float(row.get(c) or "nan") for row in own]) for c in EXTRA]
        courses.append(Course(run, *rest))
    return courses


def recipe(jobs: Sequence[Job]) -> dict[str, float] | None:
    """The learning rate of the cells and the rows that it is for; None where it does not go with
    the square root of the rows."""
    cells = [job.config["rl"] for job in jobs if job.cell is not None]
    rows = [rl["prompts_per_batch"] * rl["samples_per_prompt"] for rl in cells]
    rates = [rl["optim"]["learning_rate"] for rl in cells]
    scale = [rate / np.sqrt(row) for rate, row in zip(rates, rows, strict=True)]
    if not scale or max(scale) > 1.01 * min(scale):
        return None
    return {"learning_rate": rates[0], "rows": rows[0]}


def budgets(courses: Sequence[Course]) -> list[float]:
    """Nested budgets, falling by halves from the largest that every run reached."""
    most = min(c.run.compute.max() for c in courses)
    return [most / 2**i for i in range(_BUDGETS)][::-1]
