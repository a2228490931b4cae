"""n*(C) out of a sweep: record points, a curve for each n, their upper envelope, its sigmoid.

As the IsoCompute study does it: validation scores are bucketed over compute, each run's
record-breaking points are kept, a monotone sigmoid R(C) is fitted for each n, the upper envelope
of the curves says n*(C), and a sigmoid in log10 C is fitted to log2 n*. The n of the highest curve
moves in steps of what was run, and near the optimum the curves lie close; so the envelope's n is
where the parabola (least squares in log2 n) of the best n and three on either side is highest.
Intervals come from refits on resampled runs. float64; deterministic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from pr2jax.core.config import ConfigError
from pr2jax.scaling.sampling_law import RewardCurve, SamplingLaw, logistic
from pr2jax.scaling.sampling_runs import SweepRun

MIN_NS, MIN_POINTS = 3, 4
GRID = 64
# n* has no meaning where no n has learned anything yet: the range starts where the envelope has
# risen by this share of its whole rise.
RISEN = 0.1
_AROUND = 3  # values of n on either side of the best, of whose curves the envelope's n is made
_SLOPES = (0.5, 50.0)  # of log2 n*; the upper end is a step
_EFFICIENCIES = (0.1, 20.0)
_LN10 = math.log(10.0)


# ------------------------------------------------------------------ curves


def fit_curve(
    x: Float[np.ndarray, " K"],
    y: Float[np.ndarray, " K"],
    *,
    start: float | None = None,
    near: RewardCurve | None = None,
) -> RewardCurve:
    """The least-squares monotone sigmoid of scores y at x = log10 C (-inf: the base model).

    start: R0, where it is known; else fitted. near: where to search from (else a grid).
    Raises ConfigError for fewer points than a curve has coefficients.
    """
    free = 4 if start is None else 3
    inside = x[np.isfinite(x)]
    if len(x) < free or not len(inside):
        raise ConfigError(f"{len(x)} points do not determine a curve of {free} coefficients")
    low, high = inside.min(), inside.max()
    bounds = [
        (0.0, 1.0),  # start
        (0.0, 1.0),  # share of what is left above it that is won in the end
        (low - 2.0, high + 2.0),  # log10 mid
        tuple(np.log(_EFFICIENCIES)),
    ]
    least = float(y.min()) if start is None else start
    won = (np.ptp(y) + 0.02) / max(1.0 - least, 0.02)
    begins = [
        (least, won, low + share * (high - low), np.log(b))
        for share in (0.25, 0.5, 0.75, 1.0)
        for b in (0.5, 1.5)
    ]
    if near is not None:
        won = (near.asymptote - near.start) / max(1.0 - near.start, 1e-9)
        begins = [(near.start, won, np.log10(near.mid), np.log(near.efficiency))]
    fixed = 0 if start is None else 1

    def full(v):
        return np.concatenate([[start], v]) if fixed else v

    def residuals(v):
        r0, won, mid, log_b = full(v)
        return r0 + won * (1.0 - r0) * logistic(np.exp(log_b) * _LN10 * (x - mid)) - y

    def slopes(v):
        r0, won, mid, log_b = full(v)
        z = np.exp(log_b) * _LN10 * (x - mid)
        s = logistic(z)
        # At C = 0, where z is -inf, the curve does not move with mid or B.
        by_z = np.where(np.isfinite(z), won * (1.0 - r0) * s * (1.0 - s), 0.0)
        z = np.where(np.isfinite(z), z, 0.0)
        columns = [1.0 - won * s, (1.0 - r0) * s, -by_z * np.exp(log_b) * _LN10, by_z * z]
        return np.stack(columns[fixed:], axis=1)

    best = None
    ends = np.array(bounds[fixed:], np.float64).T
    for begin in begins:
        at = np.clip(begin[fixed:], ends[0] + 1e-6, ends[1] - 1e-6)
        found = least_squares(residuals, at, slopes, bounds=ends)
        if best is None or found.cost < best.cost - 1e-12:
            best = found
    r0, won, mid, log_b = map(float, full(best.x))
    return RewardCurve(r0, r0 + won * (1.0 - r0), 10.0**mid, math.exp(log_b))


def _pooled(runs: Sequence[SweepRun], records: bool) -> tuple[np.ndarray, np.ndarray]:
    parts = [run.records() if records else run.bucketed() for run in runs]
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def scale_rl(runs: Sequence[SweepRun], near: RewardCurve | None = None) -> RewardCurve:
    """ScaleRL's curve of runs of one setting: fitted to all buckets, records or not, with R0 what
    the base model was measured at (fitted where no run has a row of C = 0)."""
    x, y = _pooled(runs, records=False)
    base = ~np.isfinite(x)
    start = float(y[base].mean()) if base.any() else None
    return fit_curve(x[~base], y[~base], start=start, near=near)


# ---------------------------------------------------------------- envelope


@dataclasses.dataclass(frozen=True)
class Envelope:
    """n*(C) on a grid: `log10_compute` [G], `log2_n` [G], `reward` [G] (the best curve's).

    `edge`: shares of the grid where the least, and where the largest n that was run is best: n*
    may lie beyond them.
    """

    log10_compute: Float[np.ndarray, " G"]
    log2_n: Float[np.ndarray, " G"]
    reward: Float[np.ndarray, " G"]
    edge: tuple[float, float]


def envelope(curves: dict[int, RewardCurve], grid: Float[np.ndarray, " G"]) -> Envelope:
    """The upper envelope of {n: curve} over `grid` (log10 C)."""
    ns = sorted(curves)
    place = np.log2(np.array(ns, np.float64))
    table = np.stack([curves[n].reward(10.0**grid) for n in ns])
    best = table.argmax(axis=0)
    log2_n = place[best]
    for g, j in enumerate(best):
        low = min(max(j - _AROUND, 0), max(len(ns) - 4, 0))
        high = max(j + _AROUND + 1, min(4, len(ns)))
        log2_n[g] = _peak(place[low:high], table[low:high, g], place[j])
    edge = float(np.mean(best == 0)), float(np.mean(best == len(ns) - 1))
    return Envelope(grid, log2_n, table.max(axis=0), edge)


def _peak(x: Float[np.ndarray, " K"], y: Float[np.ndarray, " K"], best: float) -> float:
    """Where the parabola nearest to the points is highest, within their ends; `best` where it is
    not curved downwards."""
    a, b, _ = np.polyfit(x - best, y, 2)
    return best if a > -1e-12 else float(np.clip(best - b / (2.0 * a), x[0], x[-1]))


def _span(runs: Sequence[SweepRun]) -> tuple[float, float]:
    """log10 C from every n's second evaluation (what one alone says is a curve's slope less than
    its noise) to the last budget that every n reached."""
    by_n: dict[int, list[np.ndarray]] = {}
    for run in runs:
        by_n.setdefault(run.n, []).append(run.compute[run.compute > 0])
    seen = [np.unique(np.concatenate(parts)) for parts in by_n.values()]
    if min(map(len, seen)) < 2:
        return 0.0, 0.0
    return float(np.log10(max(c[1] for c in seen))), float(np.log10(min(c[-1] for c in seen)))


def fit_law(found: Envelope, near: SamplingLaw | None = None) -> SamplingLaw:
    """The sigmoid of an envelope; amplitude 0 where it does not rise. near: a start besides."""
    x, y = found.log10_compute, found.log2_n
    flat = SamplingLaw(0.0, 1.0, float(x.mean()), float(y.mean()))
    if np.ptp(y) < 1e-9:
        return flat
    low = np.array([0.0, np.log(_SLOPES[0]), x[0] - 1.0, y.min() - 2.0])
    high = np.array([np.ptp(y) + 4.0, np.log(_SLOPES[1]), x[-1] + 1.0, y.max() + 2.0])

    def residuals(v):
        return v[3] + v[0] * logistic(np.exp(v[1]) * (x - v[2])) - y

    def slopes(v):
        z = np.exp(v[1]) * (x - v[2])
        s = logistic(z)
        by_z = v[0] * s * (1.0 - s)
        return np.stack([s, by_z * z, -by_z * np.exp(v[1]), np.ones_like(x)], axis=1)

    begins = [
        (np.ptp(y), np.log(slope), x[0] + share * np.ptp(x), y.min())
        for share in ((0.2, 0.7) if near else (0.1, 0.35, 0.6, 0.85))
        for slope in ((4.0,) if near else (2.0, 8.0))
    ]
    if near and near.amplitude:
        begins.append((near.amplitude, np.log(near.slope), near.centre, near.base))
    best, least = flat, 0.5 * float(np.sum((y - y.mean()) ** 2))
    for begin in begins:
        done = least_squares(
            residuals, np.clip(begin, low + 1e-6, high - 1e-6), slopes, bounds=(low, high)
        )
        if done.cost < least * (1 - 1e-9):
            least = done.cost
            amplitude, log_slope, centre, base = map(float, done.x)
            best = SamplingLaw(amplitude, float(np.exp(log_slope)), centre, base)
    return best


# --------------------------------------------------------------------- fit


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a sweep says at one B_p (or over all).

    Attributes:
      law: n*(C) over `log10_range`.
      curves: R(C) for each n, by record points.
      envelope: what `law` was fitted to.
      growth: log2 n* at the end of the range less at its start, along the straight line through
        the envelope: unlike the law it may fall, so that noise does not always grow.
    """

    law: SamplingLaw
    curves: dict[int, RewardCurve]
    envelope: Envelope

    @property
    def log10_range(self) -> tuple[float, float]:
        """Where the law was fitted."""
        grid = self.envelope.log10_compute
        return float(grid[0]), float(grid[-1])

    @property
    def growth(self) -> float:
        """log2 of n*(end) / n*(start), as said above."""
        grid = self.envelope.log10_compute
        return float(np.polyfit(grid, self.envelope.log2_n, 1)[0] * np.ptp(grid))


