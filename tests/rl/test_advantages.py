"""Group advantages against closed forms and a loop."""

import numpy as np
import pytest

from pr2jax.rl.advantages import group_advantages, zero_variance


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


def test_a_bad_reward_is_named():
    with pytest.raises(ValueError, match="row 2"):
        group_advantages(np.array([1.0, 0, np.nan]), np.zeros(3, int))
