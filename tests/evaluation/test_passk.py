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


def combinations(n, k):
    return list(itertools.combinations(range(n), k))


def enumerate_extreme(scores, k, take):
    draws = combinations(len(scores), k)
    return sum(take(scores[i] for i in d) for d in draws) / len(draws)


def enumerate_majority(answers, scores, k):
    """The definition, draw by draw: ties shared evenly, no answer has no vote."""
    groups = {a: [s for b, s in zip(answers, scores, strict=True) if a == b] for a in answers}
    score = {a: sum(s) / len(s) for a, s in groups.items()}
    total = 0.0
    draws = combinations(len(answers), k)
    for draw in draws:
        votes = {}
        for i in draw:
            if answers[i] is not None:
                votes[answers[i]] = votes.get(answers[i], 0) + 1
        if votes:
            best = [a for a, v in votes.items() if v == max(votes.values())]
            total += sum(score[a] for a in best) / len(best)
        else:
            total += score[None]
    return total / len(draws)


def test_best_and_worst_equal_enumeration():
    rng = np.random.default_rng(0)
    for n in range(1, 9):
        scores = np.stack(
            [rng.random(n), rng.integers(0, 2, n), rng.choice([0.0, 0.25, 1.0], n), np.ones(n)]
        )
        for k in range(1, n + 1):
            want = [[enumerate_extreme(row, k, take) for row in scores] for take in (max, min)]
            np.testing.assert_allclose(passk.best_at_k(scores, k), want[0], atol=1e-12)
            np.testing.assert_allclose(passk.worst_at_k(scores, k), want[1], atol=1e-12)
            right = scores[1].sum().astype(int)
            assert passk.best_at_k(scores, k)[1] == pytest.approx(passk.pass_at_k(n, right, k))
        np.testing.assert_allclose(passk.best_at_k(scores, 1), passk.avg_at_n(scores))
        np.testing.assert_allclose(passk.worst_at_k(scores, 1), passk.avg_at_n(scores))


def test_majority_equals_enumeration():
    rng = np.random.default_rng(1)
    for n in range(1, 9):
        rows = [["a"] * n, [None] * n, list(range(n))]
        rows += [[rng.choice([None, "a", "b", "c", "d"]) for _ in range(n)] for _ in range(12)]
        rows += [[rng.choice(["a", "b"]) for _ in range(n)] for _ in range(6)]
        scores = rng.choice([0.0, 0.3, 1.0], (len(rows), n))  # also unequal within an answer
        for k in range(1, n + 1):
            want = [enumerate_majority(a, s, k) for a, s in zip(rows, scores, strict=True)]
            np.testing.assert_allclose(passk.majority_at_k(rows, scores, k), want, atol=1e-12)


def test_majority_of_many_samples():
    # 300 right of 500, the others all wrong in one way: k = 1 is their share, and the share of
    # draws of 101 that hold at least 51 right ones is the hypergeometric distribution's tail.
    from scipy.stats import hypergeom

    answers, scores = [["r"] * 300 + ["w"] * 200], np.array([[1.0] * 300 + [0.0] * 200])
    assert passk.majority_at_k(answers, scores, 1) == pytest.approx([0.6])
    want = hypergeom(500, 300, 101).sf(50)
    assert passk.majority_at_k(answers, scores, 101) == pytest.approx([want], abs=1e-10)
    assert passk.majority_at_k(answers, scores, 500) == pytest.approx([1.0])


def test_majority_asks_for_an_answer_a_score():
    with pytest.raises(ValueError, match="as many answers"):
        passk.majority_at_k([["a"]], np.zeros((1, 2)), 1)
    with pytest.raises(ValueError, match="maj@3 needs"):
        passk.majority_at_k([["a", "b"]], np.zeros((1, 2)), 3)
    for name in ("best", "worst"):
        with pytest.raises(ValueError, match=f"{name}@0 needs"):
            getattr(passk, f"{name}_at_k")(np.zeros((1, 2)), 0)


def test_macro_interval_weighs_groups_the_same():
    rng = np.random.default_rng(2)
    small, large = rng.random(50), rng.random(2000) + 1.0
    found = passk.macro_interval([small, large])
    assert found.mean == pytest.approx((small.mean() + large.mean()) / 2)
    # Independent means: the variances of the halves add.
    error = np.sqrt(small.var() / 50 + large.var() / 2000) / 2
    assert found.high - found.low == pytest.approx(2 * 1.959964 * error, rel=0.1)
    one = passk.macro_interval([small])
    assert (one.low, one.high) == pytest.approx(
        (passk.bootstrap_interval(small).low, passk.bootstrap_interval(small).high)
    )
    with pytest.raises(ValueError, match="no group"):
        passk.macro_interval([])


def test_zero_inside_or_outside():
    assert passk.Interval(0.1, 0.05, 0.2).excludes_zero
    assert passk.Interval(-0.1, -0.2, -0.05).excludes_zero
    assert not passk.Interval(0.1, 0.0, 0.2).excludes_zero
