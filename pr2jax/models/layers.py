"""Norms, projections, rotary embeddings, SwiGLU: functions of arrays."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pr2jax.models.config import ModelConfig


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float):
    """x / rms(x) * scale, computed in fp32, returned in x's dtype (Zhang & Sennrich 2019)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale.astype(x.dtype)


def linear(x: Float[Array, "... D"], kernel: Float[Array, "D F"], bias=None):
    """x @ kernel (+ bias) in x's dtype.

    Flattened to two dimensions: XLA:CPU's weight gradient of a 3-D product is several times
    slower.
    """
    y = x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype)
    if bias is not None:
        y = y + bias.astype(x.dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def swiglu(params: dict, x: Float[Array, "... D"]):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""
    hidden = jax.nn.silu(linear(x, params["gate"])) * linear(x, params["up"])
    return linear(hidden, params["down"])


def rope_frequencies(cfg: ModelConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies [rope_dim / 2] (float64) and the factor on cos and sin.

    Scaling as in RopeScaling: linear (Chen et al. 2023), llama3 (Llama 3.1), yarn (Peng et al.
    2023, with the correction range rounded outwards when `truncate`).
    """
    dim, base, s = cfg.rope_dim, cfg.rope_theta, cfg.rope_scaling
    inverse = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if s.kind == "none":
        return inverse, 1.0
    if s.kind == "linear":
        return inverse / s.factor, 1.0
    if s.kind == "llama3":
        wavelength = 2 * math.pi / inverse
        low = s.original_max_position / s.low_freq_factor
        high = s.original_max_position / s.high_freq_factor
        smooth = (s.original_max_position / wavelength - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
        )
        blended = (1 - smooth) * inverse / s.factor + smooth * inverse
        scaled = np.where(wavelength > low, inverse / s.factor, inverse)
        return np.where((wavelength <= low) & (wavelength >= high), blended, scaled), 1.0

    def correction(rotations: float) -> float:
        return (
            dim
            * math.log(s.original_max_position / (rotations * 2 * math.pi))
            / (2 * math.log(base))
        )

    low, high = correction(s.beta_fast), correction(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    scaled = inverse / s.factor * ramp + inverse * (1 - ramp)
    return scaled, s.attention_factor or 0.1 * math.log(s.factor) + 1.0


def rope_tables(cfg: ModelConfig, positions: Int[Array, "B T"]):
    """cos and sin [B, T, 1, rope_dim / 2] in fp32 at these positions."""
    inverse, factor = rope_frequencies(cfg)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inverse, jnp.float32)
    return (jnp.cos(angles) * factor)[..., None, :], (jnp.sin(angles) * factor)[..., None, :]


def apply_rope(x: Float[Array, "B T H d"], cos, sin):
    """Rotates the two halves of each head against each other (Su et al. 2021, GPT-NeoX order)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    out = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return out.astype(x.dtype)
