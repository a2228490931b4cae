"""Runs of a sweep of the sampling budget, and their points that a law is fitted to; float64."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from pr2jax.core.config import ConfigError
from pr2jax.core.fetch import fetched

COLUMNS = ("n", "prompts", "seed", "compute", "score")
BUCKETS_PER_DECADE = 8


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One trajectory: n rollouts a problem, B_p = `prompts` problems a batch, a seed.

    `compute`: rollouts so far, rising; 0 is the base model. `score`: validation avg@4 there.
    Raises ConfigError for what is none.
    """

    n: int
    prompts: int
    seed: int
    compute: Float[np.ndarray, " T"]
    score: Float[np.ndarray, " T"]

    def __post_init__(self) -> None:
        for key in ("compute", "score"):
            object.__setattr__(self, key, np.asarray(getattr(self, key), np.float64))
        who = f"run n={self.n}, B_p={self.prompts}, seed {self.seed}"
        if self.n < 2 or self.prompts < 1:
            raise ConfigError(f"{who}: n must be >= 2 and B_p >= 1")
        if self.compute.ndim != 1 or self.compute.shape != self.score.shape:
            raise ConfigError(f"{who}: {self.score.shape} scores at {self.compute.shape} computes")
        if not np.all(np.isfinite(self.compute)) or np.any(np.diff(self.compute) <= 0):
            raise ConfigError(f"{who}: compute must be finite and rise")
        if len(self.compute) and self.compute[0] < 0:
            raise ConfigError(f"{who}: compute cannot be below 0")
        if not np.all((self.score >= 0) & (self.score <= 1)):
            raise ConfigError(f"{who}: scores must lie in [0, 1]")

    def bucketed(
        self, per_decade: int = BUCKETS_PER_DECADE
    ) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
        """(log10 C, score): means over buckets of log10 C; C = 0, at -inf, is one of its own."""
        there = self.compute > 0
        log = np.log10(self.compute[there])
        place = np.floor(log * per_decade).astype(int)
        x = [-np.inf] if not there.all() else []
        y = [self.score[0]] if not there.all() else []
        for bucket in np.unique(place):
            inside = place == bucket
            x.append(log[inside].mean())
            y.append(self.score[there][inside].mean())
        return np.array(x, np.float64), np.array(y, np.float64)

    def records(
        self, per_decade: int = BUCKETS_PER_DECADE
    ) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
        """The buckets that are above all before them (the first always is), and the record as it
        stands at the last: without it a run that has levelled off would say nothing of where it
        went, and the curve through its records would go on rising."""
        x, y = self.bucketed(per_decade)
        best = np.maximum.accumulate(y)
        kept = np.concatenate([[True], y[1:] > best[:-1]])[: len(y)]
        kept[-1:] = True
        return x[kept], best[kept]


def read_runs(path: str | Path) -> list[SweepRun]:
    """Runs of a table with the columns n, prompts, seed, compute, score (others are ignored), a
    row an evaluation. Raises ConfigError naming file, line and column."""
    try:
        with open(fetched(path), newline="", encoding="utf-8-sig") as file:
            rows = list(_rows(path, csv.reader(file)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read as a table ({error})") from None
    found: dict[tuple[int, int, int], list[tuple[float, float]]] = {}
    for n, prompts, seed, compute, score in rows:
        found.setdefault((int(n), int(prompts), int(seed)), []).append((compute, score))
    runs = []
    for key, points in found.items():
        compute, score = np.array(sorted(points)).T
        try:
            runs.append(SweepRun(*key, compute, score))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    return runs


def _rows(path: str | Path, reader: Iterable[list[str]]) -> Iterable[list[float]]:
    header = [name.strip() for name in next(reader, [])]
    for name in COLUMNS:
        if header.count(name) != 1:
            raise ConfigError(f"{path}: line 1, column {name}: not once in {header}")
    places = [header.index(name) for name in COLUMNS]
    for cells in reader:
        where = f"{path}: line {reader.line_num}"
        if len(cells) != len(header):
            raise ConfigError(f"{where}: {len(cells)} cells for {len(header)} names")
        row = []
        for name, place in zip(COLUMNS, places, strict=True):
            try:
                row.append(float(cells[place]))
            except ValueError:
                raise ConfigError(
                    f"{where}, column {name}: {cells[place]!r} is no number"
                ) from None
            whole = name in ("n", "prompts", "seed")
            if not math.isfinite(row[-1]) or (whole and row[-1] != int(row[-1])):
                raise ConfigError(f"{where}, column {name}: {cells[place]!r} cannot be used")
        yield row
