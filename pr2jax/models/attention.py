"""Grouped-query attention: projections, rotary embeddings, masks, kernels, and the cached form."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pr2jax.core.params import ParamSpec, fan_in, ones, zeros
from pr2jax.core.sharding import row_axes
from pr2jax.models import cache as cache_lib
from pr2jax.models.blocked_attention import blocked_attention
from pr2jax.models.cache import KVCache
from pr2jax.models.config import ModelConfig
from pr2jax.models.layers import apply_rope, linear, rms_norm

# Tokens a row from which attention on a CPU goes by chunks.
BLOCKED_FROM = 256


def attention_specs(cfg: ModelConfig, repeats: int) -> dict:
    """Parameters of `repeats` stacked attention layers."""
    r, d, h, kv, dim = repeats, cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    out_scale = (2 * cfg.num_layers) ** -0.5
    specs = {}
    for name, heads, axis in (("q", h, "heads"), ("k", kv, "kv_heads"), ("v", kv, "kv_heads")):
        specs[name] = {
            "kernel": ParamSpec((r, d, heads, dim), ("layers", "embed", axis, None), fan_in(-3))
        }
        if cfg.attention_bias:
            specs[name]["bias"] = ParamSpec((r, heads, dim), ("layers", axis, None), zeros)
    specs["o"] = {
        "kernel": ParamSpec(
            (r, h, dim, d), ("layers", "heads", None, "embed"), fan_in(-3, -2, scale=out_scale)
        )
    }
    if cfg.attention_out_bias:
        specs["o"]["bias"] = ParamSpec((r, d), ("layers", "norm"), zeros)
    if cfg.qk_norm != "none":
        for name, heads in (("q_norm", h), ("k_norm", kv)):
            width = dim if cfg.qk_norm == "head" else heads * dim
            specs[name] = {"scale": ParamSpec((r, width), ("layers", "norm"), ones)}
    return specs


def packed_mask(segment_ids: Int[Array, "B T"], window: int) -> Bool[Array, "B T T"]:
    """Causal within a segment (and a window of that many tokens, itself included; 0: no limit).

    Rows are packed in order, so index order is position order. Every query sees itself, padding
    included: no row of the softmax is empty.
    """
    length = segment_ids.shape[1]
    query, key = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    allowed = key <= query
    if window:
        allowed &= key > query - window
    return allowed[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])


def cached_mask(
    positions: Int[Array, "B T"], read_length: int, window: int
) -> Bool[Array, "B T S"]:
    """Cache index j is seen from position p when j <= p (and j > p - window)."""
    key = jnp.arange(read_length)[None, None, :]
    query = positions[:, :, None]
    allowed = key <= query
    if window:
        allowed &= key > query - window
    return allowed


def einsum_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S G d"],
    v: Float[Array, "B S G e"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H e"]:
    """softmax(q k / sqrt(d)) v by plain products, softmax in fp32; the oracle of the kernels."""
    return cached_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)


def cached_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B G S d"],
    v: Float[Array, "B G S e"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H e"]:
    """The same on keys and values as the cache holds them, heads first.

    Queries stand as the first factor, a group's heads and positions as its rows: the other way
    round XLA:CPU takes two to six times as long for a decode step.
    """
    batch, length, heads, dim = q.shape
    groups = k.shape[1]
    repeat = heads // groups
    q = q.reshape(batch, length, groups, repeat, dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, groups, repeat * length, dim)
    logits = jnp.einsum("bgqd,bgsd->bgqs", q, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, groups, repeat, length, -1)
    logits = jnp.where(mask[:, None, None], logits * dim**-0.5, -1e30)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    weights = weights.reshape(batch, groups, repeat * length, -1)
    out = jnp.einsum("bgqs,bgsd->bgqd", weights, v)
    out = out.reshape(batch, groups, repeat, length, -1).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, v.shape[-1])


def splash_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T G d"],
    v: Float[Array, "B T G e"],
    segment_ids: Int[Array, "B T"],
    window: int,
    *,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H e"]:
    """The TPU block-sparse flash kernel on packed rows.

    Grouped heads are read in place, and so are values of another width than the keys; blocks
    outside the causal window are not computed. The compiler cannot split a kernel over a mesh, so
    each device is handed its own rows (where the mesh divides them) and heads.
    """
    return _split(partial(_splash_local, window=window, interpret=interpret), mesh)(
        q, k, v, segment_ids
    )


def _split(run, mesh: Mesh | None):
    """`run(q, k, v, segment_ids)` with each device given its own rows and heads."""

    def split(q, k, v, segment_ids):
        if mesh is None or mesh.size == 1:
            return run(q, k, v, segment_ids)
        rows = row_axes(mesh, q.shape[0]) or None
        act = PartitionSpec(rows, None, "tensor")
        specs = (act, act, act, PartitionSpec(rows))
        local = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=act, check_vma=False)
        return local(q, k, v, segment_ids)

    return split


def _splash_local(q, k, v, segment_ids, window: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel_lib,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib

    _, length, heads, dim = q.shape
    if window:
        one = mask_lib.LocalMask((length, length), (window - 1, 0), 0)
    else:
        one = mask_lib.CausalMask((length, length))
    kernel = kernel_lib.make_splash_mha(
        mask_lib.MultiHeadMask([one] * heads), head_shards=1, q_seq_shards=1, interpret=interpret
    )
    move = lambda x: x.swapaxes(1, 2)
    segments = kernel_lib.SegmentIds(q=segment_ids, kv=segment_ids)
    out = jax.vmap(kernel)(move(q) * dim**-0.5, move(k), move(v), segments)
    return move(out)


def cudnn_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T G d"],
    v: Float[Array, "B T G e"],
    mask: Bool[Array, "B T T"],
) -> Float[Array, "B T H e"]:
    """cuDNN's flash attention; it knows one width, so narrower values (e < d) carry zeros."""
    wide = jnp.pad(v, ((0, 0),) * 3 + ((0, q.shape[-1] - v.shape[-1]),))
    out = jax.nn.dot_product_attention(q, k, wide, mask=mask[:, None], implementation="cudnn")
    return out[..., : v.shape[-1]]


