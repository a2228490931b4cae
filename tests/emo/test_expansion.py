"""Growth of a state: what passes, what is new, on one device and on a mesh, to the bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core import rng
from pr2jax.core.config import ConfigError
from pr2jax.core.optim import OptimConfig, build_optimizer
from pr2jax.core.params import init_params, map_with_path, tree_paths
from pr2jax.core.sharding import MeshConfig, ShardingError, make_mesh, param_shardings
from pr2jax.core.state import abstract_state, create
from pr2jax.emo.expansion import (
    GrowthConfig,
    expand,
    expand_params,
    growing,
    grown_config,
    unmasked_config,
)
from pr2jax.models.config import MLAConfig, ModelConfig, MoEConfig
from pr2jax.models.transformer import Record, forward, param_specs

CFG = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    dense_dim=24,
    first_dense=1,
    moe=MoEConfig(num_experts=8, top_k=3, expert_dim=12, shared_dim=8),
)
BIASED = dataclasses.replace(
    CFG, moe=dataclasses.replace(CFG.moe, score="sigmoid", selection_bias=True)
)
LATENT = dataclasses.replace(BIASED, mla=MLAConfig(), qk_norm="none")
KEY = rng.root(3)
OPTIM = OptimConfig(learning_rate=1e-2)
MASKED = GrowthConfig(init="masked_copy")
TOKENS = np.random.default_rng(0).integers(0, 32, (8, 10))
EXPERT_PATH = "segment_1/block_0/moe/experts/down"


def noisy_params(cfg):
    """Parameters with nothing at zero: biases and predictors too."""
    params = init_params(param_specs(cfg), rng.root(0))
    noise = lambda path, p: p + 0.1 * jax.random.normal(rng.named(KEY, path), p.shape)
    return map_with_path(noise, params)


def trained_state(cfg, mesh=None):
    """Params and moments of two updates with random gradients."""
    optimizer = build_optimizer(OPTIM, param_specs(cfg))
    state = create(noisy_params(cfg), optimizer)
    params, moments = state.params, state.opt_state
    for step in range(2):
        draw = lambda path, p: jax.random.normal(rng.named(KEY, path, step), p.shape)  # noqa: B023
        params, moments, _ = optimizer.update(map_with_path(draw, params), moments, params)
    state = state.replace(params=params, opt_state=moments, step=state.step + 2)
    if mesh is None:
        return state
    abstract = abstract_state(
        jax.tree.map(jax.device_put, params, param_shardings(param_specs(cfg), mesh)), optimizer
    )
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, abstract)


def outputs(params, cfg):
    positions = jnp.broadcast_to(jnp.arange(10), (8, 10))
    run = lambda p: forward(
        p,
        jnp.asarray(TOKENS),
        positions,
        jnp.ones_like(positions),
        cfg=cfg,
        record=Record(),
        stats=True,
        diagnostics=True,
    )
    return jax.jit(run)(params)


def relative(a, b):
    a, b = np.float64(a), np.float64(b)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [CFG, BIASED, LATENT], ids=["softmax", "biased", "latent"])
@pytest.mark.parametrize(
    "top_k,experts",
    [(3, 12), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((1, 16), (8, 20)))],
)
def test_masked_copy_leaves_the_function_as_it_is(cfg, top_k, experts):
    cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, top_k=top_k))
    params = noisy_params(cfg)
    wide = grown_config(cfg, experts, masked=True)
    before = outputs(params, cfg)
    after = outputs(expand_params(params, cfg, wide, MASKED, KEY), wide)
    np.testing.assert_array_equal(after.routes, before.routes)
    assert relative(after.hidden, before.hidden) <= 1e-6
    for field in ("logits", "inputs", "load_balance", "z", "load", "margin"):
        assert relative(getattr(after.router, field), getattr(before.router, field)) <= 1e-6, field
    assert after.router.logits.shape == before.router.logits.shape


@pytest.mark.slow
def test_masked_experts_get_no_gradient_and_unmasked_ones_are_used():
    wide = grown_config(BIASED, 16, masked=True)
    params = expand_params(noisy_params(BIASED), BIASED, wide, MASKED, KEY)

    def loss(p, cfg):
        positions = jnp.broadcast_to(jnp.arange(10), (8, 10))
        out = forward(p, TOKENS, positions, jnp.ones_like(positions), cfg=cfg, stats=True)
        return jnp.sum(out.hidden[..., 0]) + jnp.sum(out.router.load_balance + out.router.z)

    grads = jax.grad(loss)(params, wide)
    for path in growing(BIASED, wide):
        leaf = grads
        for name in path.split("/"):
            leaf = leaf[name]
        axis = growing(BIASED, wide)[path][0]
        newborn = np.take(np.asarray(leaf), np.arange(8, 16), axis=axis)
        assert not newborn.any(), path
    free = outputs(params, unmasked_config(wide))
    assert (np.asarray(free.routes) >= 8).any()


@pytest.mark.slow
@pytest.mark.parametrize("init", ["gaussian", "gaussian_bias_reset", "copy", "copy_noise"])
@pytest.mark.parametrize("moments", ["reset", "keep", "copy"])
def test_what_grows_and_what_stays(init, moments):
    """Against the definitions, leaf by leaf, in numpy."""
    options = GrowthConfig(init=init, optimizer=moments)
    wide = grown_config(BIASED, 12)
    optimizer = build_optimizer(OPTIM, param_specs(wide))
    old = trained_state(BIASED)
    new = expand(old, BIASED, wide, options, KEY, optimizer)
    grows = growing(BIASED, wide)
    assert {p.split("/moe/")[1] for p in grows} == {
        "experts/gate",
        "experts/up",
        "experts/down",
        "router/kernel",
        "router/selection_bias",
        "predictor/kernel",
    }
    assert int(new.step) == int(new.opt_state.count) == 2

    def check(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        if path not in grows:
            np.testing.assert_array_equal(b, a, path)
            return
        axis, spec = grows[path]
        kept, newborn = np.split(b, [8], axis=axis)
        copies = np.take(a, [0, 1, 2, 3], axis=axis)
        if init == "gaussian_bias_reset" and path.endswith("selection_bias"):
            assert not b.any()
            return
        np.testing.assert_array_equal(kept, a, path)
        if init == "copy" or (init == "copy_noise" and not hasattr(spec.init, "stddev")):
            np.testing.assert_array_equal(newborn, copies, path)
        elif init == "copy_noise":
            ratio = newborn / copies - 1.0
            assert 0.005 < ratio.std() < 0.015
            assert abs(ratio.mean()) < 0.005
        elif hasattr(spec.init, "stddev"):
            wanted = spec.init.stddev(spec.shape)
            assert 0.8 * wanted < newborn.std() < 1.2 * wanted, path
            assert abs(newborn.mean()) < 0.2 * wanted
        else:
            assert not newborn.any()

    map_with_path(check, old.params, new.params)
    adam_old, adam_new = (s.opt_state.groups["default"][1] for s in (old, new))
    if moments == "reset":
        assert not any(np.asarray(x).any() for x in jax.tree.leaves((adam_new.mu, adam_new.nu)))
        assert int(adam_new.count) == 0
        return
    assert int(adam_new.count) == 2

    def check_moment(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        if path in grows:
            axis = grows[path][0]
            copies = np.take(a, [0, 1, 2, 3], axis=axis)
            newborn = np.zeros_like(copies) if moments == "keep" else copies
            a = np.concatenate([a, newborn], axis=axis)
        np.testing.assert_array_equal(b, a, path)

    for name in ("mu", "nu"):
        map_with_path(check_moment, getattr(adam_old, name), getattr(adam_new, name))


@pytest.mark.slow
@pytest.mark.parametrize("init", ["gaussian_bias_reset", "copy_noise", "masked_copy"])
@pytest.mark.parametrize(
    "axes", [{"fsdp": 2, "expert": 4}, pytest.param({"expert": 8}, marks=pytest.mark.slow)]
)
def test_on_a_mesh_the_same_state_to_the_bit(init, axes):
    mesh = make_mesh(MeshConfig(**axes))
    options = GrowthConfig(init=init, optimizer="copy")
    wide = grown_config(BIASED, 16, masked=init == "masked_copy")
    optimizer = build_optimizer(OPTIM, param_specs(wide))
    alone = expand(trained_state(BIASED), BIASED, wide, options, KEY, optimizer)
    spread = expand(trained_state(BIASED, mesh), BIASED, wide, options, KEY, optimizer, mesh)
    paths = tree_paths(alone)
    for path, a, b in zip(paths, jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
    experts = spread.params["segment_1"]["block_0"]["moe"]["experts"]["gate"]
    assert experts.addressable_shards[0].data.shape[1] == 16 // axes["expert"]
    moment = spread.opt_state.groups["default"][1].mu["segment_1"]["block_0"]["moe"]["experts"]
    assert moment["gate"].sharding == experts.sharding


def test_every_newborn_is_its_own():
    """No two drawn experts are alike, in a layer or between layers; keys part them too."""
    wide = grown_config(CFG, 16)
    grow = lambda key: expand_params(noisy_params(CFG), CFG, wide, GrowthConfig(), key)
    one, two = grow(KEY), grow(rng.root(4))
    leaf = lambda p: np.asarray(p["segment_1"]["block_0"]["moe"]["experts"]["gate"])[:, 8:]
    rows = leaf(one).reshape(16, -1)
    assert len(np.unique(rows, axis=0)) == 16
    assert not np.array_equal(leaf(one), leaf(two))
    np.testing.assert_array_equal(leaf(one), leaf(grow(KEY)))


def test_what_cannot_grow():
    dense = dataclasses.replace(CFG, moe=None)
    with pytest.raises(ConfigError, match="upcycle it first"):
        grown_config(dense, 16)
    with pytest.raises(ConfigError, match="cannot shrink to 4"):
        grown_config(CFG, 4)
    with pytest.raises(ConfigError, match="8 are still masked"):
        grown_config(grown_config(CFG, 16, masked=True), 32)
    groups = dataclasses.replace(CFG.moe, num_groups=2, top_groups=2)
    with pytest.raises(ConfigError, match="those of 2 groups cannot grow"):
        grown_config(dataclasses.replace(CFG, moe=groups), 16)
    wide = dataclasses.replace(grown_config(CFG, 16), d_model=32)
    with pytest.raises(ConfigError, match="the grown model differs at"):
        growing(CFG, wide)
    mesh = make_mesh(MeshConfig(expert=8))
    wide = grown_config(CFG, 12)
    optimizer = build_optimizer(OPTIM, param_specs(wide))
    with pytest.raises(ShardingError, match="12 is not divided by"):
        expand(trained_state(CFG, mesh), CFG, wide, GrowthConfig(), KEY, optimizer, mesh)
