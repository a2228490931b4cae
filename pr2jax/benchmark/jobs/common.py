"""What our jobs share: the device, the model and its parameters, timing, our own peak."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pr2jax.benchmark.workload import (
    Sizes,
    load_params,
    model_config,
    sampler_config,
)
from pr2jax.core.config import from_config_dict
from pr2jax.core.device import (
    CompilationCounter,
    profile,
    resolve_dtype,
    reuse_freed_memory,
    setup_compilation_cache,
    versions,
)
from pr2jax.core.params import Tree
from pr2jax.models.config import ModelConfig
from pr2jax.sampler.types import SamplerConfig


@dataclass(frozen=True)
class Bench:
    """What a job was told, made ready.

    `checkpoint` is a folder or empty; `mode` is the replay mode, where there is one.
    """

    params: dict[str, Any]
    sizes: Sizes
    model: ModelConfig
    dtype: Any
    compilations: CompilationCounter
    began: float

    @property
    def checkpoint(self) -> str:
        return self.params["checkpoint"]

    @property
    def steps(self) -> int:
        return self.params["steps"]

    @property
    def mode(self) -> str:
        return self.params.get("mode", "off")

    def load(self) -> Tree:
        """The parameters, anew."""
        return load_params(self.model, self.checkpoint)

    def sampler(self, rows: int, new: int) -> SamplerConfig:
        """Our sampler's settings for so many rows and new tokens."""
        return sampler_config(self.sizes, rows, new, self.params["overrides"])

    def ready(self, **figures: Any) -> dict[str, Any]:
        """The answer of a job that has compiled everything and warmed up."""
        compiled = self.compilations.snapshot()
        return {
            "compile_seconds": compiled["seconds"],
            "compilations": compiled["compilations"],
            "prepare_seconds": time.perf_counter() - self.began,
            "dtype": self.dtype.name,
            "peak_flops": matmul_peak(self.dtype),
            "versions": versions(),
        } | figures


def start(params: dict[str, Any]) -> Bench:
    """Sets this process up as `pr2jax.main` does.

    params: smoke, sizes, dtype, checkpoint, overrides, compilation_cache, steps.
    """
    began = time.perf_counter()
    reuse_freed_memory()
    setup_compilation_cache(params["compilation_cache"])
    dtype, _ = resolve_dtype(params["dtype"])
    return Bench(
        params=params,
        sizes=from_config_dict(Sizes, params["sizes"], "sizes"),
        model=model_config(params["smoke"], params["overrides"]),
        dtype=dtype,
        compilations=CompilationCounter(),
        began=began,
    )


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds until run()'s arrays are there, what it returned)."""
    begin = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - begin, result


def rounds(bench: Bench, step: Callable[[], dict[str, float]]) -> Callable[[dict], dict]:
    """measure(message) of a channel: `steps` steps, traced where the message names a folder.

    `step` makes one step, waits for its arrays and returns the seconds of its parts, by name.
    """

    def measure(message: dict[str, Any]) -> dict[str, Any]:
        seconds, parts = [], []
        with profile(message.get("profile")):
            for _ in range(bench.steps):
                took, found = timed(step)
                seconds.append(took)
                parts.append(found)
        return {
            "seconds": seconds,
            "parts": {name: [p[name] for p in parts] for name in parts[0]},
            "peak_flops": matmul_peak(bench.dtype),
        }

    return measure


@functools.cache
def _square_product(dtype: Any, size: int) -> Callable[[], Array]:
    """A compiled square matrix product, its operands with it."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size)).astype(dtype) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    product(a, b).block_until_ready()
    return lambda: product(a, b)


def matmul_peak(dtype: Any, size: int = 2048, repeats: int = 3) -> float:
    """FLOP/s of a square matrix product."""
    product = _square_product(dtype, size)
    return 2 * size**3 / min(timed(product)[0] for _ in range(repeats))


def tree_bytes(*trees: Any) -> int:
    """Bytes of all arrays."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(trees))
