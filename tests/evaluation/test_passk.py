"""pass@k against exhaustive enumeration, intervals against closed forms and coverage."""

import itertools

import numpy as np
import pytest

from pr2jax.evaluation import passk


def test_pass_at_k_equals_enumeration():
    for n in range(1, 9):
        for c in range(n + 1):
            right = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                draws = list(itertools.combinations(right, k))
                want = sum(any(d) for d in draws) / len(draws)
                assert passk.pass_at_k(n, c, k) == pytest.approx(want, abs=1e-12)


def test_pass_at_k_on_many_problems_and_large_n():
    c = np.array([0, 1, 500, 999, 1000])
    values = passk.pass_at_k(1000, c, 500)
    assert values.shape == (5,)
    assert values[0] == 0.0
    assert values[1] == pytest.approx(0.5)  # one right among 1000: in half of the halves
    assert values[4] == 1.0
    np.testing.assert_allclose(passk.pass_at_k(1000, c, 1), c / 1000)


def test_avg_at_n():
    assert passk.avg_at_n(np.array([[0, 1], [0.5, 0.25]])).tolist() == [0.5, 0.375]


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_impossible_counts_are_errors(n, c, k):
    with pytest.raises(ValueError, match=r"pass@|right answers"):
        passk.pass_at_k(n, c, k)


def test_interval_is_deterministic_and_near_the_normal_one():
    values = np.random.default_rng(0).normal(2.0, 3.0, 1000)
    got = passk.bootstrap_interval(values)
    half = 1.959964 * values.std() / np.sqrt(len(values))
    assert got.mean == pytest.approx(values.mean())
    assert got.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert got.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert got == passk.bootstrap_interval(values)
    assert got != passk.bootstrap_interval(values, seed=1)


def test_interval_equals_exhaustive_bootstrap_of_three():
    # All 27 resamples of (0, 0, 1) have mean 0, 1/3, 2/3, 1 with chances 8, 12, 6, 1 of 27.
    got = passk.bootstrap_interval([0.0, 0.0, 1.0], confidence=0.9)
    assert got.low == 0.0  # 5% lies within the 8/27 at 0
    assert got.high == pytest.approx(2 / 3)  # 95% lies within the 26/27 at or below 2/3


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(5)
    inside = 0
    for trial in range(400):
        got = passk.bootstrap_interval(rng.random(100) < 0.3, resamples=500, seed=trial)
        inside += got.low <= 0.3 <= got.high
    # 95% nominal; 3 standard errors of 400 trials are 3.3%, and the bootstrap runs a little low.
    assert 0.90 <= inside / 400 <= 0.99


def test_edge_cases():
    assert passk.bootstrap_interval([0.1] * 7) == passk.Interval(
        pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1)
    )
    with pytest.raises(ValueError, match="non-empty"):
        passk.bootstrap_interval([])
    with pytest.raises(ValueError, match="finite"):
        passk.bootstrap_interval([0.0, float("nan")])
    assert passk.Interval(0.5, 0.4, 0.6).apart(passk.Interval(0.8, 0.7, 0.9))
    assert not passk.Interval(0.5, 0.4, 0.7).apart(passk.Interval(0.8, 0.7, 0.9))


def test_paired_interval_is_of_the_differences():
    rng = np.random.default_rng(1)
    before = rng.random(200)
    after = before + 0.1  # every problem gains the same: no width, however far the problems spread
    got = passk.paired_interval(before, after)
    assert (got.low, got.high) == (pytest.approx(0.1), pytest.approx(0.1))
    with pytest.raises(ValueError, match="not the same problems"):
        passk.paired_interval(before, after[:-1])


def test_ratio_interval():
    rng = np.random.default_rng(0)
    n, d = rng.normal(5.0, 1.0, 200), rng.uniform(1.0, 3.0, 200)
    found = passk.ratio_interval(n, d)
    assert found.mean == pytest.approx(n.sum() / d.sum())
    # Against resampled ratios, drawn here.
    draws = rng.integers(0, 200, (4000, 200))
    low, high = np.quantile(n[draws].sum(1) / d[draws].sum(1), [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.1 * (high - low))
    assert found.high == pytest.approx(high, abs=0.1 * (high - low))
    same = passk.ratio_interval(n, np.full(200, 2.0))
    plain = passk.bootstrap_interval(n / 2.0)
    assert (same.low, same.high) == pytest.approx((plain.low, plain.high))
    with pytest.raises(ValueError, match="denominators"):
        passk.ratio_interval(n, 0 * d)
