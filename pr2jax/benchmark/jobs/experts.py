"""A training step with so many experts, k fixed, and what its parts take by themselves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pr2jax.benchmark.jobs.common import matmul_peak, start, timed
from pr2jax.benchmark.jobs.train import full_rows
from pr2jax.benchmark.serve import Channel
from pr2jax.benchmark.workload import experts_model
from pr2jax.core.optim import OptimConfig, build_optimizer
from pr2jax.core.params import count_params, init_params
from pr2jax.core.rng import named, root
from pr2jax.core.sharding import RULES
from pr2jax.core.state import create
from pr2jax.models.experts import BY_PLATFORM, ExpertWeights, apply_experts
from pr2jax.models.flops import active_params, forward_flops
from pr2jax.models.moe import MoEOptions, moe_layer, moe_specs
from pr2jax.models.transformer import param_specs
from pr2jax.train.config import PretrainConfig
from pr2jax.train.supervised import make_packed_step


def _layer(model, tokens: int, dtype):
    """(forward and backward of one MoE layer, the same of its experts alone), ready to call."""
    moe = model.moe
    params = jax.tree.map(lambda a: a[0], init_params(moe_specs(model, 1), root(0)))
    options = MoEOptions(None, False, True, None, RULES, jax.default_backend())
    x = jax.random.normal(named(root(0), "x"), (1, tokens, model.d_model)).astype(dtype)
    real = jnp.ones((1, tokens), bool)

    def whole(params, x):
        y, taps = moe_layer(
            params, x, cfg=model, real=real, routes=None, shift=None, options=options
        )
        return jnp.sum(y.astype(jnp.float32) ** 2), taps["routes"]

    ids = jax.jit(whole)(params, x)[1][0]
    gates = jnp.full(ids.shape, 1.0 / moe.top_k, jnp.float32)

    def experts(weights, x):
        cast = ExpertWeights(*(weights[n].astype(x.dtype) for n in ExpertWeights._fields))
        impl = BY_PLATFORM[options.platform] if moe.impl == "auto" else moe.impl
        y = apply_experts(x, cast, gates, ids, impl=impl, block=moe.block_size)
        return jnp.sum(y**2)

    of_layer = jax.jit(jax.grad(whole, argnums=(0, 1), has_aux=True))
    of_experts = jax.jit(jax.grad(experts, argnums=(0, 1)))
    return lambda: of_layer(params, x), lambda: of_experts(params["experts"], x[0])


def serve(channel: Channel, params: dict[str, Any]) -> None:
    """params: those of `start`; tokens, experts, learning_rate, b1, b2, eps, clip_norm.

    Parts of a round: `layer` and `experts` (all MoE layers, forward and backward) and `update`
    (the optimizer's), each timed by itself.
    """
    bench = start(params)
    model = experts_model(params["smoke"], params["experts"], params["overrides"])
    specs = param_specs(model)
    names = ("learning_rate", "b1", "b2", "eps", "clip_norm")
    optimizer = build_optimizer(OptimConfig(**{name: params[name] for name in names}), specs)
    step = make_packed_step(model, PretrainConfig(), optimizer, dtype=bench.dtype, mesh=None)
    state = create(init_params(specs, root(0)), optimizer)
    ids = np.asarray(params["tokens"], np.int32)
    batch = jax.device_put(full_rows(ids))
    layer, experts = _layer(model, ids.size, bench.dtype)
    grads = jax.tree.map(jnp.zeros_like, state.params)
    update = jax.jit(
        lambda grads, opt, params: optimizer.update(grads, opt, params)[:2], donate_argnums=(1, 2)
    )
    moved = create(init_params(specs, root(0)), optimizer)
    opt, weights = moved.opt_state, moved.params
    del moved

    def one() -> tuple[float, dict[str, float]]:
        nonlocal state, opt, weights
        seconds, (state, _) = timed(lambda: step(state, batch))
        took, (weights, opt) = timed(lambda: update(grads, opt, weights))
        layers = model.num_layers
        parts = {"layer": layers * timed(layer)[0], "experts": layers * timed(experts)[0]}
        return seconds, parts | {"update": took}

    first, _ = one()
    one()
    flops = 3 * forward_flops(model, ids.size, (ids.shape[1] + 1) / 2)
    ready = bench.ready(
        first_step_seconds=first,
        flops=flops,
        parameters=count_params(specs),
        active=active_params(model),
        settings={"experts": params["experts"], "top_k": model.moe.top_k},
    )

    def measure(message: dict[str, Any]) -> dict[str, Any]:
        found = [one() for _ in range(bench.steps)]
        return {
            "seconds": [seconds for seconds, _ in found],
            "parts": {name: [parts[name] for _, parts in found] for name in found[0][1]},
            "peak_flops": matmul_peak(bench.dtype),
        }

    channel.loop(ready, measure)
