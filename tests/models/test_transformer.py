"""The forward against a float64 transformer in numpy; replay, shifts, caches, scans and meshes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core.params import abstract_params, map_with_path
from pr2jax.core.sharding import MeshConfig, batch_sharding, make_mesh, param_shardings
from pr2jax.models import transformer
from pr2jax.models.cache import init_cache
from pr2jax.models.config import ModelConfig, MoEConfig, num_moe_layers
from pr2jax.models.logprobs import token_logprobs
from pr2jax.models.transformer import Record, forward, param_specs
from tests.models import oracle

# A dense layer, then two repeats of (full attention, window): three ways to stand in the stack.
STACK = ModelConfig(
    vocab_size=23,
    d_model=16,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    dense_dim=20,
    first_dense=1,
    moe=MoEConfig(num_experts=8, top_k=3, expert_dim=12, shared_dim=10),
    sliding_window=4,
    window_pattern=(True, False),
    tie_embeddings=False,
)
# Two equal layers in one scan: small programs for gradients.
PLAIN = ModelConfig(
    vocab_size=23,
    d_model=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    moe=MoEConfig(num_experts=8, top_k=2, expert_dim=12),
    logprob_chunk=10,
)
B, T, K, E = 8, 10, 3, 8
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 23, (B, T))
POSITIONS = np.broadcast_to(np.arange(T), (B, T))
ONES = np.ones((B, T), int)
# Rows 1 and 3 are packed, 2 and 3 end in padding.
SEGMENTS, PACKED = ONES.copy(), POSITIONS.copy()
SEGMENTS[1, 4:], PACKED[1, 4:] = 2, np.arange(6)
SEGMENTS[2, 7:], PACKED[2, 7:] = 0, 0
SEGMENTS[3], PACKED[3] = [1, 1, 1, 2, 2, 2, 2, 3, 0, 0], [0, 1, 2, 0, 1, 2, 3, 0, 0, 0]
AT = np.sort(RNG.integers(0, T, (B, 4)), axis=1)


def make_params(cfg, seed=0):
    """Random values for every parameter (zeros and ones would hide mistakes), routers loud."""
    noise = np.random.default_rng(seed)

    def draw(path, spec):
        if path.endswith("scale"):
            return jnp.float32(1 + 0.2 * noise.normal(size=spec.shape))
        wide = 0.1 if path.startswith("embed") else spec.shape[-2] ** -0.5
        wide = 3.0 if "router" in path else wide
        return jnp.float32(wide * noise.normal(size=spec.shape))

    return map_with_path(draw, param_specs(cfg))


@pytest.fixture(scope="module")
def params():
    return make_params(STACK)


@pytest.fixture(scope="module")
def run(params):
    """The live forward with everything on, as one compiled program of its inputs."""

    def fn(tokens, positions, segments, at, params):
        return forward(
            params,
            tokens,
            positions,
            segments,
            cfg=STACK,
            record=Record(at),
            diagnostics=True,
            stats=True,
        )

    fn = oracle.compiled(fn)
    return lambda t, p, s, at=AT, params=params: jax.device_get(fn(t, p, s, at, params))


@pytest.fixture(scope="module")
def live(run):
    return run(TOKENS, PACKED, SEGMENTS)


@pytest.fixture(scope="module")
def truth(params):
    return oracle.forward(params, TOKENS, PACKED, SEGMENTS, STACK)


def test_forward_against_float64(live, truth):
    hidden, routes, logits, inputs = truth
    np.testing.assert_array_equal(live.routes, routes)
    assert live.routes.shape == (num_moe_layers(STACK), B, T, K)
    np.testing.assert_allclose(live.hidden, hidden, atol=5e-5)
    pick = lambda a: np.take_along_axis(a, AT[None, :, :, None], axis=2)
    np.testing.assert_allclose(live.router.logits, pick(logits), atol=5e-5)
    np.testing.assert_allclose(live.router.inputs, pick(inputs), atol=5e-5)
    assert (live.router.agreement == K).all()
    ordered = -np.sort(-logits, axis=-1)
    np.testing.assert_allclose(live.router.margin, ordered[..., 2] - ordered[..., 3], atol=5e-5)


def test_stats_count_real_tokens_only(live, truth):
    _, routes, logits, _ = truth
    real = SEGMENTS > 0
    for layer in range(num_moe_layers(STACK)):
        load = np.bincount(routes[layer][real].reshape(-1), minlength=E)
        np.testing.assert_array_equal(live.router.load[layer], load)
        prob = oracle.softmax(logits[layer][real]).mean(0)
        balance = E * np.sum(load / load.sum() * prob)
        assert live.router.load_balance[layer] == pytest.approx(balance, rel=1e-4)
        z = np.mean(np.log(np.exp(logits[layer][real]).sum(-1)) ** 2)
        assert live.router.z[layer] == pytest.approx(z, rel=1e-4)


def test_packed_rows_equal_separate_rows(run, live):
    tokens, positions, segments = (np.zeros((B, T), int) for _ in range(3))
    documents = [(3, 0, 3), (3, 3, 7), (3, 7, 8), (1, 0, 4), (1, 4, 10)]
    for i, (row, start, end) in enumerate(documents):
        n = end - start
        tokens[i, :n] = TOKENS[row, start:end]
        positions[i, :n] = np.arange(n)
        segments[i, :n] = 1
    alone = run(tokens, positions, segments)
    for i, (row, start, end) in enumerate(documents):
        n = end - start
        np.testing.assert_allclose(alone.hidden[i, :n], live.hidden[row, start:end], atol=1e-5)
        np.testing.assert_array_equal(alone.routes[:, i, :n], live.routes[:, row, start:end])


def test_padding_changes_nothing(run, live):
    real = SEGMENTS > 0
    other = run(np.where(real, TOKENS, 5), PACKED, SEGMENTS)
    np.testing.assert_allclose(other.hidden[real], live.hidden[real], atol=1e-5)
    np.testing.assert_array_equal(other.routes[:, real], live.routes[:, real])
    np.testing.assert_array_equal(other.router.load, live.router.load)
    np.testing.assert_allclose(other.router.load_balance, live.router.load_balance, rtol=1e-5)
    np.testing.assert_allclose(other.router.z, live.router.z, rtol=1e-5)


def test_shift_moves_selection_and_no_gate(params, live):
    fn = oracle.compiled(
        lambda s, p: forward(p, TOKENS, PACKED, SEGMENTS, cfg=STACK, shift=s, diagnostics=True)
    )
    shift = np.zeros((4, 16, E), np.float32)
    still = fn(shift, params)
    np.testing.assert_array_equal(still.routes, live.routes)
    np.testing.assert_array_equal(still.hidden, live.hidden)
    shift = RNG.normal(size=shift.shape).astype(np.float32)
    moved = fn(shift, params)
    hidden, routes, logits, _ = oracle.forward(
        params, TOKENS, PACKED, SEGMENTS, STACK, shift=np.float64(shift)
    )
    np.testing.assert_array_equal(moved.routes, routes)
    np.testing.assert_allclose(moved.hidden, hidden, atol=5e-5)  # gates from unshifted logits
    assert (moved.routes != live.routes).mean() > 0.3
    # Agreement is with the un-shifted live choice of the same forward.
    chosen = oracle.top_k(logits, K)
    both = (routes[..., :, None] == chosen[..., None, :]).sum((-1, -2))
    np.testing.assert_array_equal(moved.router.agreement, both)


def test_unrolled_equals_scanned(params, live):
    fn = oracle.compiled(
        lambda p: forward(p, TOKENS, PACKED, SEGMENTS, cfg=STACK, unroll=True, stats=True)
    )
    out = fn(params)
    np.testing.assert_array_equal(out.routes, live.routes)
    np.testing.assert_allclose(out.hidden, live.hidden, atol=1e-5)
    np.testing.assert_array_equal(out.router.load, live.router.load)


def test_cached_decode_equals_full_forward(params, run):
    """Prompts of ragged lengths prefilled together, then decoded token by token."""
    full = run(TOKENS, POSITIONS, ONES)
    width = 6
    lengths = np.array([6, 1, 3, 5, 2, 6, 4, 1])
    prefill = oracle.compiled(
        lambda tokens, cache: forward(
            params,
            tokens,
            POSITIONS[:, :width],
            (POSITIONS[:, :width] < lengths[:, None]).astype(int),
            cfg=STACK,
            cache=cache,
            read_length=width,
        )
    )
    step = oracle.compiled(
        lambda tokens, positions, cache: forward(
            transformer.unstack_layers(params, STACK),
            tokens,
            positions,
            jnp.ones_like(tokens),
            cfg=STACK,
            cache=cache,
            read_length=12,
        )
    )
    # Garbage behind a prompt's end, and in the whole cache, must never be attended.
    cache = jax.tree.map(lambda a: a + 7.0, init_cache(STACK, B, 16))
    first = POSITIONS[:, :width] < lengths[:, None]
    out = prefill(np.where(first, TOKENS[:, :width], 9), cache)
    np.testing.assert_allclose(out.hidden[first], full.hidden[:, :width][first], atol=1e-4)
    for i in range(T - 1):
        at = np.minimum(lengths + i, T - 1)[:, None]
        out = step(np.take_along_axis(TOKENS, at, 1), at, out.cache)
        expected = np.take_along_axis(full.hidden, at[..., None], 1)
        np.testing.assert_allclose(out.hidden, expected, atol=1e-4)
        np.testing.assert_array_equal(
            out.routes, np.take_along_axis(full.routes, at[None, ..., None], 2)
        )


WEIGHTS = RNG.normal(size=(B, T - 1))


def loss(params, tokens, routes, weights, cfg=PLAIN, mesh=None, dtype=jnp.float32, unroll=None):
    """A weighted sum of log-probs, replaying routes; the forward's output beside it."""
    out = forward(
        params,
        tokens,
        PACKED,
        SEGMENTS,
        cfg=cfg,
        routes=routes,
        diagnostics=True,
        mesh=mesh,
        dtype=dtype,
        unroll=unroll,
        record=Record(),
    )
    logp, _ = token_logprobs(params, out.hidden[:, :-1], tokens[:, 1:], cfg=cfg, temperature=0.8)
    return jnp.sum(logp * weights), (out.routes, out.router.agreement, out.router.logits)


