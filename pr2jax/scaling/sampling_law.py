"""Laws of the sampling budget: what C rollouts buy, and how many to draw for each problem; float64.

C = B_p n M counts rollouts: B_p problems a batch, n rollouts a problem, M updates, strictly
on-policy. Two laws: the reward reached, R(C), and the n that reaches most, n*(C). The constants
belong to a model and its data; what carries over is the procedure (scaling/sampling_fit.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from pr2jax.core.config import ConfigError

Numbers = Float[np.ndarray, "..."] | float

# The study's learning rate (AdamW): BASE_RATE sqrt(B / BASE_BATCH), B = B_p n.
BASE_RATE, BASE_BATCH = 1e-6, 1024
WARMUP_STEPS = 10


@dataclass(frozen=True)
class SamplingLaw:
    """log2 n*(C) = amplitude / (1 + exp(-slope (log10 C - centre))) + base (IsoCompute).

    An amplitude of 0 is the law of an n* that does not change.
    """

    amplitude: float
    slope: float
    centre: float
    base: float

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        if not np.all(np.isfinite([self.amplitude, self.slope, self.centre, self.base])):
            raise ConfigError(f"amplitude, slope, centre, base: not finite in {self}")
        for key in ("amplitude", "slope"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key}: must be >= 0, got {getattr(self, key)}")

    def log2_n(self, compute: Numbers) -> Float[np.ndarray, "..."]:
        """log2 of n* at C > 0 rollouts."""
        at = np.log10(np.asarray(compute, np.float64))
        return self.base + self.amplitude * logistic(self.slope * (at - self.centre))

    def optimal_n(self, compute: Numbers) -> Float[np.ndarray, "..."]:
        """n* at C > 0 rollouts, not rounded."""
        return 2.0 ** self.log2_n(compute)

    @property
    def saturation(self) -> float:
        """n* of endless compute."""
        return float(2.0 ** (self.base + self.amplitude))

    @property
    def knee(self) -> float:
        """Rollouts at which 95% of the amplitude is there."""
        return float(10.0 ** (self.centre + np.log(19.0) / self.slope))


# Read off the figures of the IsoCompute study (a 7B model), by (difficulty, fitted at): one B_p,
# or all of 2^5 .. 2^10 together. n was swept over 2^3 .. 2^11.
PUBLISHED: dict[tuple[str, str], SamplingLaw] = {
    ("easy", "B_p=32"): SamplingLaw(6.09, 4.75, 5.84, 2.73),
    ("hard", "B_p=32"): SamplingLaw(4.47, 7.23, 5.84, 2.79),
    ("easy", "joint"): SamplingLaw(5.67, 8.84, 6.08, 3.08),
    ("hard", "joint"): SamplingLaw(3.97, 50.0, 6.13, 3.04),
}
PUBLISHED_PROMPTS = 32


@dataclass(frozen=True)
class RewardCurve:
    """R(C) = start + (asymptote - start) / (1 + (mid / C)^efficiency) (ScaleRL, arXiv 2510.13786).

    In log10 C this is the monotone sigmoid of slope efficiency ln 10 around log10 mid, which the
    IsoCompute study fits for each n: the two laws are one family, and differ in what they are
    fitted to. R(0) = start.
    """

    start: float
    asymptote: float
    mid: float
    efficiency: float

    def reward(self, compute: Numbers) -> Float[np.ndarray, "..."]:
        """R at C >= 0 rollouts."""
        with np.errstate(divide="ignore"):
            at = np.log(np.asarray(compute, np.float64)) - np.log(self.mid)
        return self.start + (self.asymptote - self.start) * logistic(self.efficiency * at)


def logistic(x: Numbers) -> Float[np.ndarray, "..."]:
    """1 / (1 + exp(-x)), without overflow; 0 at -inf."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(x, np.float64)))


def square_root_rate(rows: float, rate: float = BASE_RATE, batch: float = BASE_BATCH) -> float:
    """Learning rate of a batch of `rows` rollouts: rate sqrt(rows / batch)."""
    return float(rate * np.sqrt(rows / batch))
