"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, Section 2.1), two ways.

A position is compressed to one latent c and one rotated key r, which all heads share (Eqs. 9 to
19). The plain way expands c to every head's keys and values and attends as usual: what training
does. The absorbed way moves the expansion to the other side of the products, q (W c) = (q W) c and
sum_s p_s (W c_s) = W (sum_s p_s c_s): queries go into latent space, values come out of it, and the
cache is read as it lies: what a decode step does. Both are the same function up to rounding.

Rotated parts are held with the two halves of a rotation apart, as `apply_rope` has them.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pr2jax.core.params import ParamSpec, fan_in, ones, zeros
from pr2jax.models import cache as cache_lib
from pr2jax.models.attention import einsum_attention, full_attention, project_out
from pr2jax.models.cache import LatentCache
from pr2jax.models.config import MLAConfig, ModelConfig
from pr2jax.models.layers import apply_rope, linear, rms_norm


def mla_specs(cfg: ModelConfig, repeats: int) -> dict:
    """Parameters of `repeats` stacked latent-attention layers.

    `kv_down` gives (latent, key to rotate), `kv_up` (key, value) of each head; `q_down`, `q_norm`
    and `q_up` stand for `q` where queries have a latent of their own. A head's query and key end
    with the rotated part.
    """
    mla, r, d, h = cfg.mla, repeats, cfg.d_model, cfg.num_heads
    out_scale = (2 * cfg.num_layers) ** -0.5

    def down(width: int) -> dict:
        spec = {"kernel": ParamSpec((r, d, width), ("layers", "embed", None), fan_in(-2))}
        if cfg.attention_bias:
            spec["bias"] = ParamSpec((r, width), ("layers", None), zeros)
        return spec

    def up(inputs: int, width: int) -> dict:
        axes = ("layers", "embed", "heads", None)
        return {"kernel": ParamSpec((r, inputs, h, width), axes, fan_in(-3))}

    norm = lambda width: {"scale": ParamSpec((r, width), ("layers", "norm"), ones)}
    specs = {
        "kv_down": down(mla.kv_lora_rank + mla.qk_rope_head_dim),
        "kv_norm": norm(mla.kv_lora_rank),
        "kv_up": up(mla.kv_lora_rank, mla.qk_nope_head_dim + mla.v_head_dim),
        "o": {
            "kernel": ParamSpec(
                (r, h, mla.v_head_dim, d),
                ("layers", "heads", None, "embed"),
                fan_in(-3, -2, scale=out_scale),
            )
        },
    }
    if cfg.attention_out_bias:
        specs["o"]["bias"] = ParamSpec((r, d), ("layers", "norm"), zeros)
    if not mla.q_lora_rank:
        return specs | {"q": up(d, mla.qk_head_dim)}
    return specs | {
        "q_down": down(mla.q_lora_rank),
        "q_norm": norm(mla.q_lora_rank),
        "q_up": up(mla.q_lora_rank, mla.qk_head_dim),
    }


def expand(
    latent: Float[Array, "B S c"],
    rope_key: Float[Array, "B S r"],
    up: Float[Array, "c H nv"],
    mla: MLAConfig,
) -> tuple[Float[Array, "B S H d"], Float[Array, "B S H e"]]:
    """Every head's keys (n + r wide) and values out of the latents."""
    heads = up.shape[1]
    both = linear(latent, up.reshape(up.shape[0], -1)).reshape(*latent.shape[:2], heads, -1)
    key, value = jnp.split(both, [mla.qk_nope_head_dim], axis=-1)
    shared = jnp.broadcast_to(rope_key[:, :, None], (*rope_key.shape[:2], heads, rope_key.shape[2]))
    return jnp.concatenate([key, shared], axis=-1), value


