"""Figures of rounds: by domain, and the named reward terms."""

import numpy as np
import pytest

from pr2jax.core.config import ConfigError
from pr2jax.rl.signal import learning_signal
from pr2jax.rl.types import RLConfig
from pr2jax.sampler.types import FINISH_STOP, Rollout
from pr2jax.tasks.rewards import RewardTerm
from pr2jax.train.rounds import Round, reward_terms, totals


def rollout(rewards, lengths, bonus=None):
    rows, width = len(rewards), 2 + max(lengths)
    return Rollout(
        tokens=np.zeros((rows, width), np.int32),
        prompt_lengths=np.full(rows, 2, np.int32),
        lengths=np.array(lengths, np.int32) + 2,
        loss_mask=np.ones((rows, width), np.float32),
        behavior_logprobs=np.zeros((rows, width), np.float32),
        routes=None,
        prompt_ids=np.zeros(rows, np.int32),
        group_ids=np.repeat(np.arange(rows // 2, dtype=np.int32), 2),
        policy_version=np.zeros((rows, width), np.int32),
        finish=np.full(rows, FINISH_STOP, np.int32),
        rewards=np.array(rewards, np.float32),
        bonus=bonus,
    )


def test_rewards_by_domain():
    rounds = [
        Round(
            rollout([1, 0, 0.5, 0.5], [1] * 4), None, np.arange(2), 0, 0, 0, {}, ["math", "code"]
        ),
        Round(rollout([1, 1], [1] * 2), None, np.arange(1), 0, 0, 0, {}, ["math"]),
    ]
    found = totals(rounds)
    assert found["reward"] == pytest.approx(4 / 6)
    assert found["reward/math"] == pytest.approx(3 / 4)
    assert found["solved/math"] == pytest.approx(3 / 4)
    assert (found["reward/code"], found["solved/code"]) == (0.5, 0.0)
    alone = [Round(rollout([1, 0], [1, 1]), None, np.arange(1), 0, 0, 0)]
    assert not [key for key in totals(alone) if "/" in key and not key.startswith("time/")]


def test_terms_shape_advantages_and_not_the_signal():
    terms = {
        "format": RewardTerm(kind="boxed", weight=0.5),
        "short": RewardTerm(kind="length", weight=-1.0, target=2, max=6),
    }
    texts = [r"\boxed{1}", "1", r"\boxed{2}", r"\boxed{3}"]
    drawn = rollout([1, 0, 1, 1], [2, 4, 6, 3])
    bonus, values = reward_terms(terms, drawn, texts)
    np.testing.assert_array_equal(values["format"], [1, 0, 1, 1])
    np.testing.assert_array_equal(values["short"], [1, 0.5, 0, 0.75])
    np.testing.assert_allclose(bonus, [-0.5, -0.5, 0.5, -0.25])
    assert reward_terms({}, drawn, texts) == (None, {})
    cfg = RLConfig(advantage="dr_grpo", rewards=terms)
    signal = learning_signal(drawn.replace(bonus=bonus), cfg)
    # Totals .5, -.5 | 1.5, .75; the second group's scores are all equal, so it is left out.
    np.testing.assert_allclose(signal.advantages, [0.5, -0.5, 0.375, -0.375])
    assert signal.keep.tolist() == [True, True, False, False]
    assert signal.metrics["kept_groups"] == 0.5


def test_a_bad_term_is_named():
    from pr2jax.core.config import from_config_dict

    bad = {"rewards": {"short": {"kind": "length", "weight": 1.0}}}
    with pytest.raises(ConfigError, match=r"rl\.rewards\.short\.max: "):
        from_config_dict(RLConfig, bad, "rl")
