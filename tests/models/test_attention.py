"""Attention against per-query float64 loops; masks by definition; splash against the einsum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pr2jax.core.sharding import MeshConfig, make_mesh
from pr2jax.models import cache as cache_lib
from pr2jax.models.attention import (
    attention,
    attention_specs,
    cached_mask,
    einsum_attention,
    packed_mask,
    resolve_impl,
    splash_attention,
)
from pr2jax.models.blocked_attention import _chunks as blocked_chunks
from pr2jax.models.blocked_attention import blocked_attention
from pr2jax.models.config import ModelConfig
from pr2jax.models.layers import rope_tables
from tests.models import oracle

BASE = ModelConfig(d_model=12, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=6)
KINDS = {
    "head_norm": BASE,
    "full_norm_bias": dataclasses.replace(
        BASE, qk_norm="full", attention_bias=True, attention_out_bias=True
    ),
    "no_norm_clip": dataclasses.replace(BASE, qk_norm="none", clip_qkv=0.5),
    "one_kv_head": dataclasses.replace(BASE, num_heads=3, num_kv_heads=1),
}
B, T = 2, 9
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 6 + [2, 3, 3]])
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0], [*range(6), 0, 0, 1]])


@pytest.mark.parametrize("window", [0, 1, 3])
def test_masks_by_definition(window):
    packed = np.asarray(packed_mask(jnp.asarray(SEGMENTS), window))
    cached = np.asarray(cached_mask(jnp.asarray(POSITIONS), 5, window))
    for b in range(B):
        for i in range(T):
            for j in range(T):
                near = j <= i and (not window or i - j < window)
                assert packed[b, i, j] == (near and SEGMENTS[b, i] == SEGMENTS[b, j])
            for j in range(5):
                p = POSITIONS[b, i]
                assert cached[b, i, j] == (j <= p and (not window or p - j < window))
    assert packed.any(-1).all()  # no empty softmax, padding included


@pytest.mark.parametrize("name,window", [(n, w) for n, w in zip(KINDS, (0, 3, 0, 2), strict=True)])
def test_layer_against_float64(name, window):
    cfg = KINDS[name]
    noise = np.random.default_rng(0)
    draw = lambda spec: jnp.float32(0.3 * noise.normal(size=spec.shape[1:]))
    params = jax.tree.map(draw, attention_specs(cfg, 1))
    x = noise.normal(size=(B, T, cfg.d_model)).astype(np.float32)

    def run(params, x):
        return attention(
            params,
            x,
            cfg=cfg,
            rope=rope_tables(cfg, jnp.asarray(POSITIONS)),
            positions=jnp.asarray(POSITIONS),
            segment_ids=jnp.asarray(SEGMENTS),
            mask=packed_mask(jnp.asarray(SEGMENTS), window),
            window=window,
            impl="einsum",
            cache=None,
            layer=0,
            read_length=0,
        )[0]

    y = oracle.compiled(run)(params, x)
    for b in range(B):
        expected = oracle.attend(
            oracle.to64(params), np.float64(x[b]), POSITIONS[b], SEGMENTS[b], cfg, window
        )
        np.testing.assert_allclose(y[b], expected, atol=2e-5)


def test_cache_writes_land_at_their_positions_only():
    cfg = dataclasses.replace(BASE, num_layers=3)
    cache = cache_lib.init_cache(cfg, 2, 6)
    assert cache.length == 6
    assert cache.k.shape == (3, 2, 2, 6, 6)
    values = np.random.default_rng(0).normal(size=(2, 2, 2, 6)).astype(np.float32)
    positions = np.array([[1, 2], [5, 6]])  # the last lies outside and is dropped
    out = np.asarray(cache_lib.write(cache.k, 1, jnp.asarray(positions), values))
    expected = np.zeros((3, 2, 2, 6, 6), np.float32)
    for row, position, value in ((0, 1, values[0, 0]), (0, 2, values[0, 1]), (1, 5, values[1, 0])):
        expected[1, row, :, position] = value
    np.testing.assert_array_equal(out, expected)


def test_kernels_by_platform():
    cfg = dataclasses.replace(BASE, head_dim=128)
    assert resolve_impl(cfg, "cpu", 255, jnp.float32) == "einsum"
    assert resolve_impl(cfg, "cpu", 256, jnp.float32) == "blocked"
    assert resolve_impl(cfg, "tpu", 256, jnp.float32) == "splash"
    assert resolve_impl(cfg, "tpu", 250, jnp.float32) == "einsum"
    assert resolve_impl(cfg, "gpu", 250, jnp.bfloat16) == "cudnn"
    assert resolve_impl(cfg, "gpu", 250, jnp.float32) == "einsum"
    forced = dataclasses.replace(cfg, attention_impl="einsum")
    assert resolve_impl(forced, "tpu", 256, jnp.float32) == "einsum"


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 100])
def test_splash_equals_einsum(window):
    """The TPU kernel, interpreted: packed rows, grouped heads, values and gradients."""
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (1, 256, 2, 128))
    k, v = (jax.random.normal(key, (1, 256, 1, 128)) for key in keys[1:3])
    dy = jax.random.normal(keys[3], q.shape)
    segments = jnp.asarray(np.repeat([1, 2, 0], [90, 120, 46])[None])

    def both(fn):
        def run(q, k, v):
            out, pull = jax.vjp(fn, q, k, v)
            return out, *pull(dy)

        return jax.jit(run)(q, k, v)

    got = both(lambda q, k, v: splash_attention(q, k, v, segments, window, interpret=True))
    expected = both(lambda q, k, v: einsum_attention(q, k, v, packed_mask(segments, window)))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 100])
def test_blocked_equals_einsum(window):
    """Chunks of unequal length, packed rows, padding, grouped heads: values and gradients."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, dy = (jax.random.normal(key, (2, 300, 4, 16)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 300, 2, 16)) for key in keys[2:])
    segments = jnp.asarray([np.repeat([1, 2, 0], [90, 170, 40]), np.ones(300, int)])

    def both(fn):
        def run(q, k, v):
            out, pull = jax.vjp(fn, q, k, v)
            return out, *pull(dy)

        return jax.jit(run)(q, k, v)

    got = both(lambda q, k, v: blocked_attention(q, k, v, segments, window))
    expected = both(lambda q, k, v: einsum_attention(q, k, v, packed_mask(segments, window)))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_chunks_are_few_however_long_the_row():
    for length in (1, 128, 300, 1024, 5000, 32768):
        chunks = blocked_chunks(length)
        assert len(chunks) <= 8
        assert [i for a, b in chunks for i in range(a, b)] == list(range(length))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4, 3])
