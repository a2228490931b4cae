"""Fits the joint law of `laws.py` to a table of runs, with bootstrap intervals; float64.

The objective is the Huber loss on the logarithm of the loss, with the law in log-sum-exp form and
an analytic gradient, minimised by L-BFGS-B from several starts (arXiv 2502.05172).
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize

from pr2jax.core.config import ConfigError
from pr2jax.core.fetch import fetched
from pr2jax.scaling.laws import JointMoELaw, Numbers

# Eleven coefficients: fewer runs than twelve leave nothing to judge the fit by.
MIN_RUNS = 12
COLUMNS = ("active_params", "tokens", "experts", "top_k", "loss")
COEFFICIENTS = tuple(field.name for field in dataclasses.fields(JointMoELaw))

# Starts: the slopes of both terms, the floor as a share of the least loss, and the ends of Eh.
_SLOPES = (-0.1, -0.2, -0.35)
_FLOORS = (0.3, 0.6, 0.9)
_E_STARTS = (1.5, 4.0)
_E_MAXES = (64.0, 512.0)
_ROUNDS = 8
# Relative gain of a round below which a descent has settled; far below what noise moves.
_SETTLED = 1e-4
# Directions that the runs say less about than this (relative) are not stretched any further.
_DAMPING = 1e-12


@dataclasses.dataclass(frozen=True)
class Runs:
    """Trained runs: active parameters, tokens, experts in units of k (E / k), loss in nats a token.

    Raises ConfigError for vectors of unequal length, or a value that is not finite and positive.
    """

    n: Float[np.ndarray, " R"]
    d: Float[np.ndarray, " R"]
    e: Float[np.ndarray, " R"]
    loss: Float[np.ndarray, " R"]

    def __post_init__(self) -> None:
        for key in ("n", "d", "e", "loss"):
            values = np.asarray(getattr(self, key), np.float64)
            object.__setattr__(self, key, values)
            if values.ndim != 1 or values.shape != self.n.shape:
                raise ConfigError(f"{key}: shape {values.shape}, expected a vector as long as n")
            if not np.all(np.isfinite(values) & (values > 0)):
                raise ConfigError(f"{key}: every value must be finite and above 0")
        if np.any(self.e < 1):
            raise ConfigError("e: experts in units of k cannot be below 1")

    def __len__(self) -> int:
        return len(self.n)

    def take(self, rows: np.ndarray) -> Runs:
        """The runs at `rows` (indices or a mask)."""
        return Runs(self.n[rows], self.d[rows], self.e[rows], self.loss[rows])

    @staticmethod
    def from_csv(path: str | Path, *, at_least: int = MIN_RUNS) -> Runs:
        """Reads the columns active_params, tokens, experts, top_k, loss; others are ignored.

        Raises ConfigError naming the file, line and column of the first thing wrong, and for
        fewer rows than `at_least`.
        """
        try:
            with open(fetched(path), newline="", encoding="utf-8-sig") as file:
                rows = _read_rows(path, csv.reader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{path}: cannot be read as a table ({error})") from None
        if len(rows) < at_least:
            raise ConfigError(f"{path}: {len(rows)} runs, at least {at_least} are needed")
        n, d, experts, top_k, loss = np.array(rows, np.float64).reshape(-1, len(COLUMNS)).T
        return Runs(n, d, experts / top_k, loss)


def _read_rows(path: str | Path, reader: Iterable[list[str]]) -> list[list[float]]:
    header = [name.strip() for name in next(reader, [])]
    for name in COLUMNS:
        if header.count(name) != 1:
            found = "twice" if name in header else f"missing; the header has {header}"
            raise ConfigError(f"{path}: line 1, column {name}: {found}")
    places = [header.index(name) for name in COLUMNS]
    rows = []
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path}: line {reader.line_num}"
        if len(cells) != len(header):
            edge = header[len(cells)] if len(cells) < len(header) else f"{len(header) + 1}"
            raise ConfigError(f"{where}, column {edge}: {len(cells)} cells for {len(header)} names")
        row = [
            _number(f"{where}, column {name}", cells[place])
            for name, place in zip(COLUMNS, places, strict=True)
        ]
        if row[3] > row[2]:
            raise ConfigError(f"{where}, column top_k: {row[3]:g} is more than {row[2]:g} experts")
        rows.append(row)
    return rows


def _number(where: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{where}: {text!r} is not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{where}: {text!r} is not finite and above 0")
    return value


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Objective over a vector of 11 in the order of COEFFICIENTS, as follows.

    With x = ln N - mean, y = ln D - mean and h = ln Eh, the three terms of the law are
    exp(v0 + v1 x + v2 h + v3 h x), exp(v4 + v5 y + v6 h + v7 h y) and exp(v10); centring keeps
    prefactors and exponents apart. e_start = 1 + exp(v8), e_max = e_start (1 + exp(v9)).
    """

    x: Float[np.ndarray, " R"]
    y: Float[np.ndarray, " R"]
    e: Float[np.ndarray, " R"]
    log_loss: Float[np.ndarray, " R"]
    mean_x: float
    mean_y: float
    delta: float

    @staticmethod
    def of(runs: Runs, delta: float) -> _Problem:
        log_n, log_d = np.log(runs.n), np.log(runs.d)
        x, y = log_n - log_n.mean(), log_d - log_d.mean()
        return _Problem(x, y, runs.e, np.log(runs.loss), log_n.mean(), log_d.mean(), delta)

    def law(self, v: Float[np.ndarray, " 11"]) -> JointMoELaw:
        """The law of a vector; not finite where the vector is far out."""
        with np.errstate(over="ignore"):
            a, b = np.exp(v[0] - v[1] * self.mean_x), np.exp(v[4] - v[5] * self.mean_y)
            c = np.exp(v[10])
        start = 1.0 + _exp(v[8])
        of_n = (a, v[1], v[2] - v[3] * self.mean_x, v[3])
        of_d = (b, v[5], v[6] - v[7] * self.mean_y, v[7])
        values = (*of_n, *of_d, start, start * (1.0 + _exp(v[9])), c)
        return JointMoELaw(**dict(zip(COEFFICIENTS, map(float, values), strict=True)))

    def vector(self, law: JointMoELaw) -> Float[np.ndarray, " 11"]:
        """Inverse of `law`."""
        a, b, c = np.log([law.a, law.b, law.c])
        x, y = self.mean_x, self.mean_y
        of_n = (a + law.alpha * x, law.alpha, law.delta + law.gamma * x, law.gamma)
        of_d = (b + law.beta * y, law.beta, law.omega + law.zeta * y, law.zeta)
        ends = np.log([law.e_start - 1.0, law.e_max / law.e_start - 1.0])
        return np.array([*of_n, *of_d, *ends, c])

    def residuals(
        self, v: Float[np.ndarray, " 11"]
    ) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, "R 11"]]:
        """Log of the law minus log of the loss, and its derivatives."""
        start = 1.0 + _exp(v[8])
        gap = start * _exp(v[9])
        top = start + gap
        inner = start * (top / gap)
        outer = self.e - 1.0 + inner
        eh = 1.0 / (1.0 / outer + 1.0 / top)
        h = np.log(eh)
        logs = np.stack(
            [
                v[0] + v[2] * h + (v[1] + v[3] * h) * self.x,
                v[4] + v[6] * h + (v[5] + v[7] * h) * self.y,
                np.full_like(h, v[10]),
            ]
        )
        total = np.logaddexp.reduce(logs, axis=0)
        of_n, of_d, of_c = np.exp(logs - total)
        by_h = of_n * (v[2] + v[3] * self.x) + of_d * (v[6] + v[7] * self.y)
        ratio = (inner / outer) ** 2
        h_by_start, h_by_top = eh * ratio / start**2, eh * (1.0 - ratio) / top**2
        columns = [of_n, of_n * self.x, of_n * h, of_n * h * self.x]
        columns += [of_d, of_d * self.y, of_d * h, of_d * h * self.y]
        # v8 moves e_start and e_max together.
        h_by_both = h_by_start + h_by_top * (top / start)
        columns += [by_h * h_by_both * (start - 1.0), by_h * h_by_top * gap]
        return total - self.log_loss, np.stack([*columns, of_c], axis=1)

    def objective(self, v: Float[np.ndarray, " 11"]) -> tuple[float, Float[np.ndarray, " 11"]]:
        """Mean Huber loss in units of delta^2, and its gradient.

        The unit keeps L-BFGS-B's absolute tolerances far below what matters.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            residuals, jacobian = self.residuals(v)
            size = np.abs(residuals) / self.delta
            value = np.mean(np.where(size <= 1.0, 0.5 * size**2, size - 0.5))
            slopes = np.clip(residuals / self.delta, -1.0, 1.0) / (self.delta * len(residuals))
            return float(value), slopes @ jacobian

    def whitening(self, v: Float[np.ndarray, " 11"]) -> Float[np.ndarray, "11 11"]:
        """T such that the objective of v + T z has about unit curvature in z."""
        residuals, jacobian = self.residuals(v)
        weights = 1.0 / np.maximum(np.abs(residuals) / self.delta, 1.0)
        rows = jacobian * np.sqrt(weights / len(residuals))[:, None] / self.delta
        values, vectors = np.linalg.eigh(rows.T @ rows)
        return vectors / np.sqrt(np.maximum(values, 0.0) + _DAMPING * values[-1])


def _exp(value: float) -> float:
    # e^20 is out of reach of any pool: e_max there says that the runs show no saturation.
    return math.exp(min(max(value, -20.0), 20.0))


def _descend(
    problem: _Problem, v: Float[np.ndarray, " 11"]
) -> tuple[Float[np.ndarray, " 11"], float, bool]:
    """(vector, objective, whether it settled) from a start.

    The coefficients trade off along long valleys, in which L-BFGS-B stops early: each round goes
    on in coordinates where the valley found so far is round.
    """
    value = problem.objective(v)[0]
    for _ in range(_ROUNDS):
        try:
            turn = problem.whitening(v)
        except np.linalg.LinAlgError:
            return v, math.inf, False

        def in_turned(z, v=v, turn=turn):
            found, gradient = problem.objective(v + turn @ z)
            return (found, turn.T @ gradient) if np.isfinite(found) else (1e30, np.zeros_like(z))

        options = {"maxiter": 200, "ftol": 1e-9, "gtol": 1e-9}
        result = minimize(in_turned, np.zeros(len(v)), jac=True, method="L-BFGS-B", options=options)
        gain = value - result.fun
        if gain > 0:
            v, value = v + turn @ result.x, float(result.fun)
        if not gain > max(_SETTLED * value, 1e-13):
            return v, value, bool(np.isfinite(value))
    return v, value, False


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law.

    `train_rmse` and `held_out_rmse` (None without held-out runs) are of the log loss, `objective`
    the mean Huber loss. Of `starts` initialisations `unsettled` were still improving at the end.
    `delta` is the Huber loss's. Where the pools are few the coefficients are not unique, while
    the predicted losses are: judge by the latter.
    """

    law: JointMoELaw
    train_rmse: float
    held_out_rmse: float | None
    objective: float
    starts: int
    unsettled: int
    delta: float


