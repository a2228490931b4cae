"""The model on meshes with an expert axis against the same model on one device."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pr2jax.core.params import map_with_path
from pr2jax.core.sharding import (
    RULES,
    MeshConfig,
    batch_sharding,
    decode_rules,
    make_mesh,
    param_shardings,
    row_axes,
)
from pr2jax.models.config import MLAConfig, ModelConfig, MoEConfig
from pr2jax.models.experts import ExpertWeights, choose_block_size, plan_dispatch
from pr2jax.models.logprobs import token_logprobs
from pr2jax.models.ring import ring_experts
from pr2jax.models.transformer import Record, forward, param_specs
from tests.models.test_experts import by_hand

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
    tie_embeddings=False,
    logprob_chunk=10,
)
LATENT = dataclasses.replace(
    CFG,
    qk_norm="none",
    mla=MLAConfig(
        kv_lora_rank=8, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
    ),
    moe=dataclasses.replace(CFG.moe, score="sigmoid", selection_bias=True, routed_scaling=2.0),
)
MESHES = {
    "2x4": MeshConfig(fsdp=2, expert=4),
    "1x8": MeshConfig(expert=8),
    "data": MeshConfig(data=2, fsdp=2, expert=2),
    "tensor": MeshConfig(fsdp=2, expert=2, tensor=2),
}
B, T = 8, 10
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, CFG.vocab_size, (B, T))
SEGMENTS = np.ones((B, T), int)
SEGMENTS[2, 7:] = 0
SEGMENTS[5, 4:] = 2
POSITIONS = np.broadcast_to(np.arange(T), (B, T)).copy()
POSITIONS[5, 4:] = np.arange(6)
WEIGHTS = RNG.normal(size=(B, T)) * (SEGMENTS > 0)
AT = np.sort(RNG.integers(0, T, (B, 4)), axis=1)
SHIFT = RNG.normal(size=(2, CFG.d_model, 8)).astype(np.float32) * 0.3


def values(cfg):
    def value(path, spec):
        rng = np.random.default_rng(sum(path.encode()))
        scale = 1.0 if "router" in path else 0.3
        return (rng.normal(size=spec.shape) * scale).astype(np.float32)

    return map_with_path(value, param_specs(cfg))


@pytest.fixture(scope="module")
def params():
    return values(CFG)


def program(mesh, replay, cfg=CFG):
    """(value, (routes, log-probs, hidden, router output)) and gradients by all parameters."""

    def loss(params, tokens, routes):
        out = forward(
            params,
            tokens,
            jnp.asarray(POSITIONS),
            jnp.asarray(SEGMENTS),
            cfg=cfg,
            mesh=mesh,
            routes=routes if replay else None,
            shift=None if replay else jnp.asarray(SHIFT),
            record=Record(jnp.asarray(AT)),
            diagnostics=True,
            stats=True,
        )
        logp, entropy = token_logprobs(
            params, out.hidden, jnp.roll(tokens, -1, 1), cfg=cfg, entropy=True, mesh=mesh
        )
        value = jnp.sum((logp + 0.1 * entropy) * WEIGHTS)
        value = value + jnp.sum(out.router.load_balance) + jnp.sum(out.router.z)
        real = (SEGMENTS > 0)[..., None]
        seen = (out.routes, logp, entropy, jnp.where(real, out.hidden, 0.0), out.router)
        return value, seen

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def relative(a, b):
    a, b = np.float64(a), np.float64(b)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


@pytest.fixture(scope="module")
def alone(params):
    free = program(None, False)(params, TOKENS, None)
    log = free[0][1][0]
    return {"live": free, "replayed": program(None, True)(params, TOKENS, log)}, log


SLOW = ("live-data", "live-tensor", "replayed-data", "replayed-1x8")
WAYS = [(way, name) for way in ("live", "replayed") for name in MESHES]


@pytest.mark.slow
@pytest.mark.parametrize(
    "way,name",
    [
        pytest.param(*w, marks=[pytest.mark.slow] if "-".join(w) in SLOW else [], id="-".join(w))
        for w in WAYS
    ],
)
def test_mesh_is_one_device(params, alone, name, way):
    """Routes identical; outputs, log-probs, taps and every gradient to 1e-5, norm-wise."""
    expected, log = alone
    mesh = make_mesh(MESHES[name])
    placed = jax.device_put(params, param_shardings(param_specs(CFG), mesh))
    log = jax.device_put(log, batch_sharding(mesh, 4, batch_axis=1))
    assert_same(on(mesh, program(mesh, way == "replayed"), placed, log), expected[way])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2x4", pytest.param("tensor", marks=pytest.mark.slow)])
def test_latent_attention_on_a_mesh_is_one_device(name):
    """As above, of DeepSeek-V3's kind of model: latents, sigmoid scores with a selection bias."""
    mesh, params = make_mesh(MESHES[name]), values(LATENT)
    placed = jax.device_put(params, param_shardings(param_specs(LATENT), mesh))
    alone = program(None, False, LATENT)(params, TOKENS, None)
    assert_same(on(mesh, program(mesh, False, LATENT), placed, None), alone)


def on(mesh, run, placed, log):
    return run(placed, jax.device_put(TOKENS, batch_sharding(mesh, 2)), log)


