"""Upcycling keeps the function where its docstring says so, whatever the routers choose."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from pr2jax.core import rng
from pr2jax.core.config import ConfigError
from pr2jax.core.sharding import MeshConfig, make_mesh, param_shardings
from pr2jax.models import logprobs
from pr2jax.models.config import block_specs, num_moe_layers
from pr2jax.models.transformer import forward, param_specs
from pr2jax.models.upcycling import UpcycleConfig, upcycle, upcycled_config
from tests.models.checkpoints import LLAMA, QWEN, QWEN_DENSE, change, random_params

ROWS, LENGTH = 2, 24
SLOW = ("one_of_many", "all", "three_slices_every_third")
DENSE = dataclasses.replace(LLAMA, num_layers=3, tie_embeddings=True, dense_dim=48)
CASES = {
    "copies": (DENSE, UpcycleConfig(experts=4, top_k=2)),
    "one_of_many": (QWEN_DENSE, UpcycleConfig(experts=8, top_k=1)),
    "all": (DENSE, UpcycleConfig(experts=3, top_k=3)),
    "every_second_window": (
        change(QWEN_DENSE, num_layers=4, sliding_window=4, window_pattern=(True, False)),
        UpcycleConfig(experts=4, top_k=2, every=2),
    ),
    "slices": (DENSE, UpcycleConfig(experts=4, top_k=2, granularity=4)),
    "three_slices_every_third": (
        DENSE,
        UpcycleConfig(experts=5, top_k=3, granularity=3, every=3),
    ),
}


NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]


def tokens_of(cfg, seed=0):
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, (ROWS, LENGTH))
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    return jnp.asarray(tokens, jnp.int32), positions, jnp.ones_like(positions)


@partial(jax.jit, static_argnames="cfg")
def run(params, cfg, inputs, routes=None):
    out = forward(params, *inputs, cfg=cfg, routes=routes)
    return logprobs.logits(params, out.hidden, cfg), out.routes


@cache
def both(name):
    """(dense model, its parameters, sparse model, its parameters) of a case."""
    cfg, options = CASES[name]
    params = random_params(cfg)
    make = jax.jit(partial(upcycle, cfg=cfg, options=options))
    return cfg, params, upcycled_config(cfg, options), make(params, key=rng.root(3))


@pytest.mark.parametrize("name", NAMES)
def test_the_function_stays(name):
    options = CASES[name][1]
    cfg, params, wide, sparse = both(name)
    want = run(params, cfg, tokens_of(cfg))[0]
    got, routes = run(sparse, wide, tokens_of(cfg))
    assert 0.5 < np.std(want) < 2.0
    assert np.abs(got - want).max() <= 2e-5
    # Different tokens use different experts, and whole copies of them.
    assert routes.shape == (num_moe_layers(wide), ROWS, LENGTH, wide.moe.top_k)
    used = np.sort(routes, axis=-1).reshape(*routes.shape[:-1], options.top_k, options.granularity)
    assert (used % options.granularity == np.arange(options.granularity)).all()
    copies = used // options.granularity
    assert (copies == copies[..., :1]).all()
    if options.top_k < options.experts:
        assert len(np.unique(copies)) == options.experts


@pytest.mark.parametrize("name", ["copies", "slices"])
def test_any_copies_will_do(name):
    """Forced onto random whole copies the function is the same; onto halves of them it is not."""
    options = CASES[name][1]
    cfg, params, wide, sparse = both(name)
    inputs, shape = tokens_of(cfg), (num_moe_layers(wide), ROWS, LENGTH)
    random = np.random.default_rng(1)
    copies = random.permuted(np.broadcast_to(np.arange(4), (*shape, 4)), axis=-1)[..., :2]
    slices = copies[..., None] * options.granularity + np.arange(options.granularity)
    routes = jnp.asarray(slices.reshape(*shape, -1), jnp.int32)
    want = run(params, cfg, inputs)[0]
    assert np.abs(run(sparse, wide, inputs, routes)[0] - want).max() <= 2e-5
    if options.granularity > 1:
        halves = jnp.broadcast_to(jnp.arange(0, 16, 2), (*shape, 8))
        assert np.abs(run(sparse, wide, inputs, halves)[0] - want).max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_tree_is_that_of_the_sparse_model(name):
    cfg, _, wide, sparse = both(name)
    specs = traverse_util.flatten_dict(param_specs(wide), sep="/")
    got = traverse_util.flatten_dict(sparse, sep="/")
    assert {p: (s.shape, s.dtype) for p, s in specs.items()} == {
        p: (a.shape, a.dtype) for p, a in got.items()
    }
    moe = [i for i, block in enumerate(block_specs(wide)) if block.moe]
    every = CASES[name][1].every
    assert moe == [i for i in range(cfg.num_layers) if (i + 1) % every == 0]
    kernels = [np.asarray(a) for p, a in got.items() if p.endswith("predictor/kernel")]
    assert kernels
    assert not any(k.any() for k in kernels)
    # Layers are told apart: each router is its own.
    routers = [np.asarray(a) for p, a in got.items() if p.endswith("router/kernel")]
    columns = np.concatenate([k[:, :, :: CASES[name][1].granularity] for k in routers])
    assert len(np.unique(columns)) == columns.size
    assert abs(columns.std() / 0.02 - 1) < 0.2


def test_weights_by_hand():
    """Expert c * G + s of one layer is slice s of the dense hidden units."""
    _, params, _, sparse = both("slices")
    dense = params["segment_0"]["block_0"]["ffn"]
    experts = sparse["segment_0"]["block_0"]["moe"]["experts"]
    for layer, copy, s in ((0, 0, 0), (1, 2, 1), (2, 3, 3)):
        e, units = copy * 4 + s, slice(12 * s, 12 * (s + 1))
        np.testing.assert_array_equal(experts["gate"][layer, e], dense["gate"][layer][:, units])
        np.testing.assert_array_equal(experts["up"][layer, e], dense["up"][layer][:, units])
        np.testing.assert_array_equal(experts["down"][layer, e], 4 * dense["down"][layer][units])


def test_noise_is_a_share_of_the_weights():
    options = UpcycleConfig(experts=4, top_k=2, granularity=2, noise=0.1)
    params = random_params(DENSE)
    make = jax.jit(upcycle, static_argnames=("cfg", "options"))
    plain = make(params, DENSE, dataclasses.replace(options, noise=0.0), rng.root(0))
    noisy = make(params, DENSE, options, rng.root(0))
    plain, noisy = (t["segment_0"]["block_0"]["moe"] for t in (plain, noisy))
    np.testing.assert_array_equal(plain["router"]["kernel"], noisy["router"]["kernel"])
    for name in ("gate", "up", "down"):
        added = np.asarray(noisy["experts"][name] - plain["experts"][name], np.float64)
        rms = np.sqrt(np.mean(np.square(plain["experts"][name]), axis=(1, 2, 3)))
        for layer in range(DENSE.num_layers):
            assert abs(added[layer].std() / rms[layer] / 0.1 - 1) < 0.05
        # Every expert has its own.
        assert abs(np.corrcoef(added[0].reshape(8, -1)) - np.eye(8)).max() < 0.2


def test_on_a_mesh():
    """Each device makes its own shards, of the same values."""
    cfg, options = DENSE, CASES["slices"][1]
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    wide = upcycled_config(cfg, options)
    placed = lambda c: param_shardings(param_specs(c), mesh)
    make = partial(upcycle, cfg=cfg, options=options)
    params = random_params(cfg)
    got = jax.jit(make, out_shardings=placed(wide))(
        jax.device_put(params, placed(cfg)), key=rng.root(3)
    )
    want = jax.jit(make)(params, key=rng.root(3))
    for a, b, s in zip(*map(jax.tree.leaves, (got, want, placed(wide))), strict=True):
        assert a.sharding == s
        # XLA compiles the normal draw of the routers differently for a shard.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "cfg, options, message",
    [
        (QWEN, {}, "experts: the model to upcycle has experts already"),
        (DENSE, {"granularity": 5}, "granularity: 5 does not divide .* 48"),
        (DENSE, {"every": 4}, "every: 4, and the model has 3 layers"),
    ],
)
def test_what_cannot_be_upcycled(cfg, options, message):
    with pytest.raises(ConfigError, match=message):
        upcycled_config(cfg, UpcycleConfig(experts=4, **options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"experts": -1}, "experts: must be >= 0"),
        ({"experts": 4, "top_k": 5}, "top_k: must lie between 1 and experts=4, got 5"),
        ({"experts": 4, "top_k": 0}, "top_k"),
        ({"granularity": 0}, "granularity: must be at least 1"),
        ({"every": 0}, "every: must be at least 1"),
        ({"noise": -0.1}, "noise: must be >= 0"),
        ({"router_stddev": -1.0}, "router_stddev: must be >= 0"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        UpcycleConfig(**options).validate()