def _rmse(law: JointMoELaw, runs: Runs) -> float:
    with np.errstate(all="ignore"):
        errors = np.log(law.loss(runs.n, runs.d, runs.e)) - np.log(runs.loss)
        return float(np.sqrt(np.mean(errors**2)))


def _starting_points(problem: _Problem, starts: int, seed: int) -> list[Float[np.ndarray, " 11"]]:
    """`starts` points of the grid, drawn without replacement."""
    grid = list(itertools.product(_SLOPES, _SLOPES, _FLOORS, _E_STARTS, _E_MAXES))
    least, middle = np.exp(problem.log_loss.min()), np.exp(problem.log_loss.mean())
    points = []
    for index in np.random.default_rng(seed).permutation(len(grid))[:starts]:
        alpha, beta, floor, e_start, e_max = grid[index]
        # The loss above the floor is shared equally by the two terms.
        half = np.log((middle - floor * least) / 2.0)
        ends = np.log(e_start - 1.0), np.log(e_max / e_start - 1.0)
        term_n, term_d = (half, alpha, 0.0, 0.0), (half, beta, 0.0, 0.0)
        points.append(np.array([*term_n, *term_d, *ends, np.log(floor * least)]))
    return points


def fit_joint_law(
    runs: Runs,
    *,
    held_out: Runs | None = None,
    starts: int = 16,
    delta: float = 0.01,
    seed: int = 0,
) -> Fit:
    """The joint law of `runs`, from `starts` points of a grid of 108 that `seed` draws.

    Of the starts' ends the one with the least train RMSE + held-out RMSE of the log loss is kept.
    Deterministic in its arguments. Raises ConfigError for fewer than 12 runs, for runs that do
    not differ in parameters, tokens or experts, and where no start gives a finite law.
    """
    if len(runs) < MIN_RUNS:
        raise ConfigError(f"runs: {len(runs)} runs, at least {MIN_RUNS} are needed")
    for key in ("n", "d", "e"):
        if len(np.unique(getattr(runs, key))) < 2:
            raise ConfigError(f"runs: all have the same {key}; its coefficients cannot be fitted")
    if held_out is not None and not len(held_out):
        raise ConfigError("held_out: no runs")
    if starts < 1:
        raise ConfigError(f"starts: {starts} is below 1")
    if not (math.isfinite(delta) and delta > 0):
        raise ConfigError(f"delta: {delta} is not finite and above 0")
    problem = _Problem.of(runs, delta)
    points = _starting_points(problem, starts, seed)
    best, best_score, unsettled = None, math.inf, 0
    for point in points:
        v, value, settled = _descend(problem, point)
        unsettled += not settled
        law = problem.law(v)
        train = _rmse(law, runs)
        held = None if held_out is None else _rmse(law, held_out)
        score = train + (held or 0.0)
        if math.isfinite(score) and score < best_score and _finite(law):
            best_score = score
            best = Fit(law, train, held, value * delta**2, len(points), 0, delta)
    if best is None:
        raise ConfigError(f"runs: none of {len(points)} starts led to a finite law")
    return dataclasses.replace(best, unsettled=unsettled)


