"""Latent attention: absorbed against plain, float64 loops, the cache, the kernels, the sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pr2jax.core import rng
from pr2jax.core.config import ConfigError, from_config_dict, to_config_dict
from pr2jax.core.sharding import MeshConfig, make_mesh, param_shardings
from pr2jax.models.attention import einsum_attention, packed_mask, resolve_impl, splash_attention
from pr2jax.models.blocked_attention import blocked_attention
from pr2jax.models.cache import init_cache
from pr2jax.models.config import MLAConfig, ModelConfig, RopeScaling
from pr2jax.models.flops import active_params, forward_flops, total_params
from pr2jax.models.layers import rope_tables
from pr2jax.models.logprobs import logits
from pr2jax.models.mla import (
    absorbed_attention,
    absorbs,
    expand,
    mla_attention,
    mla_specs,
    softmax_factor,
)
from pr2jax.models.transformer import forward, param_specs
from pr2jax.sampler.engine import Sampler
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from tests.models import oracle
from tests.models.checkpoints import MOONLIGHT, random_params

YARN = RopeScaling("yarn", factor=8.0, original_max_position=16, attention_factor=1.0)
QUERY_LATENT = dataclasses.replace(
    MOONLIGHT,
    attention_bias=True,
    attention_out_bias=True,
    rope_scaling=YARN,
    mla=dataclasses.replace(MOONLIGHT.mla, q_lora_rank=10, yarn_mscale_all_dim=0.8),
)
KINDS = {"moonlight": MOONLIGHT, "query_latent_yarn": QUERY_LATENT}
# Moonlight-16B-A3B's own sizes.
PUBLISHED = MLAConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def relative(a, b):
    """Norm of the difference over the norm."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("window", [0, 3])
def test_absorbed_equals_plain(window):
    mla, noise = MOONLIGHT.mla, np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(noise.standard_normal(shape))
    segments = jnp.asarray(np.repeat([[1, 2, 0], [1, 2, 3]], [5, 4, 2], axis=1))
    mask = packed_mask(segments, window)
    args = draw(2, 11, 16), draw(2, 11, 4), draw(16, 3, 14)
    q = draw(2, 11, 3, 12)

    @oracle.compiled
    def both(q, *args):
        plain = einsum_attention(q, *expand(*args, mla), mask)
        return absorbed_attention(q, *args, mask, mla), plain

    absorbed, plain = both(q, *args)
    assert absorbed.shape == (2, 11, 3, 6)
    assert relative(absorbed, plain) <= 1e-5


def attend64(p, x, positions, segment_ids, cfg):
    """One row [T, D] in float64, head by head, query by query, from the paper's equations."""
    m, t = cfg.mla, len(x)
    n, c = m.qk_nope_head_dim, m.kv_lora_rank
    bias = lambda name: p[name].get("bias", 0.0)
    rope = lambda y: oracle.rope(y, positions, cfg.rope_theta)
    down = x @ p["kv_down"]["kernel"] + bias("kv_down")
    latent = oracle.norm(down[:, :c], p["kv_norm"]["scale"], m.norm_eps)
    shared = rope(down[:, None, c:])[:, 0]
    if m.q_lora_rank:
        x = x @ p["q_down"]["kernel"] + bias("q_down")
        x = oracle.norm(x, p["q_norm"]["scale"], m.norm_eps)
    q = np.einsum("td,dhe->the", x, p["q_up" if m.q_lora_rank else "q"]["kernel"])
    y = np.zeros((t, p["o"]["kernel"].shape[-1])) + bias("o")
    for h in range(cfg.num_heads):
        up = p["kv_up"]["kernel"][:, h]
        keys = np.concatenate([latent @ up[:, :n], shared], axis=1)
        queries = np.concatenate([q[:, h, :n], rope(q[:, h : h + 1, n:])[:, 0]], axis=1)
        for i in range(t):
            seen = [j for j in range(i + 1) if segment_ids[j] == segment_ids[i]]
            weights = oracle.softmax(keys[seen] @ queries[i] / np.sqrt(n + m.qk_rope_head_dim))
            y[i] += weights @ latent[seen] @ up[:, n:] @ p["o"]["kernel"][h]
    return y