def grad_of(**options):
    fn = lambda p, t, r, w: loss(p, t, r, w, **options)
    return oracle.compiled(jax.value_and_grad(fn, has_aux=True))


@pytest.fixture(scope="module")
def plain():
    """PLAIN's parameters, routes of a perturbed router (a log), and replayed value and gradient."""
    params, other = make_params(PLAIN), make_params(PLAIN, seed=1)
    logged = jax.tree.map(lambda a: a, params)  # all but the router is shared
    block, from_block = (tree["segment_0"]["block_0"]["moe"] for tree in (logged, other))
    block["router"] = from_block["router"]
    _, log, _, _ = oracle.forward(logged, TOKENS, PACKED, SEGMENTS, PLAIN)
    result = jax.device_get(grad_of()(params, TOKENS, log.astype(np.uint8), WEIGHTS))
    return params, log.astype(np.uint8), result


def test_replay_equals_the_log_where_most_routes_flipped(plain):
    _, log, ((_, (routes, agreement, logits)), grads) = plain
    np.testing.assert_array_equal(routes, log)
    live = oracle.top_k(np.float64(logits), 2)
    same = (log[..., :, None] == live[..., None, :]).sum((-1, -2))
    assert (same < 2).mean() > 0.6  # of the replayed tokens, so many would be routed elsewhere
    np.testing.assert_array_equal(agreement, same)
    router = grads["segment_0"]["block_0"]["moe"]["router"]["kernel"]
    assert (np.abs(router).max(axis=(1, 2)) > 1e-4).all()
    # The predictor chooses; no gradient of the policy reaches it.
    assert not grads["segment_0"]["block_0"]["moe"]["predictor"]["kernel"].any()


