"""Parameters described once: a nested dict of `ParamSpec` gives values, shapes, counts, shardings.

A parameter's path is its dict keys joined by "/", as in "segment_0/block_0/moe/router/kernel".
Optimizer groups, decay masks, import tables and error messages all speak in these paths.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from pr2jax.core import rng

Tree = Any
Initializer = Callable[[Key[Array, ""], tuple[int, ...], Any], Array]


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Draws of mean 0 and standard deviation `scale / sqrt(product of the dimensions `axes`)`."""

    scale: float
    axes: tuple[int, ...] = ()

    def stddev(self, shape: tuple[int, ...]) -> float:
        """Of a parameter of `shape`."""
        return self.scale / math.sqrt(math.prod(shape[a] for a in self.axes))

    def __call__(self, key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> Array:
        draws = self.stddev(shape) * jax.random.normal(key, shape, jnp.float32)
        return draws.astype(dtype)


def normal(stddev: float) -> Initializer:
    """Gaussian of mean 0 and the given standard deviation."""
    return Gaussian(stddev)


def fan_in(*axes: int, scale: float = 1.0) -> Initializer:
    """Gaussian of standard deviation `scale / sqrt(product of the dimensions `axes`)`.

    `axes` are the contracted dimensions of the product this kernel is used in. Count them from
    the right (-2 for [..., in, out]) and a leading stack of layers changes nothing.
    """
    if not axes:
        raise ValueError("fan_in needs the axes that are contracted")
    return Gaussian(scale, axes)


def zeros(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> Array:
    """All zeros."""
    del key
    return jnp.zeros(shape, dtype)


def ones(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> Array:
    """All ones."""
    del key
    return jnp.ones(shape, dtype)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, a logical axis name (or None) per dimension, and how it starts.

    Raises ValueError when `axes` does not name every dimension.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    dtype: Any = jnp.float32

    def __post_init__(self):
        if len(self.axes) != len(self.shape):
            raise ValueError(f"{len(self.axes)} axes {self.axes} for the shape {self.shape}")


def path_str(key_path: tuple[Any, ...]) -> str:
    """A jax key path (dict keys, attributes, indices) as "a/b/c"."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Map `fn(path, leaf, *other_leaves)` over trees of one structure."""
    return jax.tree_util.tree_map_with_path(
        lambda p, *leaves: fn(path_str(p), *leaves), tree, *rest
    )


def tree_paths(tree: Tree) -> list[str]:
    """The paths of all leaves, in jax's leaf order (sorted keys)."""
    return [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def init_params(specs: Tree, key: Key[Array, ""], shardings: Tree | None = None) -> Tree:
    """Initial values of `specs`; each parameter draws from the key of its own path.

    A parameter's value depends on the seed, its path and its shape only: not on the other
    parameters, nor on the mesh (up to an ulp or two: XLA compiles erf_inv differently for a
    shard than for the whole). With `shardings` each device makes only its own shards.
    """

    def build(key):
        return map_with_path(
            lambda path, s: s.init(rng.named(key, path), s.shape, s.dtype).astype(s.dtype), specs
        )

    return jax.jit(build, out_shardings=shardings)(key)


def abstract_params(specs: Tree, shardings: Tree | None = None) -> Tree:
    """`jax.ShapeDtypeStruct` of each parameter, with its sharding when `shardings` is given."""
    if shardings is None:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        specs,
        shardings,
    )


def count_params(tree: Tree) -> int:
    """Number of scalars in a tree of specs, arrays or abstract arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