@pytest.mark.parametrize("rank", [0, 10])
def test_layer_against_float64(rank):
    bias = rank > 0
    cfg = dataclasses.replace(MOONLIGHT, attention_bias=bias, attention_out_bias=bias)
    cfg = dataclasses.replace(cfg, mla=dataclasses.replace(cfg.mla, q_lora_rank=rank))
    noise = np.random.default_rng(0)
    draw = lambda spec: jnp.float32(0.3 * noise.standard_normal(spec.shape[1:]))
    params = jax.tree.map(draw, mla_specs(cfg, 1))
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 6 + [2, 3, 3]])
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0], [*range(6), 0, 0, 1]])
    x = noise.standard_normal((2, 9, cfg.d_model)).astype(np.float32)

    def run(params, x):
        return mla_attention(
            params,
            x,
            cfg=cfg,
            rope=rope_tables(cfg, jnp.asarray(positions)),
            positions=jnp.asarray(positions),
            segment_ids=jnp.asarray(segments),
            mask=packed_mask(jnp.asarray(segments), 0),
            window=0,
            impl="einsum",
            cache=None,
            layer=0,
            read_length=0,
        )[0]

    y = oracle.compiled(run)(params, x)
    for b in range(2):
        want = attend64(oracle.to64(params), np.float64(x[b]), positions[b], segments[b], cfg)
        np.testing.assert_allclose(y[b], want, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_cached_decode_equals_the_full_forward(name):
    """A prompt at once (expanded), then token by token (absorbed), rows at their own positions."""
    cfg = KINDS[name]
    params = jax.tree.map(jnp.asarray, random_params(cfg))
    length, starts = 12, np.array([7, 4])
    assert not absorbs(cfg.mla, 7, length)
    assert absorbs(cfg.mla, 1, length)
    tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, length))
    everywhere = np.broadcast_to(np.arange(length), (2, length))
    full = oracle.compiled(
        lambda t: forward(params, t, everywhere, jnp.ones_like(everywhere), cfg=cfg).hidden
    )(tokens)

    @oracle.compiled
    def step(cache, tokens, positions):
        ones = jnp.ones_like(positions)
        out = forward(params, tokens, positions, ones, cfg=cfg, cache=cache)
        return out.cache, out.hidden

    cache = init_cache(cfg, 2, length)
    # What lies behind a row's prompt is overwritten before it is seen.
    cache, hidden = step(cache, tokens[:, :7], everywhere[:, :7])
    for b, start in enumerate(starts):
        assert relative(hidden[b, :start], full[b, :start]) <= 1e-5
    rows = np.arange(2)
    for i in range(5):
        at = starts + i
        cache, hidden = step(cache, tokens[rows, at][:, None], at[:, None])
        assert relative(hidden[:, 0], full[rows, at]) <= 1e-5


def test_the_cache_holds_latents_only():
    cache = jax.eval_shape(lambda: init_cache(MOONLIGHT, 5, 7))
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(cache))
    assert shapes == [(3, 5, 1, 7, 4), (3, 5, 1, 7, 16)]
    assert cache.length == 7


def test_what_is_cheaper_at_moonlights_size():
    assert absorbs(PUBLISHED, 1, 2)
    assert absorbs(PUBLISHED, 1, 8192)
    assert absorbs(PUBLISHED, 16, 4096)  # a few tokens behind a long prefix
    assert not absorbs(PUBLISHED, 2048, 2048)


