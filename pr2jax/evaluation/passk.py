"""avg@n, unbiased pass@k, and bootstrap intervals over problems."""

import dataclasses
from collections.abc import Sequence

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

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pass_at_k(n: int, c: Int[np.ndarray, " P"] | int, k: int) -> Float[np.ndarray, " P"]:
    """Chance that k of n samples, c of them right, drawn without replacement, hold a right one.

    1 - C(n-c, k) / C(n, k), the unbiased estimator of arXiv 2107.03374 (Eq. 1), as a product.
    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    c = np.asarray(c, np.int64)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem (and k >= 1), got {n}")
    if (c < 0).any() or (c > n).any():
        raise ValueError(f"right answers must be in 0..{n}")
    wrong = (n - c)[..., None].astype(np.float64)
    drawn = np.arange(k, dtype=np.float64)
    # C(n-c, k) / C(n, k) = prod over i < k of (n-c-i) / (n-i); 0 once the wrong ones run out.
    return 1.0 - np.prod(np.maximum(wrong - drawn, 0.0) / (n - drawn), axis=-1)


def avg_at_n(scores: Float[np.ndarray, "P n"]) -> Float[np.ndarray, " P"]:
    """Mean score of each problem over its n samples."""
    return np.asarray(scores, np.float64).mean(axis=1)


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
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be a non-empty vector, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("values must be finite")
    rng = np.random.default_rng(seed)
    size = len(values)
    block = max(1, 2**22 // size)  # bounds the index array to 32 MiB
    means = np.concatenate(
        [
            values[rng.integers(0, size, (min(block, resamples - start), size))].mean(axis=1)
            for start in range(0, resamples, block)
        ]
    )
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    mean = float(values.mean())
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