def _finite(law: JointMoELaw) -> bool:
    return all(math.isfinite(value) for value in dataclasses.astuple(law))


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Laws refitted on resampled runs, and percentile intervals from them.

    `failed` of `samples` refits did not settle or left the finite numbers; they are not in `laws`.
    `coefficients`: name -> (low, high) at `level`.
    """

    laws: tuple[JointMoELaw, ...]
    samples: int
    failed: int
    level: float
    coefficients: dict[str, tuple[float, float]]

    def loss_interval(
        self, n: Numbers, d: Numbers, e: Numbers
    ) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
        """(low, high) of the law's loss in nats a token; shapes broadcast.

        Of the law, not of a new run: a run's own noise comes on top.
        """
        return _tails(np.stack([np.asarray(law.loss(n, d, e)) for law in self.laws]), self.level)

    def __str__(self) -> str:
        lines = [f"{self.samples} resamples, {self.failed} refits failed, level {self.level:g}"]
        lines += [f"{k} [{low:.4g}, {high:.4g}]" for k, (low, high) in self.coefficients.items()]
        return "\n".join(lines)


def _tails(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(values, [tail, 1.0 - tail], axis=0)
    return low, high


def bootstrap(
    runs: Runs, fit: Fit, *, samples: int = 200, seed: int = 0, level: float = 0.95
) -> Bootstrap:
    """Refits on `samples` resamples of `runs` with replacement, each starting from `fit`.

    Raises ConfigError for a bad setting, and where fewer than two refits, or fewer than half,
    come to an end.
    """
    if samples < 2:
        raise ConfigError(f"samples: {samples} is below 2")
    if not 0 < level < 1:
        raise ConfigError(f"level: {level} is not between 0 and 1")
    rng = np.random.default_rng(seed)
    laws = []
    for _ in range(samples):
        problem = _Problem.of(runs.take(rng.integers(0, len(runs), len(runs))), fit.delta)
        v, _, settled = _descend(problem, problem.vector(fit.law))
        law = problem.law(v)
        if settled and _finite(law):
            laws.append(law)
    failed = samples - len(laws)
    if len(laws) < max(2, samples / 2):
        raise ConfigError(f"samples: {failed} of {samples} refits failed; add runs")
    table = np.array([dataclasses.astuple(law) for law in laws])
    low, high = _tails(table, level)
    intervals = zip(COEFFICIENTS, zip(low.tolist(), high.tolist(), strict=True), strict=True)
    return Bootstrap(tuple(laws), samples, failed, level, dict(intervals))
