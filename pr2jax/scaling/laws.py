"""Scaling laws of Mixture-of-Experts behind one interface; float64, shapes broadcast.

N counts active parameters, D tokens, E experts (in units of k: E / k), losses are nats a token of
the data that a law was fitted on. Their shape carries over to other data, their level does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq

from pr2jax.core.config import ConfigError

Numbers = Float[np.ndarray, "..."] | float

# Tokens between which a law's optimum or iso-loss point is looked for.
_LOW, _HIGH = 1.0, 1e24


class Law(Protocol):
    """What a law answers."""

    def loss(self, n: Numbers, d: Numbers, e: Numbers) -> Numbers:
        """Loss in nats a token of N active parameters, D tokens, E experts."""
        ...

    def optimal_tokens(self, n: float, e: float) -> float:
        """Tokens at which more parameters and more tokens help alike: the terms of N and of D
        have the same slope in the logarithm."""
        ...


@dataclass(frozen=True)
class JointMoELaw:
    """Ludziejewski et al. 2025 (arXiv 2502.05172), with its published coefficients:

    L = a Eh^delta N^(alpha + gamma ln Eh) + b Eh^omega D^(beta + zeta ln Eh) + c,
    1/Eh = 1 / (E - 1 + 1 / (1/e_start - 1/e_max)) + 1/e_max.
    """

    a: float = 35.91
    alpha: float = -0.1889
    delta: float = -0.2285
    gamma: float = 0.0098
    b: float = 35.98
    beta: float = -0.1775
    omega: float = 0.5529
    zeta: float = -0.0259
    e_start: float = 2.0732
    e_max: float = 290.4521
    c: float = 1.3637

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        for key in ("a", "b"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"{key}: must be above 0, got {getattr(self, key)}")
        if not 0 < self.e_start < self.e_max:
            raise ConfigError(f"e_start: {self.e_start} must lie between 0 and e_max={self.e_max}")

    def effective_experts(self, e: Numbers) -> Numbers:
        """Eh: E with its saturation at both ends."""
        inner = 1.0 / (1.0 / self.e_start - 1.0 / self.e_max)
        return 1.0 / (1.0 / (np.asarray(e, np.float64) - 1.0 + inner) + 1.0 / self.e_max)

    def terms(self, e: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """(m, mu, n, nu) of L = m N^mu + n D^nu + c at E experts."""
        eh = self.effective_experts(e)
        log = np.log(eh)
        return (
            self.a * eh**self.delta,
            self.alpha + self.gamma * log,
            self.b * eh**self.omega,
            self.beta + self.zeta * log,
        )

    def loss(self, n: Numbers, d: Numbers, e: Numbers) -> Numbers:
        """As `Law.loss`."""
        m, mu, scale, nu = self.terms(e)
        return m * np.power(n, mu) + scale * np.power(d, nu) + self.c

    def optimal_tokens(self, n: float, e: float) -> float:
        """D* = (mu m N^mu / (nu n))^(1/nu)."""
        m, mu, scale, nu = self.terms(e)
        return float((mu * m * n**mu / (nu * scale)) ** (1.0 / nu))


@dataclass(frozen=True)
class GranularityLaw:
    """Krajewski et al. 2024 (arXiv 2402.07871): L = c + (g / G^gamma + a) / N^alpha + b / D^beta.

    `granularity` is G, the width of a dense feed-forward over an expert's. The law is of a fixed
    expansion and knows no number of experts: e is not read.
    """

    granularity: float = 1.0
    a: float = 18.1
    alpha: float = 0.115
    b: float = 30.8
    beta: float = 0.147
    g: float = 2.1
    gamma: float = 0.58
    c: float = 0.47

    def _scale(self) -> float:
        return self.g / self.granularity**self.gamma + self.a

    def loss(self, n: Numbers, d: Numbers, e: Numbers) -> Numbers:
        """As `Law.loss`."""
        del e
        return self.c + self._scale() / np.power(n, self.alpha) + self.b / np.power(d, self.beta)

    def optimal_tokens(self, n: float, e: float) -> float:
        """(beta b N^alpha / (alpha scale))^(1/beta)."""
        del e
        ratio = self.beta * self.b * n**self.alpha / (self.alpha * self._scale())
        return float(ratio ** (1.0 / self.beta))


@dataclass(frozen=True)
class SparsityLaw:
    """Abnar et al. 2025 (arXiv 2501.12370), with S = 1 - 1/E the share of inactive parameters:

    L = a / N^alpha + b / D^beta + c / (1 - S)^lam + d / ((1 - S)^delta N^gamma) + e0.
    N is all parameters there; here the active ones, over 1 - S. The fitted coefficients were not
    found published, so all are the user's.
    """

    a: float
    alpha: float
    b: float
    beta: float
    c: float
    lam: float
    d: float
    delta: float
    gamma: float
    e0: float

    def loss(self, n: Numbers, d: Numbers, e: Numbers) -> Numbers:
        """As `Law.loss`."""
        active = 1.0 / np.asarray(e, np.float64)
        total = np.asarray(n, np.float64) / active
        of_size = self.a / total**self.alpha + self.d / (active**self.delta * total**self.gamma)
        return of_size + self.b / np.power(d, self.beta) + self.c / active**self.lam + self.e0

    def optimal_tokens(self, n: float, e: float) -> float:
        """Raises ConfigError where no number of tokens has that slope."""
        active, total = 1.0 / e, n * e
        slope = self.alpha * self.a / total**self.alpha
        slope += self.gamma * self.d / (active**self.delta * total**self.gamma)
        if slope <= 0 or self.b <= 0 or self.beta <= 0:
            raise ConfigError("law: parameters or tokens do not lower its loss")
        return float((self.beta * self.b / slope) ** (1.0 / self.beta))


def tokens_at_loss(law: Law, n: float, e: float, loss: float) -> float:
    """Iso-loss: the tokens after which N parameters and E experts reach `loss` (nats a token).

    Raises ConfigError where no number of tokens up to 1e24 does.
    """
    gap = lambda log_d: float(law.loss(n, np.exp(log_d), e)) - loss
    low, high = np.log(_LOW), np.log(_HIGH)
    if gap(low) < 0 or gap(high) > 0:
        ends = law.loss(n, _HIGH, e), law.loss(n, _LOW, e)
        raise ConfigError(f"loss: {loss} is outside [{ends[0]:.4f}, {ends[1]:.4f}] of this size")
    return float(np.exp(brentq(gap, low, high, xtol=1e-12)))


def iso_flop(
    law: Law, flops: float, e: float, points: int = 50
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """(N, D, loss) along 6 N D = `flops`, three decades of N around N = D / 20."""
    centre = np.sqrt(flops / 120.0)
    n = np.geomspace(centre / 30.0, centre * 30.0, points)
    d = flops / (6.0 * n)
    return n, d, np.asarray(law.loss(n, d, e))


def stage_shares(law: Law, n: float, experts: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
    """Share of the tokens of each stage of a growing pool (EMO; our reading, whose shares lie
    within 0.9 percentage points of the paper's): D*(E_s) - D*(E_{s-1}) over D*(E_last).

    Raises ConfigError where the optimum does not grow with the pool.
    """
    ends = np.array([law.optimal_tokens(n, float(e)) for e in experts])
    lengths = np.diff(ends, prepend=0.0)
    if not np.all(np.isfinite(ends)) or np.any(lengths <= 0):
        raise ConfigError(
            f"law: its optimal tokens do not grow with the pool: {ends.tolist()} for {experts} "
            "experts a used one; give the stages' shares or steps"
        )
    return lengths / ends[-1]
