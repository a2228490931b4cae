"""Fingerprints of arrays: a number that a changed bit changes, the same on every mesh."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from pr2jax.core.params import Tree, path_str


def fingerprint(state: Tree) -> str:
    """A short name of the exact bits of a state, on any mesh: equal states have equal ones."""
    sums = np.asarray(_fingerprints(jax.tree.leaves(state)))
    return f"{zlib.crc32(sums.tobytes()):08x}"


def describe(tree: Tree) -> dict[str, dict[str, Any]]:
    """{path: {"shape", "dtype", "sum"}} of a tree's arrays, as JSON; `sum` is the fingerprint."""
    flat = dict(sorted(flatten(tree).items()))  # one program for all trees of the same arrays
    sums = np.asarray(_fingerprints(list(flat.values()))).tolist()
    return {
        path: {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name, "sum": total}
        for (path, x), total in zip(flat.items(), sums, strict=True)
    }


def flatten(tree: Tree) -> dict[str, Any]:
    """{path: leaf} of a tree."""
    return {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@jax.jit
def _fingerprints(leaves: list[Array]) -> UInt32[Array, " leaves"]:
    """sum_i (2 i + 1) bits_i mod 2**32 of each array: order of summation cannot change it, and an
    odd weight per element lets no single flipped bit and few permutations through."""

    def one(x):
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
        index = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(
                jnp.uint32, bits.shape, axis
            )
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

    return jnp.stack([one(x) for x in leaves])
