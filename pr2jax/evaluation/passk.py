"""avg@n; pass@k, best@k, worst@k, maj@k without bias; and bootstrap intervals over problems."""

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int

# A response passes when its score reaches 1 (arXiv 2506.14965); the slack is for rounding.
PASS_SCORE = 1.0 - 1e-9


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over problems and its interval."""

    mean: float
    low: float
    high: float

    def apart(self, other: "Interval") -> bool:
        """Whether the two intervals do not overlap."""
        return self.low > other.high or other.low > self.high

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside: of a difference, that it is one."""
        return self.low > 0.0 or self.high < 0.0

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _check_k(name: str, n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"{name}@{k} needs at least {k} samples a problem (and k >= 1), got {n}")


def pass_at_k(n: int, c: Int[np.ndarray, " P"] | int, k: int) -> Float[np.ndarray, " P"]:
    """Chance that k of n samples, c of them right, drawn without replacement, hold a right one.

    1 - C(n-c, k) / C(n, k), the unbiased estimator of arXiv 2107.03374 (Eq. 1), as a product.
    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    c = np.asarray(c, np.int64)
    _check_k("pass", n, k)
    if (c < 0).any() or (c > n).any():
        raise ValueError(f"right answers must be in 0..{n}")
    wrong = (n - c)[..., None].astype(np.float64)
    drawn = np.arange(k, dtype=np.float64)
    # C(n-c, k) / C(n, k) = prod over i < k of (n-c-i) / (n-i); 0 once the wrong ones run out.
    return 1.0 - np.prod(np.maximum(wrong - drawn, 0.0) / (n - drawn), axis=-1)


def avg_at_n(scores: Float[np.ndarray, "P n"]) -> Float[np.ndarray, " P"]:
    """Mean score of each problem over its n samples."""
    return np.asarray(scores, np.float64).mean(axis=1)


def best_at_k(scores: Float[np.ndarray, "P n"], k: int) -> Float[np.ndarray, " P"]:
    """Expected largest score of k of a problem's n samples, drawn without replacement.

    The i-th smallest of n is the largest of k with chance C(i-1, k-1) / C(n, k); pass@k where
    scores are 0 or 1. Raises ValueError unless 1 <= k <= n.
    """
    return _extreme(np.sort(np.asarray(scores, np.float64), axis=1), k, "best")


def worst_at_k(scores: Float[np.ndarray, "P n"], k: int) -> Float[np.ndarray, " P"]:
    """Expected smallest score of k of n samples, as `best_at_k`."""
    return _extreme(np.sort(np.asarray(scores, np.float64), axis=1)[:, ::-1], k, "worst")


def _extreme(ordered: Float[np.ndarray, "P n"], k: int, name: str) -> Float[np.ndarray, " P"]:
    """Expected last one of k, in the order given."""
    n = ordered.shape[1]
    _check_k(name, n, k)
    chance = np.zeros(n)
    chance[n - 1] = k / n
    for i in range(n - 1, k - 1, -1):  # C(i-1, k-1) / C(i, k-1) = (i-k+1) / i, i from 1
        chance[i - 1] = chance[i] * (i - k + 1) / i
    return ordered @ chance


def majority_at_k(
    answers: Sequence[Sequence[Hashable]], scores: Float[np.ndarray, "P n"], k: int
) -> Float[np.ndarray, " P"]:
    """Expected score of the commonest answer among k of n samples, drawn without replacement.

    answers[i][j] is what sample j of problem i answered; None is no answer, which has no vote: it
    is scored (as the mean of its own) only where none of the k has an answer. Ties are broken
    by chance, evenly among the commonest. An answer's score is the mean of its samples' scores.
    This is the exact expectation, by dynamic programming over the answers (not a simulation).
    Raises ValueError unless 1 <= k <= n and there is an answer for every score.
    """
    scores = np.asarray(scores, np.float64)
    _check_k("maj", scores.shape[1], k)
    if len(answers) != len(scores) or any(len(row) != scores.shape[1] for row in answers):
        raise ValueError(f"{scores.shape} scores need as many answers")
    return np.array(
        [_majority(*_groups(row, own), k) for row, own in zip(answers, scores, strict=True)]
    )


def _groups(answers: Sequence[Hashable], scores: np.ndarray) -> tuple[tuple, tuple[int, float]]:
    """((count, mean score) of each answer, sorted), and the same of those without one."""
    by_answer: dict[Hashable, list[float]] = {}
    for answer, score in zip(answers, scores.tolist(), strict=True):
        by_answer.setdefault(answer, []).append(score)
    silent = by_answer.pop(None, [])
    groups = sorted((len(own), math.fsum(own) / len(own)) for own in by_answer.values())
    return tuple(groups), (len(silent), math.fsum(silent) / max(len(silent), 1))


@functools.lru_cache(maxsize=4096)
def _majority(groups: tuple[tuple[int, float], ...], silent: tuple[int, float], k: int) -> float:
    """maj@k of one problem: over every number of votes m that the winners may have."""
    drawn, left = np.arange(k + 1), sum(count for count, _ in groups) + silent[0]
    # Draws fall on an answer, or on all that come after it, by the hypergeometric distribution.
    # Those without an answer come first: any number of them, and where all k are, nobody votes.
    first = _chances(drawn, silent[0], left, k)
    left -= silent[0]
    steps = []
    for count, score in groups:
        votes = np.arange(min(count, k) + 1)[:, None]
        steps.append((score, _chances(votes, count, left, k - drawn)))
        left -= count
    most = min(k, max((count for count, _ in groups), default=0))
    return float(first[k] * silent[1]) + sum(
        _won_with(m, first, steps, k) for m in range(1, most + 1)
    )


def _won_with(m: int, first: np.ndarray, steps: list[tuple[float, np.ndarray]], k: int) -> float:
    """What winners of m votes contribute to the expected score.

    Answers are gone through one by one. `chance[u, t]`: of u draws so far, t answers having m
    votes and none more; `summed[u, t]`: that chance times the mean sum of those t scores.
    """
    chance = np.zeros((k + 1, k // m + 1))
    summed = np.zeros_like(chance)
    chance[:, 0] = first
    for score, shares in steps:
        new_chance, new_summed = np.zeros_like(chance), np.zeros_like(chance)
        for votes in range(min(len(shares) - 1, m) + 1):
            rest = k + 1 - votes  # states that have so many draws left
            share = shares[votes, :rest, None]
            a, b = chance[:rest] * share, summed[:rest] * share
            if votes == m:
                new_chance[votes:, 1:] += a[:, :-1]
                new_summed[votes:, 1:] += b[:, :-1] + score * a[:, :-1]
            else:
                new_chance[votes:] += a
                new_summed[votes:] += b
        chance, summed = new_chance, new_summed
    return float((summed[k, 1:] / np.arange(1, k // m + 1)).sum())


def _chances(votes: np.ndarray, count: int, total: int, draws: np.ndarray | int) -> np.ndarray:
    """Chance of `votes` among `count` in `draws` of `total`, without replacement."""
    rest = draws - votes
    ok = (votes <= count) & (rest >= 0) & (rest <= total - count) & (draws <= total)
    log = _log_choose(count, votes) + _log_choose(total - count, rest) - _log_choose(total, draws)
    return np.where(ok, np.exp(np.where(ok, log, 0.0)), 0.0)


def _log_choose(n: int, k: np.ndarray | int) -> np.ndarray:
    """ln C(n, k), where 0 <= k <= n; else of the nearest such k."""
    k = np.clip(k, 0, n)
    table = _log_factorials(n)
    return table[n] - table[k] - table[n - k]


@functools.lru_cache(maxsize=256)
def _log_factorials(n: int) -> Float[np.ndarray, " n+1"]:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])


def bootstrap_interval(
    values: Sequence[float] | Float[np.ndarray, " P"],
    *,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Mean of per-problem values with a percentile bootstrap interval over problems.

    Deterministic in its arguments. Where all values are equal the interval has no width: it
    knows only the problems it saw. Raises ValueError without values or with a non-finite one.
    """
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    return _percentiles(_resampled(values, resamples, rng), float(values.mean()), confidence)