def test_replayed_gradient_against_float64_differences(plain):
    """Central differences of the numpy transformer's loss, along a few directions."""
    params, log, ((value, _), grads) = plain

    def value64(p):
        hidden = oracle.forward(p, TOKENS, PACKED, SEGMENTS, PLAIN, routes=log)[0]
        return np.sum(
            oracle.logprobs(p, hidden[:, :-1], TOKENS[:, 1:], PLAIN, temperature=0.8)[0] * WEIGHTS
        )

    base = oracle.to64(params)
    assert value == pytest.approx(value64(base), abs=1e-3)
    leaves, tree = jax.tree.flatten(base)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(base)]
    for part in ("router", "experts", "attention", "embed", ""):
        noise = np.random.default_rng(1)
        direction = [
            noise.normal(size=a.shape) * (part in p) for a, p in zip(leaves, paths, strict=True)
        ]
        at = lambda s: value64(
            tree.unflatten([a + s * d for a, d in zip(leaves, direction, strict=True)])  # noqa: B023
        )
        expected = (at(1e-6) - at(-1e-6)) / 2e-6
        got = sum(np.sum(g * d) for g, d in zip(jax.tree.leaves(grads), direction, strict=True))
        scale = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(grads)))
        assert got == pytest.approx(expected, rel=2e-4, abs=1e-5 * scale), part