@pytest.mark.parametrize("kernel", ["blocked", "splash"])
def test_kernels_take_values_narrower_than_keys(kernel):
    """Values and gradients against the einsum; heads of 192 and values of 128 on splash."""
    rows, length, wide, narrow = (2, 300, 12, 6) if kernel == "blocked" else (1, 128, 192, 128)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, length, 2, w) for w in (wide, wide, narrow, narrow)]
    q, k, v, dy = (jax.random.normal(a, s) for a, s in zip(keys, shapes, strict=True))
    segments = np.repeat([1, 2, 0], [length // 3, length // 2, length - length // 3 - length // 2])
    segments = jnp.asarray(np.broadcast_to(segments, (rows, length)))

    def both(fn):
        def run(q, k, v):
            out, pull = jax.vjp(fn, q, k, v)
            return out, *pull(dy)

        return jax.jit(run)(q, k, v)

    if kernel == "blocked":
        got = both(lambda q, k, v: blocked_attention(q, k, v, segments, 0))
    else:
        got = both(lambda q, k, v: splash_attention(q, k, v, segments, 0, interpret=True))
    want = both(lambda q, k, v: einsum_attention(q, k, v, packed_mask(segments, 0)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 if kernel == "blocked" else 3e-4)


def test_kernels_by_platform():
    cfg = dataclasses.replace(MOONLIGHT, mla=PUBLISHED)
    assert resolve_impl(cfg, "tpu", 256, jnp.bfloat16) == "splash"
    # 192 wide: more than cuDNN takes before Hopper.
    assert resolve_impl(cfg, "gpu", 256, jnp.bfloat16) == "einsum"


def test_the_blocked_forward_equals_the_einsum_one():
    tokens = np.random.default_rng(2).integers(0, MOONLIGHT.vocab_size, (2, 140))
    positions = jnp.broadcast_to(jnp.arange(140), (2, 140))
    params = jax.tree.map(jnp.asarray, random_params(MOONLIGHT))
    hidden = []
    for impl in ("blocked", "einsum"):
        cfg = dataclasses.replace(MOONLIGHT, attention_impl=impl)
        run = lambda p, t: forward(p, t, positions, jnp.ones_like(t), cfg=cfg).hidden  # noqa: B023
        hidden.append(oracle.compiled(run)(params, tokens))
    assert relative(*hidden) <= 1e-5


def test_on_a_mesh():
    """Heads over tensor, rows over data: hidden states and gradients of one device's."""
    cfg = dataclasses.replace(QUERY_LATENT, moe=None, num_layers=2, tie_embeddings=True)
    params = jax.tree.map(jnp.asarray, random_params(cfg))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = param_shardings(param_specs(cfg), mesh)
    attention = shardings["segment_0"]["block_0"]["attention"]
    assert attention["kv_up"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert attention["q_up"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert attention["o"]["kernel"].spec == PartitionSpec(None, "tensor", None, "fsdp")
    assert attention["kv_down"]["kernel"].spec == PartitionSpec(None, "fsdp")
    tokens = np.random.default_rng(3).integers(0, cfg.vocab_size, (4, 9))
    positions = jnp.broadcast_to(jnp.arange(9), (4, 9))

    def run(params, mesh):
        def loss(p):
            out = forward(p, tokens, positions, jnp.ones_like(positions), cfg=cfg, mesh=mesh)
            return jnp.mean(jnp.square(out.hidden[..., :3])), out.hidden

        grads, hidden = jax.grad(loss, has_aux=True)(params)
        return hidden, grads

    want = oracle.compiled(lambda p: run(p, None))(params)
    got = oracle.compiled(lambda p: run(p, mesh))(jax.device_put(params, shardings))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) <= 1e-5


@pytest.mark.slow
def test_through_the_sampler():
    """Two responses to three prompts through four slots; log-probs and routes of a full forward."""
    cfg = dataclasses.replace(MOONLIGHT, vocab_size=24, num_layers=2)
    params = jax.tree.map(jnp.asarray, random_params(cfg))
    config = SamplerConfig(
        slots=4,
        chunk=4,
        max_prompt=16,
        max_tokens=8,
        bucket=24,
        prefill_rows=2,
        unroll_layers=False,
    )
    sampler = Sampler(cfg, config, params=params)
    prompts = [
        np.random.default_rng(i).integers(0, 24, n).tolist() for i, n in enumerate((5, 16, 1))
    ]
    r, _ = sampler.rollout(prompts, 2, SamplingParams(max_tokens=8), key=rng.root(7))
    positions = np.broadcast_to(np.arange(24), (6, 24))
    real = (positions < r.lengths[:, None]).astype(np.int32)

    @oracle.compiled
    def full(tokens):
        out = forward(params, tokens, positions, real, cfg=cfg)
        return jax.nn.log_softmax(logits(params, out.hidden, cfg)), out.routes

    logp, routes = full(r.tokens)
    rows, at = np.nonzero(r.loss_mask)
    assert len(rows) == 6 * 8
    want = np.asarray(logp)[rows, at - 1, r.tokens[rows, at]]
    np.testing.assert_allclose(r.behavior_logprobs[rows, at], want, atol=1e-5)
    fed = positions < r.lengths[:, None] - 1
    np.testing.assert_array_equal(r.routes[:, fed], np.asarray(routes)[:, fed])


@pytest.mark.parametrize("rank", [0, 7])
def test_forward_flops_by_hand(rank):
    """2 operations for each multiply-add of each product of one token of a dense model."""
    mla = dataclasses.replace(MOONLIGHT.mla, q_lora_rank=rank)
    cfg = dataclasses.replace(MOONLIGHT, mla=mla, moe=None)
    d, h, c, n, r, v = 32, 4, 16, 8, 4, 6
    layer = d * rank + rank * h * (n + r) if rank else d * h * (n + r)
    layer += d * (c + r) + c * h * n + c * h * v + h * v * d
    layer += 10 * h * (n + r) + 10 * h * v  # ten positions: scores, and their mix of values
    layer += 3 * d * cfg.dense_dim
    assert forward_flops(cfg, 7, 10) == 7 * 2 * (3 * layer + d * cfg.vocab_size)


def test_yarn_scales_the_softmax():
    assert softmax_factor(MOONLIGHT) == 1.0
    assert softmax_factor(QUERY_LATENT) == pytest.approx((0.08 * np.log(8.0) + 1) ** 2)


def test_config_there_and_back():
    for cfg in (MOONLIGHT, dataclasses.replace(MOONLIGHT, mla=None)):
        edited = to_config_dict(cfg)
        assert from_config_dict(ModelConfig, edited) == cfg
    edited = to_config_dict(MOONLIGHT)
    edited.mla.kv_lora_rank = 8
    assert from_config_dict(ModelConfig, edited).mla.kv_lora_rank == 8


@pytest.mark.parametrize(
    "changes, latent, message",
    [
        ({"qk_norm": "head"}, {}, "qk_norm: must be 'none' with mla, got 'head'"),
        ({"clip_qkv": 2.0}, {}, "clip_qkv: must be 0.0 with mla"),
        ({}, {"kv_lora_rank": 0}, "mla.kv_lora_rank: must be at least 1"),
        ({}, {"q_lora_rank": -1}, "mla.q_lora_rank: must be >= 0"),
        ({}, {"qk_rope_head_dim": 5}, "mla.qk_rope_head_dim: rotary embeddings need an even"),
        ({}, {"yarn_mscale_all_dim": 1.0}, "mla.yarn_mscale_all_dim: only with rope_scaling.kind"),
    ],
)
def test_bad_configs_are_named(changes, latent, message):
    mla = dataclasses.replace(MOONLIGHT.mla, **latent)
    cfg = dataclasses.replace(MOONLIGHT, mla=mla, **changes)
    with pytest.raises(ConfigError, match=message):
        from_config_dict(ModelConfig, to_config_dict(cfg))


def test_moonlights_size():
    """15.29 billion parameters without embeddings, 2.24 of them active (arXiv 2502.16982)."""
    cfg = ModelConfig(
        vocab_size=163840,
        d_model=2048,
        num_layers=27,
        num_heads=16,
        num_kv_heads=16,
        dense_dim=11264,
        first_dense=1,
        moe=dataclasses.replace(
            MOONLIGHT.moe, num_experts=64, top_k=6, expert_dim=1408, shared_dim=2816
        ),
        mla=PUBLISHED,
        qk_norm="none",
        tie_embeddings=False,
    )
    embeddings, predictor = 2 * 163840 * 2048, 26 * 2048 * 64
    for count, billions in ((total_params, 15.29), (active_params, 2.24)):
        assert round((count(cfg) - embeddings - predictor) / 1e9, 2) == billions
