"""Our training step: that of pre-training and supervised fine-tuning, on one batch of full rows."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from pr2jax.benchmark.jobs.common import Bench, rounds, start, timed
from pr2jax.benchmark.serve import Channel
from pr2jax.core.metrics import reduce
from pr2jax.core.optim import OptimConfig, build_optimizer
from pr2jax.core.params import count_params
from pr2jax.core.state import create
from pr2jax.data.packing import PackedRows
from pr2jax.models.flops import forward_flops
from pr2jax.models.transformer import param_specs
from pr2jax.train.config import SFTConfig
from pr2jax.train.supervised import make_packed_step


def full_rows(tokens: np.ndarray) -> PackedRows:
    """Rows of one document each; every token but the first is a target, as for the peer."""
    mask = np.ones(tokens.shape, np.float32)
    mask[:, 0] = 0
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return PackedRows(tokens, mask, np.ones(tokens.shape, np.int32), positions.copy())


def training_flops(bench: Bench) -> float:
    """Of one step: three forwards' worth, without rematerialisation."""
    sizes = bench.sizes
    return 3 * forward_flops(bench.model, sizes.batch * sizes.length, (sizes.length + 1) / 2)


def serve(channel: Channel, params: dict[str, Any]) -> None:
    """params: those of `start`; tokens, learning_rate, b1, b2, eps, clip_norm."""
    bench = start(params)
    names = ("learning_rate", "b1", "b2", "eps", "clip_norm")
    optimizer = build_optimizer(
        OptimConfig(**{name: params[name] for name in names}), param_specs(bench.model)
    )
    cfg = SFTConfig(load_balance_coef=0.0)
    step = make_packed_step(bench.model, cfg, optimizer, dtype=bench.dtype, mesh=None)
    state = create(bench.load(), optimizer)
    batch = jax.device_put(full_rows(np.asarray(params["tokens"], np.int32)))
    losses = []

    def one() -> dict[str, float]:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        losses.append(metrics)
        return {}

    first, _ = timed(one)
    one()
    shown = [reduce(metrics)["loss"] for metrics in losses]
    ready = bench.ready(
        losses=shown,
        first_step_seconds=first,
        flops=training_flops(bench),
        parameters=count_params(param_specs(bench.model)),
    )
    channel.loop(ready, rounds(bench, one))
