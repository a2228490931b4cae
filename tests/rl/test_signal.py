"""From a scored rollout to advantages, kept groups and masks."""

import dataclasses

import numpy as np
import pytest

from pr2jax.rl.signal import learning_signal
from pr2jax.sampler.types import FINISH_LENGTH, FINISH_STOP, Rollout, SamplingParams
from tests.rl import tiny

PROMPT, MAX_TOKENS = 2, 10
# Four groups of two: mixed, all right, mixed, mixed and cut off as a whole.
REWARDS = np.array([1, 0, 1, 1, 0, 1, 0, 1], np.float32)
RESPONSES = np.array([3, 10, 4, 8, 9, 2, 10, 10])
CUT = RESPONSES == MAX_TOKENS
GROUPS = np.repeat([4, 2, 7, 1], 2).astype(np.int32)


@pytest.fixture
def rollout():
    place, lengths = np.arange(12), (PROMPT + RESPONSES).astype(np.int32)
    mask = (place >= PROMPT) & (place < lengths[:, None])
    zeros = np.zeros((8, 12), np.float32)
    return Rollout(
        tokens=zeros.astype(np.int32),
        prompt_lengths=np.full(8, PROMPT, np.int32),
        lengths=lengths,
        loss_mask=mask.astype(np.float32),
        behavior_logprobs=zeros,
        routes=None,
        prompt_ids=GROUPS,
        group_ids=GROUPS,
        policy_version=zeros.astype(np.int32),
        finish=np.where(CUT, FINISH_LENGTH, FINISH_STOP).astype(np.int8),
        rewards=REWARDS,
    )


def config(**settings):
    cfg = tiny.rl_config(advantage="dr_grpo", sampling=SamplingParams(max_tokens=MAX_TOKENS))
    cfg = dataclasses.replace(cfg, **settings)
    cfg.validate()
    return cfg


def test_plain(rollout):
    signal = learning_signal(rollout, config())
    np.testing.assert_array_equal(signal.advantages, [0.5, -0.5, 0, 0, -0.5, 0.5, -0.5, 0.5])
    np.testing.assert_array_equal(signal.keep, [1, 1, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(signal.loss_mask, rollout.loss_mask)
    assert signal.metrics == {"kept_groups": 0.75}
    assert learning_signal(rollout, config(filter_zero_variance=False)).keep.all()


def test_overlong_shapes_advantages_and_not_what_is_kept(rollout):
    """A buffer of 4 before 10 tokens at half the size: 3, 10, 4, 8, 9, 2, 10, 10 tokens."""
    cfg = config(overlong_buffer=4, overlong_penalty=0.5, filter_zero_variance=False)
    added = np.array([0, -0.5, 0, -0.25, -0.375, 0, -0.5, -0.5])
    shaped = (REWARDS + added).reshape(4, 2)
    signal = learning_signal(rollout, cfg)
    want = (shaped - shaped.mean(1, keepdims=True)).ravel()
    np.testing.assert_allclose(signal.advantages, want, rtol=1e-6)
    assert np.any(signal.advantages[2:4] != 0)
    assert signal.metrics["overlong"] == 5 / 8
    assert signal.metrics["overlong_penalty"] == pytest.approx(added.mean())
    assert signal.metrics["kept_groups"] == 0.75
    # The group whose scores are equal stays out where the filter is on.
    signal = learning_signal(rollout, dataclasses.replace(cfg, filter_zero_variance=True))
    np.testing.assert_array_equal(signal.keep, [1, 1, 0, 0, 1, 1, 1, 1])


def test_truncated_responses_leave_the_loss_but_not_the_baseline(rollout):
    signal = learning_signal(rollout, config(mask_truncated=True))
    np.testing.assert_array_equal(signal.loss_mask[CUT], 0)
    np.testing.assert_array_equal(signal.loss_mask[~CUT], rollout.loss_mask[~CUT])
    assert signal.advantages[0] == 0.5  # its only companion was cut off
    np.testing.assert_array_equal(signal.keep, [1, 1, 0, 0, 1, 1, 0, 0])
    assert signal.metrics["truncated"] == 3 / 8


def test_rows_that_only_fill_count_nowhere(rollout):
    usable = np.array([1, 1, 0, 0, 1, 1, 0, 0], bool)
    cfg = config(advantage="batch", overlong_buffer=4)
    signal = learning_signal(rollout, cfg, usable)
    part = lambda x: x[usable]
    rewards = part(REWARDS) + np.array([0, -1, -0.75, 0])
    centred = rewards - np.repeat(rewards.reshape(2, 2).mean(1), 2)
    want = centred / (rewards.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(part(signal.advantages), want, rtol=1e-6)
    assert not np.any(signal.advantages[~usable])
    np.testing.assert_array_equal(signal.keep, usable)
    assert signal.metrics == {"kept_groups": 1.0, "overlong": 0.5, "overlong_penalty": -0.4375}
    nothing = learning_signal(rollout, cfg, np.zeros(8, bool))
    assert not nothing.keep.any()
    assert nothing.metrics["overlong"] == 0.0