def assert_same(got, expected):
    ((value, seen), grads), ((value_1, seen_1), grads_1) = got, expected
    real = np.broadcast_to((SEGMENTS > 0)[None, ..., None], seen[0].shape)
    np.testing.assert_array_equal(np.where(real, seen[0], 0), np.where(real, seen_1[0], 0))
    assert abs(value - value_1) <= 1e-5 * abs(value_1)
    for a, b in zip(jax.tree.leaves(seen[1:4]), jax.tree.leaves(seen_1[1:4]), strict=True):
        assert relative(a, b) <= 1e-5
    for field in ("logits", "inputs", "load_balance", "z", "load"):
        assert relative(getattr(seen[4], field), getattr(seen_1[4], field)) <= 1e-5, field
    np.testing.assert_array_equal(seen[4].agreement, seen_1[4].agreement)
    errors = map_with_path(lambda path, a, b: (path, relative(a, b)), grads, grads_1)
    for path, error in jax.tree.leaves(errors, is_leaf=lambda x: isinstance(x, tuple)):
        assert error <= 1e-5, path


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 2, 1])
@pytest.mark.parametrize("impl", ["blocks", "ragged"])
@pytest.mark.parametrize("layout", ["learner", "sampler"])
def test_rows_that_the_mesh_does_not_divide(rows, impl, layout):
    """A ring of all, some or none of the devices, against float64 loops; both layouts."""
    mesh = make_mesh(MeshConfig(fsdp=2, expert=4))
    rules = RULES if layout == "learner" else decode_rules(mesh, 8)
    rng = np.random.default_rng(rows)
    d, f, e, k = 6, 4, 8, 3
    weights = ExpertWeights(*(rng.normal(size=s) for s in ((e, d, f), (e, d, f), (e, f, d))))
    x, dy = rng.normal(size=(2, rows, 3, d))
    gates = rng.random((rows, 3, k))
    ids = rng.integers(0, e + 1, (rows, 3, k)).astype(np.int32)  # 8 is no expert

    def fn(x, weights, gates, dy):
        run = lambda *a: ring_experts(*a, jnp.asarray(ids), mesh=mesh, rules=rules, impl=impl)
        y, pull = jax.vjp(run, x, weights, gates)
        return y, *pull(dy)

    got = jax.jit(fn)(*jax.tree.map(jnp.float32, (x, weights, gates, dy)))
    flat = lambda a: a.reshape(-1, a.shape[-1])
    expected = by_hand(flat(ids), flat(x), weights, flat(gates), flat(dy), experts=e)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.reshape(a, b.shape), b, rtol=1e-4, atol=1e-4)


def test_a_device_computes_what_its_experts_are_sent():
    """Rows multiplied a device, expert axis 1 -> 8: at least 6 times fewer, for even loads."""
    tokens, experts, k, devices = 4096, 64, 4, 8
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k].astype(np.int32)

    def rows(first, own):
        block = choose_block_size(ids.size * own // experts, own)
        here = np.where((ids >= first) & (ids < first + own), ids - first, own)
        return int(plan_dispatch(jnp.asarray(here), own, block).num_blocks) * block

    own = experts // devices
    busiest = max(rows(i * own, own) for i in range(devices))
    assert rows(0, experts) / busiest >= 6


@pytest.mark.parametrize("rows", [16, 64])
def test_products_of_the_compiled_layer_are_blocks(rows):
    """No product in the compiled layer has as many rows as the ring has assignments."""
    mesh = make_mesh(MeshConfig(expert=8))
    d, f, e, k, t = 32, 24, 16, 2, 16
    weights = ExpertWeights(*(np.zeros(s, np.float32) for s in ((e, d, f), (e, d, f), (e, f, d))))
    x, gates = np.zeros((rows, t, d), np.float32), np.zeros((rows, t, k), np.float32)
    ids = np.zeros((rows, t, k), np.int32)

    def fn(x, weights, gates):
        run = lambda *a: ring_experts(*a, ids, mesh=mesh, rules=RULES, impl="blocks").sum()
        return jax.grad(run, argnums=(0, 1, 2))(x, weights, gates)

    text = jax.jit(fn).lower(x, weights, gates).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    block = choose_block_size(rows * t * k * 2 // e, 2)
    shapes = [int(n) for line in dots for n in re.findall(r"tensor<(\d+)x", line)]
    assert len(dots) >= 5
    assert max(shapes) <= max(block, d, 2 * f) < rows * t * k


def test_row_axes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    assert row_axes(mesh, 16) == ("data", "fsdp", "expert")
    assert row_axes(mesh, 4) == ("data", "fsdp")
    assert row_axes(mesh, 6) == ("data",)
    assert row_axes(mesh, 3) == ()


def test_decode_rules_spread_experts_where_they_divide():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=4))
    specs = param_specs(CFG)
    experts = lambda n: NamedSharding(mesh, PartitionSpec(None, decode_rules(mesh, n)["experts"]))
    placed = param_shardings(specs, mesh, decode_rules(mesh, 8))
    moe = placed["segment_1"]["block_0"]["moe"]
    assert moe["experts"]["gate"] == experts(8)
    assert moe["experts"]["gate"].spec == PartitionSpec(None, ("fsdp", "expert"))
    assert experts(4).spec == PartitionSpec(None, ("expert",))
    assert placed["segment_1"]["block_0"]["attention"]["q"]["kernel"].spec == PartitionSpec()
