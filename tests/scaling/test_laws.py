"""Laws against definitions, numeric slopes and the published shares."""

import numpy as np
import pytest

from pr2jax.core.config import ConfigError
from pr2jax.scaling.laws import (
    GranularityLaw,
    JointMoELaw,
    SparsityLaw,
    iso_flop,
    stage_shares,
    tokens_at_loss,
)

POOLS = np.array([1, 2, 4, 8, 16])
SPARSE = SparsityLaw(
    a=20.0, alpha=0.2, b=30.0, beta=0.18, c=0.01, lam=0.1, d=5.0, delta=0.05, gamma=0.15, e0=1.2
)
LAWS = [JointMoELaw(), GranularityLaw(granularity=4.0), SPARSE]


@pytest.mark.parametrize(
    "n,published", [(0.73e9, [22.7, 9.7, 15.6, 22.6, 29.5]), (1.1e9, [25.4, 9.9, 15.5, 21.7, 27.4])]
)
def test_shares_of_the_published_coefficients(n, published):
    shares = 100 * stage_shares(JointMoELaw(), n, POOLS)
    np.testing.assert_allclose(shares, published, atol=0.06)
    assert abs(shares.sum() - 100) < 1e-9


def test_joint_law_by_its_definition():
    n, d, e = 7e8, 3e10, 8.0
    inner = 1 / (1 / 2.0732 - 1 / 290.4521)
    eh = 1 / (1 / (e - 1 + inner) + 1 / 290.4521)
    first = 35.91 * eh**-0.2285 * n ** (-0.1889 + 0.0098 * np.log(eh))
    second = 35.98 * eh**0.5529 * d ** (-0.1775 - 0.0259 * np.log(eh))
    assert JointMoELaw().loss(n, d, e) == pytest.approx(first + second + 1.3637, rel=1e-14)
    assert JointMoELaw().effective_experts(1.0) == pytest.approx(2.0732)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
@pytest.mark.parametrize("e", [1.0, 4.0, 16.0])
def test_optimum_has_equal_slopes(law, e):
    """By central differences in the logarithm, of the loss itself."""
    n = 5e8
    d = law.optimal_tokens(n, e)
    h = 1e-4
    by_n = law.loss(n * np.exp(h), d, e) - law.loss(n * np.exp(-h), d, e)
    by_d = law.loss(n, d * np.exp(h), e) - law.loss(n, d * np.exp(-h), e)
    assert by_n == pytest.approx(by_d, rel=1e-5)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_iso_loss_and_iso_flop(law):
    d = tokens_at_loss(law, 5e8, 4.0, float(law.loss(5e8, 2e10, 4.0)))
    assert d == pytest.approx(2e10, rel=1e-8)
    with pytest.raises(ConfigError, match="is outside"):
        tokens_at_loss(law, 5e8, 4.0, 0.1)
    n, d, loss = iso_flop(law, 1e20, 4.0, points=201)
    np.testing.assert_allclose(6 * n * d, 1e20)
    best = int(loss.argmin())
    assert 0 < best < 200
    assert law.optimal_tokens(n[best], 4.0) == pytest.approx(d[best], rel=0.1)


def test_a_law_whose_optimum_does_not_grow():
    with pytest.raises(ConfigError, match="do not grow with the pool"):
        stage_shares(GranularityLaw(), 1e9, POOLS)
    with pytest.raises(ConfigError, match="e_start: 300"):
        JointMoELaw(e_start=300.0).validate()
