"""The key/value cache: one buffer for all layers, carried through the stack, updated in place."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from pr2jax.models.config import ModelConfig


@struct.dataclass
class Cache:
    """Keys and values of every layer. A row's cache index is the token's position.

    Heads stand before positions: attention multiplies them as they lie, head by head.
    """

    k: Float[Array, "N B H S d"]
    v: Float[Array, "N B H S d"]

    @property
    def length(self) -> int:
        """S, the number of positions a row can hold."""
        return self.k.shape[3]


def init_cache(cfg: ModelConfig, batch: int, length: int, dtype=jnp.float32) -> Cache:
    """A zeroed cache of `batch` rows and `length` positions for all of `cfg`'s layers."""
    shape = (cfg.num_layers, batch, cfg.num_kv_heads, length, cfg.head_dim)
    return Cache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def write(
    buffer: Float[Array, "N B H S d"],
    layer: int | Int[Array, ""],
    positions: Int[Array, "B T"],
    values: Float[Array, "B T H d"],
) -> Float[Array, "N B H S d"]:
    """Writes `values` at `positions` of one layer; positions outside the buffer are dropped."""
    rows = jnp.arange(values.shape[0])[:, None]
    return buffer.at[layer, rows, :, positions].set(values.astype(buffer.dtype), mode="drop")
