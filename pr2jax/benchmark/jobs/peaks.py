"""What JAX reaches here: matrix products of the shapes that matter, and memory bandwidth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pr2jax.benchmark.jobs.common import start, timed
from pr2jax.benchmark.serve import Channel


def product(name: str, dims: Sequence[int], inner: int) -> tuple[list[tuple], Callable]:
    """(operand shapes, fn) of the products x y of shape `name`.

    (M, K, N) is [M, K] @ [K, N]; with four numbers the first is a batch; `weight_gradient`
    contracts the first axis of both, [K, M] and [K, N], as x^T dy does. With inner > 1 so many
    products follow one another in one program, each on the last one's result (needs K = N):
    small ones would else be nothing but the call.
    """
    if name == "weight_gradient":
        m, k, n = dims
        return [(k, m), (k, n)], jax.jit(lambda x, y: jnp.einsum("km,kn->mn", x, y))
    spec = "emk,ekn->emn" if len(dims) == 4 else "mk,kn->mn"
    shapes = [(*dims[:-2], dims[-2]), (*dims[:-3], *dims[-2:])]

    def chain(x, y):
        if inner == 1:
            return jnp.einsum(spec, x, y)
        return jax.lax.fori_loop(0, inner, lambda _, x: jnp.einsum(spec, x, y), x)

    return shapes, jax.jit(chain)


def serve(channel: Channel, params: dict[str, Any]) -> None:
    """params: those of `start`; shapes [[name, dims, inner]], dtypes, copy_bytes, repeats."""
    bench = start(params)
    operations = {}
    for name, dims, inner in params["shapes"]:
        shapes, fn = product(name, dims, inner)
        scale = dims[-2] ** -0.5
        for dtype in params["dtypes"]:
            x, y = (
                (scale * jax.random.normal(jax.random.key(i), shape)).astype(dtype)
                for i, shape in enumerate(shapes)
            )
            fn(x, y).block_until_ready()
            operations[f"{name}/{dtype}"] = (2 * math.prod(dims) * inner, fn, x, y)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    block = add(jnp.zeros(params["copy_bytes"] // 4, jnp.float32))

    def measure(message: dict[str, Any]) -> dict[str, Any]:
        nonlocal block
        best = lambda run: min(timed(run)[0] for _ in range(params["repeats"]))
        rates = {}
        for key, (flops, fn, x, y) in operations.items():
            rates[key] = flops / best(lambda: fn(x, y))  # noqa: B023
        taken = []
        for _ in range(params["repeats"]):
            seconds, block = timed(lambda: add(block))  # noqa: B023
            taken.append(seconds)
        rates["memory"] = 2 * params["copy_bytes"] / min(taken)
        return {"rates": rates}

    channel.loop(bench.ready(), measure)
