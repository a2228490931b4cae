"""Sampler against learner, same weights: what routing replay leaves of the difference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core import rng
from pr2jax.core.optim import build_optimizer
from pr2jax.core.params import init_params, map_with_path
from pr2jax.core.state import create
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.models.transformer import param_specs, predictor_params
from pr2jax.replay.modes import ReplayConfig, plan, selection_shift
from pr2jax.rl.batch import make_batch, split_micro
from pr2jax.rl.types import PREDICTOR_GROUP, RLConfig, predictor_group
from pr2jax.rl.update import make_mini_step
from pr2jax.sampler.engine import Sampler
from pr2jax.sampler.types import SamplerConfig, SamplingParams

CFG = ModelConfig(
    vocab_size=64,
    d_model=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    moe=MoEConfig(num_experts=16, top_k=2, expert_dim=32),
    init_stddev=0.3,  # logits of unit scale and above: a confident policy
)
ROWS, TOKENS = 32, 24


def _measure(mode: str, dtype, sampled=None) -> dict[str, float]:
    """Metrics of mini-step 1 on a rollout sampled under the same weights."""
    optim = dataclasses.replace(RLConfig().optim, groups={PREDICTOR_GROUP: predictor_group(10.0)})
    params = init_params(param_specs(CFG), rng.root(0))
    # A predictor that has learned something: half of the routes it predicts are not the live ones.
    params = map_with_path(
        lambda path, x: (
            0.3 * jax.random.normal(rng.named(rng.root(1), path), x.shape)
            if "predictor" in path
            else x
        ),
        params,
    )
    assert float(jnp.abs(predictor_params(params, CFG)).max()) > 0
    replay = ReplayConfig(mode=mode, feature_tokens=8)
    optimizer = build_optimizer(optim, params)
    state = create(params, optimizer)
    todo = plan(sampled or replay)
    sampler = Sampler(
        CFG,
        SamplerConfig(slots=ROWS, chunk=8, max_prompt=8, max_tokens=TOKENS, bucket=32),
        params=params,
        dtype=dtype,
    )
    prompts = np.random.default_rng(0).integers(0, 64, (ROWS // 4, 6)).tolist()
    rollout, features = sampler.rollout(
        prompts,
        4,
        SamplingParams(max_tokens=TOKENS, stop_ids=(0,)),
        key=rng.root(3),
        shift=selection_shift(todo, params, CFG, optim, state.opt_state),
        feature_tokens=8 if todo.features else 0,
    )
    recorder = plan(replay).recorder
    batch = make_batch(
        rollout,
        np.random.default_rng(1).normal(size=ROWS).astype(np.float32),
        bucket=8,
        use_routes=recorder == "sampler",
        features=features,
    )
    rl = RLConfig(prompts_per_batch=ROWS // 4, samples_per_prompt=4, mini_steps=1, micro_batch=16)
    step = make_mini_step(CFG, rl, replay, optimizer, dtype=dtype, donate=False)
    _, metrics = step(state, split_micro(jax.tree.map(jnp.asarray, batch), 16), False)
    return {k: float(s) / float(w) for k, (s, w) in metrics.items() if float(w)}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["r3", "pr2"])
def test_fp32_mismatch_and_ratio_with_replay(mode):
    found = _measure(mode, jnp.float32)
    assert found["behavior/abs"] <= 1e-5
    assert abs(found["ratio_mean"] - 1) <= 1e-5
    # The extremes are of one token each: exp of the largest difference of log-probs.
    assert found["ratio_max"] <= np.exp(found["behavior/abs_max"]) * (1 + 1e-6)
    assert found["ratio_min"] >= np.exp(-found["behavior/abs_max"]) * (1 - 1e-6)
    if mode == "pr2":
        assert found["zero_deviation"] < 0.9  # the predictor did move routes


@pytest.mark.slow
def test_bf16_mismatch_with_replay_beside_live_routing():
    replayed = _measure("r3", jnp.bfloat16)
    live = _measure("off", jnp.bfloat16)
    print(
        f"bf16 k3 KL: replayed {replayed['behavior/k3']:.2e}, live {live['behavior/k3']:.2e}; "
        f"mean |difference| {replayed['behavior/abs']:.2e}, {live['behavior/abs']:.2e}"
    )
    assert replayed["behavior/k3"] <= 7.5e-5
    assert replayed["behavior/k3"] < live["behavior/k3"]
    # Without replay the log still says how many tokens are routed as they were sampled.
    assert 0.5 < live["zero_deviation"] < 1.0
