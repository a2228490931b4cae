"""The sampler and the learner together: a rollout's own log-probs, routes and features."""

import numpy as np
import pytest

from pr2jax.core.rng import root
from pr2jax.replay.modes import ReplayConfig, plan, selection_shift
from pr2jax.rl.batch import make_batch, split_micro
from pr2jax.rl.scoring import make_scorer
from pr2jax.rl.update import make_mini_step
from pr2jax.sampler.engine import Sampler
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from tests.rl import tiny
from tests.rl.tiny import MODEL, value

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8], [9, 1]]
TEMPERATURE = 0.8
# Fewer kept tokens than a long response has, so that the reservoir has to choose.
CFG = ReplayConfig(mode="pr2", feature_tokens=4)


@pytest.fixture(scope="module")
def live():
    """A pr2 rollout with W_p != 0, and the batch made of it."""
    params = tiny.make_params(predictor=0.3)
    optimizer = tiny.make_optimizer(params)
    state = tiny.make_state(params, optimizer)
    config = SamplerConfig(
        slots=8, chunk=4, max_prompt=4, max_tokens=8, bucket=12, prefill_rows=4, unroll_layers=False
    )
    rollout, features = Sampler(MODEL, config).rollout(
        PROMPTS,
        2,
        SamplingParams(temperature=TEMPERATURE, max_tokens=8, stop_ids=(0,)),
        params=params,
        key=root(3),
        shift=selection_shift(plan(CFG), params, MODEL, optimizer.cfg, state.opt_state),
        feature_tokens=CFG.feature_tokens,
    )
    advantages = np.random.default_rng(0).normal(size=8).astype(np.float32)
    batch = make_batch(rollout, advantages, bucket=4, use_routes=True, features=features)
    return optimizer, state, rollout, batch


def test_features_are_those_of_the_replayed_forward(live):
    """Recorded while decoding with shifted routes = recomputed by a pass that replays the log."""
    _, state, rollout, batch = live
    kept = batch.features
    scorer = make_scorer(MODEL, temperature=TEMPERATURE)
    places = (np.asarray(kept.positions), np.asarray(kept.mask))
    again = tiny.score(state.params, batch, places, micro=4, scorer=scorer).features
    decoded = rollout.lengths - rollout.prompt_lengths - 1
    np.testing.assert_array_equal(places[1].sum(1), np.minimum(decoded, CFG.feature_tokens))
    assert np.any(decoded > CFG.feature_tokens)
    mask = places[1]
    logits = np.asarray(kept.logits)[:, mask], np.asarray(again.logits)[:, mask]
    np.testing.assert_allclose(*logits, atol=1e-4)
    inputs = (np.asarray(x.inputs, np.float32)[:, mask] for x in (kept, again))
    np.testing.assert_allclose(*inputs, rtol=2**-7, atol=1e-4)  # either side of a bf16 rounding


@pytest.mark.slow
def test_first_mini_step_on_a_real_rollout(live):
    optimizer, state, _, batch = live
    rl = tiny.rl_config(sampling=SamplingParams(temperature=TEMPERATURE))
    step = tiny.fast(make_mini_step(MODEL, rl, CFG, optimizer, donate=False))
    _, metrics = step(state, split_micro(batch, 8), False)
    for name in ("ratio_min", "ratio_mean", "ratio_max"):
        np.testing.assert_allclose(value(metrics, name), 1.0, atol=1e-4, err_msg=name)
    assert value(metrics, "behavior/abs") <= 1e-5
    assert value(metrics, "zero_deviation") < 1.0  # the shift moved routes,
    assert value(metrics, "flips") == 0.0  # the un-shifted router did not move
    assert value(metrics, "tokens") == batch.loss_mask.sum()
