"""The cache: one buffer for all layers, carried through the stack, updated in place.

Both kinds have the axes (layer, row, head, position, width), so what copies or shards rows need
not know which it is. A row's cache index is the token's position.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from pr2jax.models.config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values of every layer.

    Heads stand before positions: attention multiplies them as they lie, head by head.
    """

    k: Float[Array, "N B H S d"]
    v: Float[Array, "N B H S d"]

    @property
    def length(self) -> int:
        """S, the number of positions a row can hold."""
        return self.k.shape[3]


@struct.dataclass
class LatentCache:
    """What latent attention keeps of a position: its latent (normed) and the rotated key.

    All heads share them: the head axis is 1, and no mesh axis splits it.
    """

    latent: Float[Array, "N B 1 S c"]
    rope_key: Float[Array, "N B 1 S r"]

    @property
    def length(self) -> int:
        """S, the number of positions a row can hold."""
        return self.latent.shape[3]


Cache = KVCache | LatentCache


def init_cache(cfg: ModelConfig, batch: int, length: int, dtype=jnp.float32) -> Cache:
    """A zeroed cache of `batch` rows and `length` positions for all of `cfg`'s layers."""
    zeros = lambda heads, width: jnp.zeros((cfg.num_layers, batch, heads, length, width), dtype)
    if cfg.mla is not None:
        return LatentCache(zeros(1, cfg.mla.kv_lora_rank), zeros(1, cfg.mla.qk_rope_head_dim))
    heads = (cfg.num_kv_heads, cfg.head_dim)
    return KVCache(k=zeros(*heads), v=zeros(*heads))


def write(
    buffer: Float[Array, "N B H S d"],
    layer: int | Int[Array, ""],
    positions: Int[Array, "B T"],
    values: Float[Array, "B T H d"],
    platform: str = "cpu",
) -> Float[Array, "N B H S d"]:
    """Writes `values` at `positions` of one layer; positions outside the buffer are dropped.

    Head by head on TPUs: a scatter of all heads at once has them lay the buffer out with heads
    behind positions, and so copy it whole on the way into a decode loop, for every layer's
    attention, and out of it. (On CPU the same makes a row's rounding depend on its neighbours.)
    """
    rows, heads = (jnp.arange(n) for n in (values.shape[0], values.shape[2]))
    if platform == "tpu":
        place = (layer, rows[:, None, None], heads, positions[..., None])
    else:
        place = (layer, rows[:, None], slice(None), positions)
    return buffer.at[place].set(values.astype(buffer.dtype), mode="drop")


def read(
    buffer: Float[Array, "N B H S d"], layer: int | Int[Array, ""], read_length: int, dtype
) -> Float[Array, "B H R d"]:
    """The first `read_length` positions of one layer."""
    one = lax.dynamic_index_in_dim(buffer, layer, keepdims=False)
    return one[:, :, :read_length].astype(dtype)