def absorbed_attention(
    q: Float[Array, "B T H d"],
    latent: Float[Array, "B S c"],
    rope_key: Float[Array, "B S r"],
    up: Float[Array, "c H nv"],
    mask: Bool[Array, "B T S"],
    mla: MLAConfig,
) -> Float[Array, "B T H e"]:
    """Attention to `expand(latent, rope_key, up)` without making it; softmax in fp32."""
    batch, length, heads, width = q.shape
    up_key, up_value = jnp.split(up.astype(q.dtype), [mla.qk_nope_head_dim], axis=-1)
    nope, rotated = jnp.split(q, [mla.qk_nope_head_dim], axis=-1)
    inner = jnp.einsum("bthn,chn->bthc", nope, up_key)
    # All heads share the latents: heads and positions are rows of one product.
    rows = lambda x: x.reshape(batch, length * heads, x.shape[-1])
    dots = lambda a, b: jnp.einsum("bqc,bsc->bqs", a, b, preferred_element_type=jnp.float32)
    logits = dots(rows(inner), latent) + dots(rows(rotated), rope_key)
    logits = logits.reshape(batch, length, heads, -1) * width**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], logits, -1e30), axis=-1)
    mixed = jnp.einsum("bqs,bsc->bqc", rows(weights.astype(q.dtype)), latent)
    return jnp.einsum("bthc,che->bthe", mixed.reshape(batch, length, heads, -1), up_value)


def absorbs(mla: MLAConfig, length: int, read_length: int) -> bool:
    """Whether the absorbed way takes no more multiply-adds for `length` queries a row.

    It does for a decode step; a whole prompt is cheaper expanded, 320 products a pair of positions
    against 1,088 in Moonlight, beside expanding each once.
    """
    expansion = mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)
    plain = read_length * (expansion + length * (mla.qk_head_dim + mla.v_head_dim))
    pair = 2 * mla.kv_lora_rank + mla.qk_rope_head_dim
    return length * (expansion + read_length * pair) <= plain


def softmax_factor(cfg: ModelConfig) -> float:
    """What yarn multiplies the softmax scale by, beside (n + r)^-1/2 (`MLAConfig`)."""
    weight = cfg.mla.yarn_mscale_all_dim
    return (0.1 * weight * math.log(cfg.rope_scaling.factor) + 1.0) ** 2 if weight else 1.0


def _queries(params: dict, x, cfg: ModelConfig, rope) -> Float[Array, "B T H d"]:
    kernel = params["q_up" if cfg.mla.q_lora_rank else "q"]["kernel"]
    if cfg.mla.q_lora_rank:
        x = linear(x, params["q_down"]["kernel"], params["q_down"].get("bias"))
        x = rms_norm(x, params["q_norm"]["scale"], cfg.mla.norm_eps)
    q = linear(x, kernel.reshape(kernel.shape[0], -1)).reshape(*x.shape[:-1], *kernel.shape[1:])
    nope, rotated = jnp.split(q, [cfg.mla.qk_nope_head_dim], axis=-1)
    q = jnp.concatenate([nope, apply_rope(rotated, *rope)], axis=-1)
    # In fp32: rounded to bf16, the factor would be off by up to 0.4%.
    return (q.astype(jnp.float32) * softmax_factor(cfg)).astype(q.dtype)


def mla_attention(
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
    cache: LatentCache | None,
    layer: int | Int[Array, ""],
    read_length: int,
    mesh: Mesh | None = None,
    platform: str = "cpu",
) -> tuple[Float[Array, "B T D"], LatentCache | None]:
    """One latent-attention layer; with a cache, latents are written first and read from it.

    Keys are wider than values. Of the kernels, splash, blocked and einsum take that as it is, and
    cuDNN gets values padded with zeros (`attention.full_attention`).
    """
    mla = cfg.mla
    q = _queries(params, x, cfg, rope)
    both = linear(x, params["kv_down"]["kernel"], params["kv_down"].get("bias"))
    latent, key = jnp.split(both[:, :, None], [mla.kv_lora_rank], axis=-1)
    latent = rms_norm(latent, params["kv_norm"]["scale"], mla.norm_eps)
    key = apply_rope(key, *rope)
    up = params["kv_up"]["kernel"]
    if cache is None:
        k, v = expand(latent[:, :, 0], key[:, :, 0], up, mla)
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
        return project_out(params["o"], out), None
    cache = LatentCache(
        latent=cache_lib.write(cache.latent, layer, positions, latent, platform),
        rope_key=cache_lib.write(cache.rope_key, layer, positions, key, platform),
    )
    read = lambda buffer: cache_lib.read(buffer, layer, read_length, x.dtype)[:, 0]
    seen = (read(cache.latent), read(cache.rope_key))
    if absorbs(mla, x.shape[1], read_length):
        out = absorbed_attention(q, *seen, up, mask, mla)
    else:
        out = einsum_attention(q, *expand(*seen, up, mla), mask)
    return project_out(params["o"], out), cache