def test_splash_on_a_mesh_equals_einsum(rows):
    """Interpreted, data 4 x tensor 2: every device its own rows (3: all of them) and heads."""
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    keys = jax.random.split(jax.random.key(1), 4)
    q, dy = (jax.random.normal(key, (rows, 128, 4, 64)) for key in keys[:2])
    k, v = (jax.random.normal(key, (rows, 128, 2, 64)) for key in keys[2:])
    segments = jnp.asarray([np.repeat([1, 2, 0], [a, 100 - a, 28]) for a in range(20, 20 + rows)])
    split = NamedSharding(mesh, PartitionSpec("data" if rows == 4 else None, None, "tensor"))

    def both(fn, *args):
        def run(q, k, v, dy):
            out, pull = jax.vjp(fn, q, k, v)
            return out, *pull(dy)

        return jax.jit(run)(*args)

    def kernel(q, k, v):
        return splash_attention(q, k, v, segments, 0, mesh=mesh, interpret=True)

    args = (q, k, v, dy)
    got = both(kernel, *jax.device_put(args, split))
    expected = both(lambda q, k, v: einsum_attention(q, k, v, packed_mask(segments, 0)), *args)
    assert got[0].sharding.is_equivalent_to(split, 4)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-4)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_cache_writes_land_at_their_positions(platform):
    rng = np.random.default_rng(0)
    buffer, values = rng.normal(size=(2, 3, 2, 5, 4)), rng.normal(size=(3, 2, 2, 4))
    positions = np.array([[0, 1], [4, 5], [2, 3]])  # 5 is outside
    expected = np.float32(buffer)
    for b, t in np.ndindex(3, 2):
        if positions[b, t] < 5:
            expected[1, b, :, positions[b, t]] = values[b, t]
    got = cache_lib.write(jnp.float32(buffer), 1, jnp.asarray(positions), values, platform)
    np.testing.assert_array_equal(got, expected)
