"""Fits against laws that are known, and what a malformed file is told."""

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from pr2jax.core.config import ConfigError
from pr2jax.scaling.fitting import Runs, _Problem, _starts, bootstrap, fit_joint_law
from pr2jax.scaling.laws import JointMoELaw

LAW = JointMoELaw()


def synthetic(noise, seed, count=96):
    """Runs of the published law over 3 decades of N and D and E / k of 1 to 32."""
    draw = np.random.default_rng(seed)
    n = 10 ** draw.uniform(7, 9.5, count)
    d = 10 ** draw.uniform(8.5, 11.5, count)
    e = 2.0 ** draw.integers(0, 6, count)
    return Runs(n, d, e, LAW.loss(n, d, e) * np.exp(noise * draw.normal(size=count)))


def test_gradient_by_differences():
    problem = _Problem.of(synthetic(0.01, 0), 0.01, 18.0, 23.0)
    draw = np.random.default_rng(1)
    for start in _starts(problem)[::5]:
        v = start + 0.05 * draw.normal(size=start.size)
        slopes = approx_fprime(v, lambda v: problem(v)[0], 1e-7)
        np.testing.assert_allclose(problem(v)[1], slopes, rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(problem.vector(problem.law(v)), v, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(problem.vector(LAW)[[1, 5]], [LAW.alpha, LAW.beta])


def test_a_law_without_noise_is_found_again():
    runs, apart = synthetic(0.0, 0), synthetic(0.0, 1)
    fit = fit_joint_law(runs, apart)
    assert fit.train_rmse < 1e-3
    assert fit.held_out_rmse < 1e-3
    assert fit.law.c == pytest.approx(LAW.c, rel=0.1)


@pytest.mark.parametrize("seed", range(2))
def test_half_a_percent_of_noise(seed):
    truth = synthetic(0.0, 100 + seed)
    fit = fit_joint_law(synthetic(0.005, seed))
    error = fit.law.loss(truth.n, truth.d, truth.e) / truth.loss - 1.0
    assert np.mean(np.abs(error)) <= 0.01
    assert 0.003 < fit.train_rmse < 0.007


@pytest.mark.slow
def test_intervals_cover(capsys):
    """20 seeds of 0.5% noise: held-out error at most 1%; the coverage of 95% intervals is told."""
    covered, errors = [], []
    points = synthetic(0.0, 999, count=30)
    at = (points.n, points.d, points.e)
    for seed in range(20):
        runs = synthetic(0.005, seed)
        fit = fit_joint_law(runs)
        low, high = bootstrap(runs, fit, at, samples=50, seed=seed).loss
        covered.append(np.mean((low <= points.loss) & (points.loss <= high)))
        errors.append(np.mean(np.abs(fit.law.loss(*at) / points.loss - 1.0)))
    with capsys.disabled():
        print(f"\ncoverage {np.mean(covered):.3f}, held-out error {np.mean(errors):.4%} (mean)")
    assert max(errors) <= 0.01
    assert np.mean(covered) >= 0.7


def test_files(tmp_path):
    path = tmp_path / "runs.csv"
    head = "name,active_params,tokens,experts,top_k,loss\n"
    good = "".join(f"r,{1e7 + i},{1e9},{8},{2},{3.0}\n" for i in range(12))
    path.write_text(head + good)
    runs = Runs.from_csv(path)
    assert len(runs) == 12
    assert set(runs.e) == {4.0}
    path.write_text(head + good + "r,1e7,1e9,8,2,nan\n")
    with pytest.raises(ConfigError, match=r"runs.csv, line 14, loss: 'nan' is not a number above"):
        Runs.from_csv(path)
    path.write_text(head.replace("tokens", "tokns") + good)
    with pytest.raises(ConfigError, match="line 1: no column 'tokens'"):
        Runs.from_csv(path)
    path.write_text(head + good[: len(good) // 2])
    with pytest.raises(ConfigError, match="need 12"):
        Runs.from_csv(path)
    with pytest.raises(ConfigError, match="no such file"):
        Runs.from_csv(tmp_path / "none.csv")
