"""The fit against known laws, its gradient against differences, and what a bad table says."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from pr2jax.core.config import ConfigError
from pr2jax.scaling.fitting import COEFFICIENTS, Runs, _Problem, bootstrap, fit_joint_law
from pr2jax.scaling.laws import JointMoELaw

LAW = JointMoELaw()
HEADER = "active_params,tokens,experts,top_k,loss"
ROW = "1e8,2e9,64,8,3.1"


def grid(sizes, noise=0.0, seed=0):
    """Runs of the published law at `sizes` parameters, with log-normal noise."""
    n, ratio, e = (a.ravel() for a in np.meshgrid(sizes, [10, 30, 100, 300], [1, 2, 4, 8, 16, 32]))
    rng = np.random.default_rng(seed)
    loss = LAW.loss(n, n * ratio, e) * np.exp(noise * rng.standard_normal(n.size))
    return Runs(n, n * ratio, e, loss)


TRAIN, CHOICE, FAR = np.geomspace(5e7, 1e9, 4), [1.4e9], [2e9, 4e9]


def error(law, runs):
    """Mean relative error of the predicted loss."""
    return float(np.mean(np.abs(law.loss(runs.n, runs.d, runs.e) / runs.loss - 1)))


def noisy_fit(seed, **settings):
    runs = grid(TRAIN, 0.005, seed)
    return runs, fit_joint_law(runs, held_out=grid(CHOICE, 0.005, seed + 1000), **settings)


@pytest.mark.parametrize("noise", [0.003, 0.3], ids=["inside delta", "beyond delta"])
def test_gradient_by_differences(noise):
    problem = _Problem.of(grid(TRAIN, noise), 0.01)
    rng = np.random.default_rng(1)
    for _ in range(5):
        v = problem.vector(LAW) + 0.01 * rng.standard_normal(11)
        value = lambda u: problem.objective(u)[0]
        forward, back = approx_fprime(v, value, 1e-7), approx_fprime(v, value, -1e-7)
        gradient = problem.objective(v)[1]
        np.testing.assert_allclose(
            gradient, (forward + back) / 2, rtol=1e-4, atol=1e-5 * np.abs(gradient).max()
        )


def test_vector_and_law_are_inverse_and_agree_with_the_law():
    problem = _Problem.of(grid(TRAIN), 0.01)
    back = problem.law(problem.vector(LAW))
    np.testing.assert_allclose(dataclasses.astuple(back), dataclasses.astuple(LAW), rtol=1e-10)
    np.testing.assert_allclose(problem.residuals(problem.vector(LAW))[0], 0.0, atol=1e-12)


def test_ends_stay_in_order_for_any_vector():
    problem = _Problem.of(grid(TRAIN), 0.01)
    for u in (-40.0, -5.0, 0.0, 5.0, 40.0):
        for w in (-40.0, 0.0, 40.0):
            v = problem.vector(LAW)
            v[8:10] = u, w
            law = problem.law(v)
            assert 1 < law.e_start < law.e_max
            assert np.isfinite(problem.objective(v)[0])
            assert np.isfinite(law.effective_experts(8.0))


@pytest.mark.slow
def test_recovers_a_law_from_runs_without_noise():
    far = grid(FAR)
    fit = fit_joint_law(grid(TRAIN), held_out=grid(CHOICE))
    assert error(fit.law, far) < 1e-6
    assert fit.train_rmse < 1e-6
    assert fit.held_out_rmse < 1e-6
    assert (fit.starts, fit.delta) == (16, 0.01)
    np.testing.assert_allclose(
        dataclasses.astuple(fit.law), dataclasses.astuple(LAW), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_predicts_larger_runs_from_noisy_ones(seed):
    runs, fit = noisy_fit(seed, starts=8)
    assert error(fit.law, grid(FAR)) < 0.01
    assert fit.train_rmse < 0.006
    log = np.log(fit.law.loss(runs.n, runs.d, runs.e)) - np.log(runs.loss)
    assert fit.train_rmse == pytest.approx(np.sqrt(np.mean(log**2)), rel=1e-12)
    size = np.abs(log)
    huber = np.where(size <= 0.01, size**2 / 2, 0.01 * (size - 0.005)).mean()
    assert fit.objective == pytest.approx(huber, rel=1e-6)


@pytest.mark.slow
def test_an_outlier_pulls_little():
    runs = grid(TRAIN)
    loss = runs.loss.copy()
    loss[7] *= 1.5
    fit = fit_joint_law(dataclasses.replace(runs, loss=loss), starts=8)
    assert error(fit.law, grid(CHOICE)) < 0.002


def test_bootstrap_covers_its_fit_and_repeats():
    runs, fit = noisy_fit(1, starts=4)
    first, again = (bootstrap(runs, fit, samples=12, seed=3, level=0.9) for _ in range(2))
    assert first == again
    assert tuple(first.coefficients) == COEFFICIENTS
    assert all(low <= high for low, high in first.coefficients.values())
    assert len(first.laws) + first.failed == first.samples == 12
    assert f"{first.failed} refits failed" in str(first)
    low, high = first.loss_interval(np.array([2e9, 4e9]), 1e11, 8.0)
    losses = [law.loss(2e9, 1e11, 8.0) for law in first.laws]
    np.testing.assert_allclose([low[0], high[0]], np.quantile(losses, [0.05, 0.95]))
    assert np.all(high - low < 0.1 * low)


def test_settings_without_meaning():
    runs = grid(TRAIN)
    with pytest.raises(ConfigError, match="runs: 11 runs, at least 12"):
        fit_joint_law(runs.take(np.arange(11)))
    with pytest.raises(ConfigError, match="runs: all have the same e"):
        fit_joint_law(runs.take(runs.e == 4))
    with pytest.raises(ConfigError, match="starts: 0"):
        fit_joint_law(runs, starts=0)
    with pytest.raises(ConfigError, match="delta: -1"):
        fit_joint_law(runs, delta=-1)
    with pytest.raises(ConfigError, match="held_out: no runs"):
        fit_joint_law(runs, held_out=runs.take(np.arange(0)))
    fit = fit_joint_law(runs, starts=1)
    with pytest.raises(ConfigError, match="samples: 1"):
        bootstrap(runs, fit, samples=1)
    with pytest.raises(ConfigError, match="level: 95"):
        bootstrap(runs, fit, level=95)
    with pytest.raises(ConfigError, match="loss: every value"):
        Runs(runs.n, runs.d, runs.e, -runs.loss)
    with pytest.raises(ConfigError, match="e: shape"):
        Runs(runs.n, runs.d, runs.e[:5], runs.loss)
    with pytest.raises(ConfigError, match="e: experts"):
        Runs(runs.n, runs.d, runs.e / 2, runs.loss)


def test_reads_a_table(tmp_path):
    path = tmp_path / "runs.csv"
    names = "name,loss,top_k,experts,tokens,active_params\n"
    path.write_text("\ufeff" + names + "a,3.25,8,64,2e9,1e8\n\n" * 12, encoding="utf-8")
    runs = Runs.from_csv(path)
    assert len(runs) == 12
    assert (runs.n[3], runs.d[3], runs.e[3], runs.loss[3]) == (1e8, 2e9, 8.0, 3.25)
    assert len(Runs.from_csv(path, at_least=1)) == 12


@pytest.mark.parametrize(
    "text,message",
    [
        ("active_params,tokens,experts,top_k\n", "line 1, column loss: missing"),
        (HEADER + ",loss\n", "line 1, column loss: twice"),
        ("", "line 1, column active_params: missing"),
        (f"{HEADER}\n{ROW}\n1e8,many,64,8,3\n", "line 3, column tokens: 'many' is not a number"),
        (f"{HEADER}\n{ROW}\n\n1e8,,64,8,3\n", "line 4, column tokens: '' is not a number"),
        (f"{HEADER}\n1e8,2e9,64,8,nan\n", "line 2, column loss: 'nan' is not finite"),
        (f"{HEADER}\n1e8,2e9,64,8,inf\n", "line 2, column loss: 'inf' is not finite"),
        (f"{HEADER}\n-1e8,2e9,64,8,3\n", "line 2, column active_params: '-1e8' is not"),
        (f"{HEADER}\n1e8,2e9,64,0,3\n", "line 2, column top_k: '0' is not"),
        (f"{HEADER}\n1e8,2e9,4,8,3\n", "line 2, column top_k: 8 is more than 4 experts"),
        (f"{HEADER}\n1e8,2e9,64,8\n", "line 2, column loss: 4 cells for 5"),
        (f"{HEADER}\n{ROW},9\n", "line 2, column 6: 6 cells for 5"),
        (f"{HEADER}\n" + f"{ROW}\n" * 11, "11 runs, at least 12"),
    ],
)
def test_a_bad_table(tmp_path, text, message):
    path = tmp_path / "runs.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        Runs.from_csv(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_no_table(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as a table"):
        Runs.from_csv(tmp_path / "absent.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as a table"):
        Runs.from_csv(tmp_path / "bytes.csv")


@pytest.mark.slow
def test_error_and_coverage_over_twenty_seeds():
    """Nominal 95% intervals of the true loss, inside the range of the runs and beyond it."""
    near, far = grid(np.geomspace(7e7, 7e8, 3)), grid(FAR)
    errors, covered_near, covered_far, failed = [], [], [], 0
    for seed in range(20):
        runs, fit = noisy_fit(seed)
        errors.append(error(fit.law, far))
        boot = bootstrap(runs, fit, samples=40, seed=seed)
        failed += boot.failed
        for points, covered in ((near, covered_near), (far, covered_far)):
            low, high = boot.loss_interval(points.n, points.d, points.e)
            covered.append(np.mean((low <= points.loss) & (points.loss <= high)))
    print(f"\nerror: mean {np.mean(errors):.5f}, worst seed {np.max(errors):.5f}")
    print(f"coverage near {np.mean(covered_near):.3f}, far {np.mean(covered_far):.3f}")
    print(f"failed refits: {failed} of 800")
    assert np.mean(errors) <= 0.01
    assert np.mean(covered_near) >= 0.7
    assert np.mean(covered_far) >= 0.7