def full_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T G d"],
    v: Float[Array, "B T G e"],
    *,
    segment_ids: Int[Array, "B T"],
    mask: Bool[Array, "B T T"] | None,
    window: int,
    impl: str,
    mesh: Mesh | None,
    platform: str,
) -> Float[Array, "B T H e"]:
    """softmax(q k / sqrt(d)) v on whole packed rows, by the kernel `impl` (`resolve_impl`)."""
    if impl == "splash":
        interpret = platform == "cpu"
        out = splash_attention(q, k, v, segment_ids, window, mesh=mesh, interpret=interpret)
        return out.astype(v.dtype)
    if impl == "blocked":
        return _split(partial(blocked_attention, window=window), mesh)(q, k, v, segment_ids)
    return (cudnn_attention if impl == "cudnn" else einsum_attention)(q, k, v, mask)


def resolve_impl(cfg: ModelConfig, platform: str, length: int, dtype) -> str:
    """The attention kernel for full (uncached) rows of `length` tokens on `platform`.

    `auto` takes splash on TPU where its tiles fit (length a multiple of 128, heads of 64),
    cuDNN's flash attention on GPU in half precision, chunks of the same on CPU for rows long
    enough that a whole row's weights leave the cache, else the plain einsum.
    """
    if cfg.attention_impl != "auto":
        return cfg.attention_impl
    if platform == "tpu" and length % 128 == 0 and cfg.qk_dim % 64 == 0:
        return "splash"
    half = jnp.dtype(dtype).itemsize == 2
    if platform in ("gpu", "cuda") and half and cfg.qk_dim <= 128 and cfg.qk_dim % 8 == 0:
        return "cudnn"
    return "blocked" if platform == "cpu" and length >= BLOCKED_FROM else "einsum"


def _project(params: dict, name: str, x, heads: int, cfg: ModelConfig):
    kernel = params[name]["kernel"]
    bias = params[name].get("bias")
    y = linear(x, kernel.reshape(kernel.shape[0], -1), None if bias is None else bias.reshape(-1))
    norm = params.get(f"{name}_norm")
    if norm is not None and cfg.qk_norm == "full":
        y = rms_norm(y, norm["scale"], cfg.norm_eps)
    if cfg.clip_qkv:
        y = jnp.clip(y, -cfg.clip_qkv, cfg.clip_qkv)
    y = y.reshape(*x.shape[:-1], heads, cfg.head_dim)
    if norm is not None and cfg.qk_norm == "head":
        y = rms_norm(y, norm["scale"], cfg.norm_eps)
    return y


def attention(
    params: dict,
    x: Float[Array, "B T D"],
    *,
    cfg: ModelConfig,
    rope: tuple[Array, Array],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    mask: Bool[Array, "B T S"] | None,
    window: int,
    impl: str,
    cache: KVCache | None,
    layer: int | Int[Array, ""],
    read_length: int,
    mesh: Mesh | None = None,
    platform: str = "cpu",
) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """One attention layer; with a cache, keys and values are written first and read from it."""
    q = apply_rope(_project(params, "q", x, cfg.num_heads, cfg), *rope)
    k = apply_rope(_project(params, "k", x, cfg.num_kv_heads, cfg), *rope)
    v = _project(params, "v", x, cfg.num_kv_heads, cfg)
    if cache is not None:
        cache = KVCache(
            k=cache_lib.write(cache.k, layer, positions, k, platform),
            v=cache_lib.write(cache.v, layer, positions, v, platform),
        )
        read = lambda buffer: cache_lib.read(buffer, layer, read_length, x.dtype)
        out = cached_attention(q, read(cache.k), read(cache.v), mask)
    else:
        out = full_attention(
            q,
            k,
            v,
            segment_ids=segment_ids,
            mask=mask,
            window=window,
            impl=impl,
            mesh=mesh,
            platform=platform,
        )
    return project_out(params["o"], out), cache


def project_out(params: dict, out: Float[Array, "B T H e"]) -> Float[Array, "B T D"]:
    """The heads' values back into the residual stream."""
    kernel = params["kernel"]
    flat = out.reshape(*out.shape[:-2], -1)
    return linear(flat, kernel.reshape(-1, kernel.shape[-1]), params.get("bias"))
