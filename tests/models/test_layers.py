"""Norms, projections and rotary frequencies against float64 formulas."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.models.config import ModelConfig, RopeScaling
from pr2jax.models.layers import (
    apply_rope,
    linear,
    rms_norm,
    rope_frequencies,
    rope_tables,
    swiglu,
)
from tests.models import oracle

RNG = np.random.default_rng(0)


def test_rms_norm_and_swiglu():
    x = RNG.normal(size=(2, 3, 8)) * 3
    scale = RNG.normal(size=8)
    np.testing.assert_allclose(
        rms_norm(jnp.float32(x), jnp.float32(scale), 1e-6), oracle.norm(x, scale, 1e-6), atol=1e-6
    )
    p = {n: RNG.normal(size=s) for n, s in (("gate", (8, 5)), ("up", (8, 5)), ("down", (5, 8)))}
    y = swiglu({n: jnp.float32(a) for n, a in p.items()}, jnp.float32(x))
    np.testing.assert_allclose(y, oracle.mlp(p, x), rtol=1e-5, atol=1e-4)


def test_norm_is_taken_in_fp32():
    # In bf16 the mean of squares of 1024 equal numbers would lose its low bits.
    x = jnp.full((1, 1024), 1.0, jnp.bfloat16).at[0, 0].set(3.0)
    y = rms_norm(x, jnp.ones(1024), 0.0)
    assert y.dtype == jnp.bfloat16
    exact = 3 / math.sqrt((1023 + 9) / 1024)
    assert abs(float(y[0, 0]) - exact) < 2**-8 * exact


def test_linear_has_a_bias_and_keeps_dtype():
    x, w, b = RNG.normal(size=(2, 3, 4)), RNG.normal(size=(4, 5)), RNG.normal(size=5)
    args = jnp.float32(x), jnp.float32(w), jnp.float32(b)
    np.testing.assert_allclose(linear(*args), x @ w + b, rtol=1e-5, atol=1e-5)
    assert linear(args[0].astype(jnp.bfloat16), *args[1:]).dtype == jnp.bfloat16


def reference_frequencies(dim, theta, s):
    """The published formulas, one frequency at a time."""
    out = []
    for i in range(dim // 2):
        f = theta ** (-2 * i / dim)
        if s.kind == "linear":
            f /= s.factor
        if s.kind == "llama3":
            wavelength = 2 * math.pi / f
            if wavelength > s.original_max_position / s.low_freq_factor:
                f /= s.factor
            elif wavelength >= s.original_max_position / s.high_freq_factor:
                smooth = (s.original_max_position / wavelength - s.low_freq_factor) / (
                    s.high_freq_factor - s.low_freq_factor
                )
                f = (1 - smooth) * f / s.factor + smooth * f
        if s.kind == "yarn":
            # The pair index at which a frequency makes `rotations` turns over the original length.
            index = lambda rotations: (
                dim
                * math.log(s.original_max_position / (2 * math.pi * rotations))
                / (2 * math.log(theta))
            )
            low, high = index(s.beta_fast), index(s.beta_slow)
            if s.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, dim - 1)
            ramp = min(max((i - low) / max(high - low, 1e-3), 0), 1)
            f = (1 - ramp) * f + ramp * f / s.factor
        out.append(f)
    return out


@pytest.mark.parametrize(
    "scaling,factor",
    [
        (RopeScaling(), 1.0),
        (RopeScaling("linear", 4.0), 1.0),
        (RopeScaling("llama3", 8.0, original_max_position=8192), 1.0),
        (RopeScaling("yarn", 4.0, original_max_position=4096), 0.1 * math.log(4) + 1),
        (RopeScaling("yarn", 40.0, 4096, truncate=False, attention_factor=1.25), 1.25),
    ],
    ids=lambda s: getattr(s, "kind", None),
)
def test_rope_scaling_formulas(scaling, factor):
    cfg = ModelConfig(head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    inverse, got = rope_frequencies(cfg)
    np.testing.assert_allclose(inverse, reference_frequencies(64, 5e5, scaling), rtol=1e-12)
    assert got == pytest.approx(factor)
    if scaling.kind in ("llama3", "yarn"):  # the fastest are kept, the slowest divided
        plain = reference_frequencies(64, 5e5, RopeScaling())
        assert inverse[0] == plain[0]
        assert inverse[-1] == pytest.approx(plain[-1] / scaling.factor)


def test_rope_rotates_halves_and_depends_on_distance_only():
    cfg = ModelConfig(head_dim=8)
    positions = np.array([[0, 3, 7, 1000]])
    x = RNG.normal(size=(1, 4, 2, 8))
    cos, sin = rope_tables(cfg, jnp.asarray(positions))
    out = apply_rope(jnp.float32(x), cos, sin)
    np.testing.assert_allclose(out[0], oracle.rope(x[0], positions[0], 1e4), atol=2e-4)
    # q at 10 + n against k at n: one product, whatever n.
    q, k = RNG.normal(size=(2, 8))
    products = []
    for n in (0, 5, 90):
        c, s = rope_tables(cfg, jnp.asarray([[10 + n, n]]))
        pair = apply_rope(jnp.float32(np.stack([q, k]))[None, :, None], c, s)[0, :, 0]
        products.append(float(pair[0] @ pair[1]))
    np.testing.assert_allclose(products, products[0], rtol=1e-4, atol=1e-4)
