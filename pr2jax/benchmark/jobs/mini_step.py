"""Our learner's update alone, as in mini-steps 2 and later of a batch, in mode r3 or pr2.

Also what its router features take in memory, and whether its program works for the predictor.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from pr2jax.benchmark.hlo import predictor_calls, predictor_users
from pr2jax.benchmark.jobs.common import Bench, rounds, start, timed, tree_bytes
from pr2jax.benchmark.jobs.grpo import run_config
from pr2jax.benchmark.serve import Channel
from pr2jax.core.optim import build_optimizer
from pr2jax.core.rng import root
from pr2jax.core.state import create
from pr2jax.models.config import ModelConfig, num_moe_layers
from pr2jax.models.flops import forward_flops
from pr2jax.models.transformer import param_specs
from pr2jax.replay.modes import plan, selection_shift
from pr2jax.rl.batch import make_batch, split_micro
from pr2jax.rl.types import LearnerBatch
from pr2jax.rl.update import make_mini_step
from pr2jax.sampler.engine import Sampler


def feature_bytes(cfg: ModelConfig, rows: int, places: int) -> int:
    """L rows T_c (2 D + 4 E): inputs in bfloat16 and logits in float32 at every kept token."""
    return num_moe_layers(cfg) * rows * places * (2 * cfg.d_model + 4 * cfg.moe.num_experts)


def sampled_batch(
    bench: Bench, cfg, params, optimizer, state
) -> tuple[LearnerBatch, dict[str, Any]]:
    """One mini-batch out of our sampler; and its features' bytes, if it has some."""
    sizes, todo = bench.sizes, plan(cfg.replay)
    sampler = Sampler(cfg.model, cfg.sampler, params=params, dtype=bench.dtype)
    shift = selection_shift(todo, params, cfg.model, optimizer.cfg, state.opt_state)
    rollout, features = sampler.rollout(
        bench.params["prompts"],
        sizes.samples,
        cfg.rl.sampling,
        key=root(0),
        shift=shift,
        feature_tokens=todo.features,
    )
    advantages = np.random.default_rng(0).normal(size=len(rollout.lengths)).astype(np.float32)
    batch = make_batch(
        rollout, advantages, bucket=cfg.rl.length_bucket, use_routes=True, features=features
    ).replace(shift=shift)
    memory = {}
    if features is not None:
        places = features.positions.shape[1]
        memory = {
            "rows": len(rollout.lengths),
            "places": places,
            "bytes": tree_bytes(features.logits, features.inputs),
            "index_bytes": tree_bytes(features.positions, features.mask),
            "predicted_bytes": feature_bytes(cfg.model, len(rollout.lengths), places),
        }
    return jax.device_put(split_micro(batch, cfg.rl.micro_batch)), memory


def serve(channel: Channel, params: dict[str, Any]) -> None:
    """params: those of `start`; prompts, mode, learning_rate, clip_norm."""
    bench = start(params)
    cfg = run_config(bench, mini_steps=1)
    weights = bench.load()
    optimizer = build_optimizer(cfg.rl.optim, param_specs(cfg.model))
    state = create(weights, optimizer)
    batch, memory = sampled_batch(bench, cfg, weights, optimizer, state)
    step = make_mini_step(cfg.model, cfg.rl, cfg.replay, optimizer, dtype=bench.dtype)
    lowered = step.lower(state, batch, True)
    work = {
        "calls": predictor_calls(lowered),
        "instructions": len(predictor_users(lowered.compile().as_text())),
    }

    def one() -> dict[str, float]:
        nonlocal state
        state, _ = step(state, batch, True)
        jax.block_until_ready(state)
        return {}

    first, _ = timed(one)
    one()
    real = int(np.sum(batch.lengths))
    ready = bench.ready(
        first_step_seconds=first,
        flops=3 * forward_flops(cfg.model, real, (batch.tokens.shape[-1] + 1) / 2),
        settings={"mode": bench.mode},
        predictor_work=work,
        features=memory,
    )
    channel.loop(ready, rounds(bench, one))
