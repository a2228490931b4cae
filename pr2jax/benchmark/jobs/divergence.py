"""How often the same requests part between programs of the sampler."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from pr2jax.benchmark.jobs.common import start
from pr2jax.benchmark.serve import Channel
from pr2jax.core.rng import root
from pr2jax.sampler.divergence import first_divergence
from pr2jax.sampler.engine import Sampler
from pr2jax.sampler.types import SamplerConfig, SamplingParams


def changes(config: SamplerConfig) -> dict[str, SamplerConfig]:
    """Programs that compute the same by other shapes or another order: {what is other: config}."""
    longest = config.max_prompt + config.max_tokens
    other = {
        "same program": {},
        f"slots {config.slots // 2}": {"slots": max(config.slots // 2, 1)},
        f"slots {config.slots * 2}": {"slots": config.slots * 2},
        f"reads {longest} at once": {"bucket": longest},
        "layers scanned": {"unroll_layers": not config.unroll_layers},
        "prefill of 1 row": {"prefill_rows": 1},
    }
    return {name: dataclasses.replace(config, **change) for name, change in other.items()}


def serve(channel: Channel, params: dict[str, Any]) -> None:
    """params: those of `start`; prompts, dtypes. A round measures everything."""
    bench = start(params)
    sizes = bench.sizes
    weights = bench.load()
    config = bench.sampler(sizes.rows, sizes.new)
    sampling = SamplingParams(max_tokens=sizes.new)

    def roll(config: SamplerConfig, dtype: Any):
        sampler = Sampler(bench.model, config, params=weights, dtype=jnp.dtype(dtype))
        return sampler.rollout(params["prompts"], 1, sampling, key=root(0))[0]

    def measure(message: dict[str, Any]) -> dict[str, Any]:
        found = []
        for dtype in params["dtypes"]:
            base = roll(config, dtype)
            for name, other in changes(config).items():
                parted = first_divergence(base, roll(other, dtype))
                found.append(
                    {
                        "program": name,
                        "dtype": dtype,
                        **dataclasses.asdict(parted),
                        "rate": parted.rate,
                    }
                )
        return {"rows": found}

    channel.loop(bench.ready(), measure)
