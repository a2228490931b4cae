"""Our decoding: `Sampler.rollout`, with the log-probs and routes that it always logs.

Mode "pr2" also shifts the selection by the predictor and keeps router features, as RL does.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pr2jax.benchmark.jobs.common import rounds, start, timed
from pr2jax.benchmark.serve import Channel
from pr2jax.core.rng import named, root
from pr2jax.models.config import ModelConfig
from pr2jax.models.flops import forward_flops
from pr2jax.models.transformer import predictor_params
from pr2jax.sampler.engine import Sampler
from pr2jax.sampler.types import FINISH_LENGTH, SamplingParams


def decode_flops(cfg: ModelConfig, rows: int, prompts: int, prompt: int, new: int) -> float:
    """Of `prompts` distinct prompts prefilled once, and new - 1 fed tokens of each row."""
    prefill = forward_flops(cfg, prompts * prompt, (prompt + 1) / 2)
    return prefill + forward_flops(cfg, rows * (new - 1), prompt + new / 2)


def serve(channel: Channel, params: dict[str, Any]) -> None:
    """params: those of `start`; prompts [rows, prompt], mode ("off" or "pr2")."""
    bench = start(params)
    sizes, pr2 = bench.sizes, bench.mode == "pr2"
    weights = bench.load()
    config = bench.sampler(sizes.rows, sizes.new)
    sampler = Sampler(bench.model, config, params=weights, dtype=bench.dtype)
    sampling = SamplingParams(max_tokens=sizes.new)
    shift = predictor_params(weights, bench.model).astype(jnp.float32) if pr2 else None
    calls = 0

    def one() -> dict[str, float]:
        nonlocal calls
        calls += 1
        rollout, features = sampler.rollout(
            params["prompts"],
            1,
            sampling,
            key=named(root(0), calls),
            shift=shift,
            feature_tokens=sizes.feature_tokens if pr2 else 0,
        )
        jax.block_until_ready(features)
        made = rollout.lengths - rollout.prompt_lengths
        if np.any(made != sizes.new) or np.any(rollout.finish != FINISH_LENGTH):
            raise RuntimeError(f"rows of {made.min()} to {made.max()} tokens, not {sizes.new}")
        return {}

    first, _ = timed(one)
    one()
    ready = bench.ready(
        first_step_seconds=first,
        flops=decode_flops(bench.model, sizes.rows, sizes.rows, sizes.prompt, sizes.new),
        settings={"mode": bench.mode, "slots": config.slots, "chunk": config.chunk},
    )
    channel.loop(ready, rounds(bench, one))
