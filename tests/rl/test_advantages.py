"""Group advantages against closed forms and a loop."""

import numpy as np
import pytest

from pr2jax.rl.advantages import group_advantages, overlong_penalty, zero_variance


def test_against_a_loop_over_groups_of_any_size_and_order():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5, 40)
    rewards = rng.random(40)
    got = group_advantages(rewards, ids, eps=1e-6)
    for g in range(5):
        own = rewards[ids == g]
        want = (own - own.mean()) / (own.std(ddof=1) + 1e-6)
        np.testing.assert_allclose(got[ids == g], want, rtol=1e-6)


def test_binary_closed_form():
    """One right of four: mean 1/4, sample std 1/2, so 3/2 and -1/2."""
    got = group_advantages(np.array([1.0, 0, 0, 0]), np.zeros(4, int), eps=0.0)
    np.testing.assert_allclose(got, [1.5, -0.5, -0.5, -0.5])


def test_equal_rewards_give_exactly_zero_despite_rounding():
    rewards = np.full(7, 0.1)  # 7 * 0.1 / 7 != 0.1 in floating point
    ids = np.zeros(7, int)
    assert np.all(group_advantages(rewards, ids, eps=1e-20) == 0)
    assert zero_variance(rewards, ids).all()


def test_zero_variance_is_by_group():
    rewards = np.array([1.0, 0, 1, 1, 0, 0])
    ids = np.array([9, 4, 4, 9, 2, 2])
    np.testing.assert_array_equal(
        zero_variance(rewards, ids), [True, False, False, True] + [True] * 2
    )


@pytest.mark.parametrize("estimator", ["dr_grpo", "rloo", "batch"])
def test_estimators_against_a_loop(estimator):
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 5, 40)
    rewards = rng.random(40)
    got = group_advantages(rewards, ids, estimator)
    for i in range(40):
        group = [j for j in range(40) if ids[j] == ids[i]]
        others = [rewards[j] for j in group if j != i]
        centred = rewards[i] - sum(rewards[j] for j in group) / len(group)
        spread = np.sqrt(sum((r - rewards.mean()) ** 2 for r in rewards) / 39)
        want = {
            "dr_grpo": centred,
            "rloo": rewards[i] - sum(others) / len(others),
            "batch": centred / (spread + 1e-6),
        }[estimator]
        np.testing.assert_allclose(got[i], want, rtol=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "batch"])
def test_no_signal_is_exactly_zero(estimator):
    """Equal rewards, and groups of one, beside a group that has a signal."""
    rewards = np.array([0.1] * 7 + [0.3] + [0.0, 1.0])
    ids = np.array([0] * 7 + [1] + [2, 2])
    got = group_advantages(rewards, ids, estimator)
    assert not np.any(got[:8])
    assert got[9] == -got[8] > 0
    assert not np.any(group_advantages(rewards[:1], ids[:1], estimator))


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="gae"):
        group_advantages(np.zeros(2), np.zeros(2, int), "gae")


def test_overlong_penalty():
    """DAPO's own figures: 16384 expected tokens and a buffer of 4096."""
    lengths = np.array([0, 16384, 16385, 18432, 20480])
    got = overlong_penalty(lengths, 20480, 4096)
    np.testing.assert_allclose(got, [0, 0, -1 / 4096, -0.5, -1])
    assert not np.any(overlong_penalty(lengths, 20480, 0))


def test_a_bad_reward_is_named():
    with pytest.raises(ValueError, match="row 2"):
        group_advantages(np.array([1.0, 0, np.nan]), np.zeros(3, int))
