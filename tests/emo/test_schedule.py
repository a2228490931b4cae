"""Stages: budgets, phases, and what does not fit."""

import dataclasses

import numpy as np
import pytest

from pr2jax.core.config import ConfigError
from pr2jax.core.optim import OptimConfig, learning_rate
from pr2jax.emo.expansion import GrowthConfig
from pr2jax.emo.schedule import EMOConfig, boundaries, growth_steps, plan_phases, with_schedule
from pr2jax.models.config import ModelConfig, MoEConfig

MODEL = ModelConfig(moe=MoEConfig(num_experts=8, top_k=8))
POOLS = (8, 16, 32, 64, 128)


def test_the_laws_shares_in_steps():
    """N = 0.73e9, k = 8: the shares of the published coefficients, cumulated and rounded."""
    cfg = EMOConfig(experts=POOLS, law_params=0.73e9)
    ends = boundaries(cfg, MODEL, 1000)
    np.testing.assert_allclose(np.diff([0, *ends]) / 10, [22.7, 9.7, 15.6, 22.6, 29.5], atol=0.11)
    assert ends[-1] == 1000


def test_phases_of_plain_growth():
    cfg = EMOConfig(experts=(8, 16, 32), budget="steps", steps=(5, 3, 2))
    cfg.validate()
    phases = plan_phases(cfg, MODEL, 10)
    assert [(p.start, p.stop, p.model.moe.num_experts, p.grows) for p in phases] == [
        (0, 5, 8, False),
        (5, 8, 16, True),
        (8, 10, 32, True),
    ]
    assert growth_steps(phases) == (5, 8)


def test_masked_growth_is_two_phases():
    growth = GrowthConfig(init="masked_copy")
    cfg = EMOConfig(
        experts=(8, 16), budget="shares", shares=(0.5, 0.5), growth=growth, unmask_steps=2
    )
    cfg.validate()
    phases = plan_phases(cfg, MODEL, 10)
    assert [(p.start, p.stop, p.model.moe.num_experts, p.model.moe.masked) for p in phases] == [
        (0, 5, 8, 0),
        (5, 7, 16, 8),
        (7, 10, 16, 0),
    ]
    assert [p.unmasks for p in phases] == [False, False, True]
    assert [p.stage for p in phases] == [0, 1, 1]
    assert growth_steps(phases) == (5,)
    with pytest.raises(ConfigError, match="unmask_steps: 5 leave nothing of the 5 steps"):
        plan_phases(dataclasses.replace(cfg, unmask_steps=5), MODEL, 10)


def test_the_rate_rises_again_after_growth():
    base = OptimConfig(
        learning_rate=1.0, schedule="wsd", total_steps=40, warmup_steps=4, decay_fraction=0.25
    )
    phases = plan_phases(EMOConfig(experts=(8, 16), budget="steps", steps=(20, 20)), MODEL, 40)
    cfg = with_schedule(base, phases, 5)
    rates = [float(learning_rate(cfg, i)) for i in range(40)]
    plain = [float(learning_rate(base, i)) for i in range(40)]
    np.testing.assert_allclose(rates[:20], plain[:20])
    np.testing.assert_allclose(rates[20:25], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[25:], plain[25:])


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"experts": (8, 8)}, "experts: .* must rise"),
        ({"experts": (8, 16), "budget": "shares"}, "shares: budget needs them"),
        ({"experts": (8, 16), "steps": (1, 2)}, "steps: budget is 'law', which has none"),
        ({"experts": (8, 16), "budget": "steps", "steps": (5,)}, "each of the 2 stages"),
        ({"experts": (8, 16), "budget": "shares", "shares": (0.5, 0.6)}, "add up to 1.1000"),
        ({"experts": (8, 16), "unmask_steps": 3}, "it alone can use it"),
        ({"experts": (8, 16), "growth": GrowthConfig(init="masked_copy")}, "needs it"),
        ({"rewarmup_steps": -1}, "rewarmup_steps: must be >= 0"),
    ],
)
def test_what_is_refused_alone(settings, message):
    with pytest.raises(ConfigError, match=message):
        EMOConfig(**settings).validate()


def test_what_does_not_fit_the_run():
    cfg = EMOConfig(experts=(8, 16), budget="steps", steps=(5, 3))
    with pytest.raises(ConfigError, match="add up to 8; the run has 10"):
        plan_phases(cfg, MODEL, 10)
    with pytest.raises(ConfigError, match="begin with 4, and the model has 8"):
        plan_phases(EMOConfig(experts=(4, 8)), MODEL, 10)
    with pytest.raises(ConfigError, match="stage of 16 experts would have none"):
        plan_phases(EMOConfig(experts=POOLS, law_params=0.73e9), MODEL, 4)