def check_runs(runs: Sequence[SweepRun]) -> None:
    """Raises ConfigError where no law can be fitted: fewer than 3 values of n, an n with too few
    evaluations, or scores that do not rise."""
    ns = sorted({run.n for run in runs})
    if len(ns) < MIN_NS:
        raise ConfigError(f"runs: {len(ns)} values of n ({ns}); n*(C) needs at least {MIN_NS}")
    for n in ns:
        points = len(_pooled([r for r in runs if r.n == n], records=False)[0])
        if points < MIN_POINTS:
            raise ConfigError(f"runs: n={n} has {points} evaluations in all; {MIN_POINTS} needed")
    low, high = _span(runs)
    if not high > low:
        raise ConfigError("runs: there is no range of compute over which every n was evaluated")
    gains = []
    for run in runs:
        _, y = run.bucketed()
        gains.append(y[-max(len(y) // 3, 1) :].mean() - y[0])
    error = np.std(gains, ddof=1) / np.sqrt(len(gains))
    if not np.mean(gains) > max(2.0 * error, 1e-9):
        raise ConfigError(
            f"runs: the validation score does not rise (by {np.mean(gains):+.3f} in the mean over "
            f"{len(gains)} runs, standard error {error:.3f}): nothing to fit"
        )


def fit_sweep(runs: Sequence[SweepRun], near: Fit | None = None) -> Fit:
    """The law of a sweep (module docstring). near: a fit of nearly the same runs to start from.

    Raises ConfigError as `check_runs`.
    """
    if near is None:
        check_runs(runs)
    curves = {}
    for n in sorted({run.n for run in runs}):
        x, y = _pooled([run for run in runs if run.n == n], records=True)
        if len(x) < MIN_POINTS:
            raise ConfigError(f"runs: n={n} has {len(x)} record points; {MIN_POINTS} needed")
        curves[n] = fit_curve(x, y, near=near and near.curves[n])
    if near is not None:
        grid = near.envelope.log10_compute
    else:
        grid = np.linspace(*_span(runs), 4 * GRID)
        top = envelope(curves, grid).reward
        start = min(curve.start for curve in curves.values())
        risen = top - start >= RISEN * (top[-1] - start)
        grid = np.linspace(grid[int(risen.argmax())], grid[-1], GRID)
    found = envelope(curves, grid)
    return Fit(fit_law(found, near and near.law), curves, found)


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Percentile intervals at `level` out of `samples` refits, `failed` of which led nowhere.

    Attributes:
      laws: of the refits.
      log2_n: (low, high) [2, G] of the laws on the fit's grid.
      growth: of `Fit.growth`.
      coefficients: of the law, by name.
      curves: {n: {coefficient: (low, high)}} of ScaleRL's curve.
    """

    laws: tuple[SamplingLaw, ...]
    samples: int
    failed: int
    level: float
    log2_n: Float[np.ndarray, "2 G"]
    growth: tuple[float, float]
    coefficients: dict[str, tuple[float, float]]
    curves: dict[int, dict[str, tuple[float, float]]]


def bootstrap(
    runs: Sequence[SweepRun],
    fit: Fit,
    *,
    samples: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Intervals:
    """Refits on resampled runs: of the S runs of an (n, B_p), S - 1 are drawn with replacement.

    Drawing one fewer makes the spread of a mean over few runs unbiased (Rao & Wu 1988; drawing
    S would make it too small by (S - 1) / S: a half, with two seeds). Whole runs are drawn, so a
    run's own course and the noise of its evaluations are both in it; that all runs are validated
    on the same problems is not.
    Raises ConfigError for a setting with one run, or where half of the refits fail.
    """
    groups: dict[tuple[int, int], list[SweepRun]] = {}
    for run in runs:
        groups.setdefault((run.n, run.prompts), []).append(run)
    for (n, prompts), group in groups.items():
        if len(group) < 2:
            raise ConfigError(f"runs: one seed at n={n}, B_p={prompts}; intervals need two")
    rng = np.random.default_rng(seed)
    rl = {n: scale_rl([r for r in runs if r.n == n]) for n in fit.curves}
    laws, curves, growth, failed = [], [], [], 0
    for _ in range(samples):
        drawn = [
            group[i]
            for group in groups.values()
            for i in rng.integers(0, len(group), len(group) - 1)
        ]
        try:
            again = fit_sweep(drawn, near=fit)
        except ConfigError:
            failed += 1
            continue
        laws.append(again.law)
        growth.append(again.growth)
        curves.append({n: scale_rl([r for r in drawn if r.n == n], rl[n]) for n in fit.curves})
    if failed > samples / 2:
        raise ConfigError(f"runs: {failed} of {samples} refits failed; add runs")
    tails = [(1.0 - level) / 2.0, (1.0 + level) / 2.0]
    grid = fit.envelope.log10_compute
    table = np.stack([law.log2_n(10.0**grid) for law in laws])

    def of(found: Sequence[Any]) -> dict[str, tuple[float, float]]:
        ends = np.quantile(np.array([dataclasses.astuple(f) for f in found]), tails, axis=0)
        names = [field.name for field in dataclasses.fields(found[0])]
        return {name: tuple(map(float, ends[:, i])) for i, name in enumerate(names)}

    return Intervals(
        laws=tuple(laws),
        samples=samples,
        failed=failed,
        level=level,
        log2_n=np.quantile(table, tails, axis=0),
        growth=tuple(map(float, np.quantile(growth, tails))),
        coefficients=of(laws),
        curves={n: of([found[n] for found in curves]) for n in fit.curves},
    )


def verdict(fit: Fit, intervals: Intervals | None) -> str:
    """In one sentence, whether n* grows over the measured range."""
    low, high = (f"{10.0**x:,.0f}" for x in fit.log10_range)
    over = f"over the measured range (C = {low} to {high} rollouts)"
    start, end = (float(2.0**v) for v in fit.law.log2_n(10.0 ** np.array(fit.log10_range)))
    if intervals is None:
        return (
            f"The fit has n* go from {start:.1f} to {end:.1f} {over}; without intervals whether it "
            "grows is not known."
        )
    least, most = (2.0**v for v in intervals.growth)
    factor = f"by a factor of {2.0**fit.growth:.2f} [{least:.2f}, {most:.2f}]"
    if intervals.growth[0] > 1e-6:
        return f"n* grows {over}, {factor}; the law has it go from {start:.1f} to {end:.1f}."
    if intervals.growth[1] < -1e-6:
        return f"n* falls {over}, {factor}; the law, which cannot fall, is flat at {start:.1f}."
    return f"n* does not grow {over} beyond what runs differ by: {factor}."