@pytest.mark.slow
@pytest.mark.parametrize("way", ["unroll", "remat_full", "remat_dots", "mesh"])
def test_other_ways_give_the_same_gradient(plain, way):
    params, log, ((value, _), grads) = plain
    if way == "mesh":
        mesh = make_mesh(MeshConfig(data=4, fsdp=2))
        params = jax.device_put(params, param_shardings(param_specs(PLAIN), mesh))
        tokens = jax.device_put(TOKENS, batch_sharding(mesh, 2))
        log = jax.device_put(log, batch_sharding(mesh, 4, batch_axis=1))
        (other, (routes, *_)), got = grad_of(mesh=mesh)(params, tokens, log, WEIGHTS)
        assert len(jax.tree.leaves(got)[0].sharding.device_set) == 8
    else:
        options = {
            "unroll": {"unroll": True},
            "remat_full": {"cfg": dataclasses.replace(PLAIN, remat="full")},
            "remat_dots": {"cfg": dataclasses.replace(PLAIN, remat="dots")},
        }[way]
        (other, (routes, *_)), got = grad_of(**options)(params, TOKENS, log, WEIGHTS)
    np.testing.assert_array_equal(routes, log)
    assert other == pytest.approx(value, abs=1e-4)
    # Sums are re-associated: what an entry may differ by goes with its largest summands.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5 * np.abs(b).max()), got, grads
    )


def test_precision_in_the_lowered_training_step(plain):
    """In bf16 compute the router and the head multiply fp32 at HIGHEST, forward and backward."""
    params, log, _ = plain
    text = grad_of(dtype=jnp.bfloat16).lower(params, TOKENS, log, WEIGHTS).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    touch = lambda n: [d for d in dots if re.search(rf"[<x]{n}x(\d+x)?(f32|bf16)", d)]
    # Three products each (value, gradients of input and of kernel), E = 8 and V = 23 wide.
    router = [d for d in dots if re.search(r"x8xf32", d) and "x16x" in d and "23" not in d]
    head = touch(23)
    assert len(head) >= 3
    assert len(router) >= 2
    for line in head + router:
        assert "precision = [HIGHEST, HIGHEST]" in line
        assert "bf16" not in line
    assert any("bf16" in d for d in dots)  # the rest is in bf16
    # Logits exist for a chunk of tokens, never for the batch.
    assert re.search(r"tensor<10x23xf32>", text)
    for rows in (f"{B}x{T - 1}", f"{B * (T - 1)}", f"{B}x{T}", f"{B * T}"):
        assert f"tensor<{rows}x23xf32>" not in text


def test_parameters_of_all_layers_in_depth_order(params):
    layers = oracle.layer_params(params, STACK)
    moe = [p["moe"] for p in layers if "moe" in p]
    for got, name in (
        (transformer.router_params(params, STACK), "router"),
        (transformer.predictor_params(params, STACK), "predictor"),
    ):
        np.testing.assert_array_equal(got, np.stack([p[name]["kernel"] for p in moe]))
    assert transformer.selection_biases(params, STACK) is None
    dense = dataclasses.replace(STACK, moe=None)
    shapes = jax.eval_shape(
        lambda p: forward(p, TOKENS, PACKED, SEGMENTS, cfg=dense),
        abstract_params(param_specs(dense)),
    )
    assert shapes.routes is None
    assert shapes.router.logits is None
    assert shapes.hidden.shape == (B, T, 16)


def test_what_does_not_fit_is_named(params, live):
    call = lambda **k: forward(params, TOKENS, PACKED, SEGMENTS, cfg=STACK, **k)
    shift = jnp.zeros((4, 16, E))
    with pytest.raises(ValueError, match="routes and shift are exclusive"):
        call(routes=live.routes, shift=shift)
    with pytest.raises(ValueError, match="routes: 3 layers for a model of 4"):
        call(routes=live.routes[:3])
    with pytest.raises(ValueError, match="shift: 1 layers for a model of 4"):
        call(shift=shift[:1])