def _resampled(values: Float[np.ndarray, " P"], resamples: int, rng) -> Float[np.ndarray, " R"]:
    """Means of as many values drawn with replacement. Raises ValueError for unusable values."""
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be a non-empty vector, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("values must be finite")
    size = len(values)
    block = max(1, 2**22 // size)  # bounds the index array to 32 MiB
    return np.concatenate(
        [
            values[rng.integers(0, size, (min(block, resamples - start), size))].mean(axis=1)
            for start in range(0, resamples, block)
        ]
    )


def _percentiles(draws: Float[np.ndarray, " R"], mean: float, confidence: float) -> Interval:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    # Rounding may put the mean of equal values a hair outside.
    return Interval(mean, min(float(low), mean), max(float(high), mean))


def ratio_interval(
    numerators: Float[np.ndarray, " P"], denominators: Float[np.ndarray, " P"], **settings: float
) -> Interval:
    """sum(numerators) / sum(denominators) with a bootstrap interval over their pairs.

    Linearised: sum(n) / sum(d) moves as the mean of (n - ratio d) / mean(d) does. Raises
    ValueError as `bootstrap_interval`, and where the denominators add up to 0.
    """
    n, d = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if not d.sum() > 0:
        raise ValueError("the denominators must add up to more than 0")
    ratio = float(n.sum() / d.sum())
    error = bootstrap_interval((n - ratio * d) / d.mean(), **settings)
    return Interval(ratio, ratio + error.low, ratio + error.high)


def paired_interval(
    before: Float[np.ndarray, " P"], after: Float[np.ndarray, " P"], **settings: float
) -> Interval:
    """Interval of the mean of after - before, problem by problem."""
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.shape != after.shape:
        raise ValueError(
            f"{before.shape} values before, {after.shape} after: not the same problems"
        )
    return bootstrap_interval(after - before, **settings)


def macro_interval(
    groups: Sequence[Sequence[float]], *, confidence: float = 0.95, resamples: int = 4000, seed=0
) -> Interval:
    """Mean over groups of each group's mean; problems are resampled within their groups.

    For figures over several suites, each of which counts the same whatever its size. Raises
    ValueError as `bootstrap_interval`, and without groups.
    """
    if not len(groups):
        raise ValueError("no group to take the mean of")
    rng = np.random.default_rng(seed)
    draws = np.mean([_resampled(np.asarray(g, np.float64), resamples, rng) for g in groups], axis=0)
    mean = float(np.mean([np.mean(g) for g in groups]))
    return _percentiles(draws, mean, confidence)
