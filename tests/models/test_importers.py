"""Import and export against `transformers`: logits, routes, and there and back to the bit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pr2jax.models import logprobs
from pr2jax.models.config import RopeScaling, num_moe_layers
from pr2jax.models.importers import hf
from pr2jax.models.importers.families import FAMILIES
from pr2jax.models.importers.hf import (
    export_checkpoint,
    import_checkpoint,
)
from pr2jax.models.transformer import forward
from tests.models.checkpoints import (
    LLAMA,
    MIXTRAL,
    MOONLIGHT,
    OLMOE,
    QWEN,
    QWEN_DENSE,
    assert_same_params,
    assert_same_tensors,
    change,
    random_params,
)

ROWS, LENGTH = 3, 24

CASES = {
    "qwen_3_heads_1_kv": ("qwen3_moe", change(QWEN, num_heads=3, num_kv_heads=1, rope_theta=1e6)),
    "qwen_5_heads_tied_linear": (
        "qwen3_moe",
        change(
            QWEN,
            {"normalize": "none", "num_experts": 7, "top_k": 2},
            num_heads=5,
            num_kv_heads=5,
            head_dim=6,
            tie_embeddings=True,
            rope_scaling=RopeScaling("linear", factor=4.0),
        ),
    ),
    "qwen_llama3_bias_dense_layers": (
        "qwen3_moe",
        change(
            QWEN,
            num_layers=5,
            moe_every=2,
            dense_layers=(3,),
            attention_bias=True,
            attention_out_bias=True,
            rope_scaling=RopeScaling(
                "llama3",
                factor=8.0,
                original_max_position=16,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            ),
        ),
    ),
    "qwen_yarn_window": (
        "qwen3_moe",
        change(
            QWEN,
            num_heads=6,
            num_kv_heads=2,
            sliding_window=5,
            norm_eps=1e-3,
            rope_scaling=RopeScaling("yarn", factor=4.0, original_max_position=16),
        ),
    ),
    "olmoe_clip": ("olmoe", change(OLMOE, clip_qkv=0.7)),
    "olmoe_tied_normalized_yarn": (
        "olmoe",
        change(
            OLMOE,
            {"normalize": "post", "num_experts": 5, "top_k": 1},
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            tie_embeddings=True,
            rope_scaling=RopeScaling(
                "yarn",
                factor=2.5,
                original_max_position=16,
                beta_fast=8.0,
                beta_slow=2.0,
                attention_factor=1.3,
                truncate=False,
            ),
        ),
    ),
    "olmoe_odd_heads_bfloat16": (
        "olmoe",
        change(
            OLMOE,
            num_layers=3,
            d_model=40,
            num_heads=5,
            num_kv_heads=5,
            rope_theta=5e5,
            attention_bias=True,
            attention_out_bias=True,
        ),
    ),
    "llama_llama3_tied": (
        "llama",
        change(
            LLAMA,
            num_heads=8,
            num_kv_heads=2,
            head_dim=4,
            tie_embeddings=True,
            rope_theta=1e5,
            norm_eps=1e-5,
            rope_scaling=RopeScaling(
                "llama3",
                factor=8.0,
                original_max_position=16,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
            ),
        ),
    ),
    "llama_bias_wide_heads_linear": (
        "llama",
        change(
            LLAMA,
            num_layers=3,
            num_kv_heads=1,
            head_dim=10,
            attention_bias=True,
            attention_out_bias=True,
            rope_scaling=RopeScaling("linear", factor=2.0),
        ),
    ),
    "llama_yarn_bfloat16": (
        "llama",
        change(
            LLAMA,
            num_kv_heads=4,
            rope_scaling=RopeScaling("yarn", factor=4.0, original_max_position=16),
        ),
    ),
    "qwen3_tied_some_windows": (
        "qwen3",
        change(
            QWEN_DENSE,
            num_layers=5,
            num_heads=5,
            num_kv_heads=1,
            tie_embeddings=True,
            rope_theta=1e6,
            sliding_window=5,
            window_pattern=(False, True, True, False, True),
        ),
    ),
    "qwen3_bias_llama3_windows": (
        "qwen3",
        change(
            QWEN_DENSE,
            attention_bias=True,
            attention_out_bias=True,
            sliding_window=4,
            rope_scaling=RopeScaling("llama3", factor=4.0, original_max_position=16),
        ),
    ),
    "qwen3_yarn": (
        "qwen3",
        change(
            QWEN_DENSE,
            num_kv_heads=4,
            rope_scaling=RopeScaling("yarn", factor=3.0, original_max_position=16),
        ),
    ),
    "mixtral": ("mixtral", change(MIXTRAL, {"top_k": 2}, rope_theta=1e6)),
    "mixtral_tied_window_wide_heads": (
        "mixtral",
        change(
            MIXTRAL,
            {"num_experts": 5, "top_k": 1},
            num_layers=3,
            num_heads=3,
            num_kv_heads=1,
            head_dim=10,
            tie_embeddings=True,
            sliding_window=5,
        ),
    ),
    "moonlight": ("deepseek_v3", MOONLIGHT),
    "deepseek_groups_query_latent_yarn": (
        "deepseek_v3",
        change(
            MOONLIGHT,
            {"num_groups": 4, "top_groups": 2, "shared_dim": 16, "routed_scaling": 2.5},
            mla=dataclasses.replace(MOONLIGHT.mla, q_lora_rank=10, yarn_mscale_all_dim=1.0),
            first_dense=2,
            attention_bias=True,
            attention_out_bias=True,
            rope_scaling=RopeScaling(
                "yarn", factor=40.0, original_max_position=16, attention_factor=1.0
            ),
        ),
    ),
    "deepseek_not_normalized_tied_bfloat16": (
        "deepseek_v3",
        change(
            MOONLIGHT,
            {"normalize": "none", "routed_scaling": 1.0},
            num_heads=3,
            num_kv_heads=3,
            first_dense=0,
            tie_embeddings=True,
            mla=dataclasses.replace(MOONLIGHT.mla, v_head_dim=12, yarn_mscale_all_dim=0.7),
            rope_scaling=RopeScaling(
                "yarn", factor=4.0, original_max_position=16, attention_factor=1.2
            ),
        ),
    ),
}
DTYPE = {
    "olmoe_odd_heads_bfloat16": ml_dtypes.bfloat16,
    "llama_yarn_bfloat16": ml_dtypes.bfloat16,
    "deepseek_not_normalized_tied_bfloat16": ml_dtypes.bfloat16,
}


@pytest.fixture(scope="module")
def checked(reference, tmp_path_factory):
    """Our random checkpoints, exported; what `transformers` makes of them, in one process."""
    base = tmp_path_factory.mktemp("checkpoints")
    arrays, jobs, params = {}, [], {}
    for i, (name, (family, cfg)) in enumerate(CASES.items()):
        params[name] = random_params(cfg, i, DTYPE.get(name, np.float32))
        # Small shards, and one file, in turn.
        size = 20_000 if i % 2 else hf.MAX_SHARD_BYTES
        export_checkpoint(cfg, params[name], base / name, family, max_shard_bytes=size)
        tokens = np.random.default_rng(100 + i).integers(0, cfg.vocab_size, (ROWS, LENGTH))
        arrays[name + "/tokens"] = tokens.astype(np.int32)
        resave = str(base / (name + "_resaved"))
        shard = "5GB" if i % 2 else "20KB"
        jobs.append(
            {"name": name, "folder": str(base / name), "resave": resave, "shard": shard},
        )
    out = reference("hf_logits", arrays, {"cases": jobs})
    return base, params, arrays | out


def run(cfg, params, tokens, positions, segment_ids):
    @jax.jit
    def apply(params, tokens):
        out = forward(params, tokens, positions, segment_ids, cfg=cfg)
        return logprobs.logits(params, out.hidden, cfg), out.routes

    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    return [None if a is None else np.asarray(a) for a in apply(params, tokens)]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_routes_of_transformers(checked, name):
    base, _, arrays = checked
    cfg, params = import_checkpoint(base / (name + "_resaved"))
    tokens = arrays[name + "/tokens"]
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    logits, routes = run(cfg, params, tokens, positions, jnp.ones_like(positions))
    want = arrays[name + "/logits"]
    assert 0.5 < want.std() < 2.0, "logits are meant to be of unit scale"
    assert np.abs(logits - want).max() <= 2e-4
    if cfg.moe is None:
        assert routes is None
        return
    # In transformers a gate is the k-th's, and so is a route: the order counts too, where it says
    # one (DeepSeek's router asks for the top k unsorted).
    order = np.sort if CASES[name][0] == "deepseek_v3" else np.asarray
    np.testing.assert_array_equal(order(routes), order(arrays[name + "/routes"]))
    assert routes.shape[0] == num_moe_layers(cfg)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "qwen_3_heads_1_kv",
        "qwen_yarn_window",
        "olmoe_clip",
        "qwen3_tied_some_windows",
        "mixtral_tied_window_wide_heads",
        "moonlight",
    ],
)
def test_packed_rows_are_the_rows_apart(checked, name):
    """Three documents in one row, with padding behind them, as transformers has them in three."""
    base, _, arrays = checked
    cfg, params = import_checkpoint(base / name)
    tokens = arrays[name + "/tokens"]
    lengths = [LENGTH, 7, 13]
    parts = [tokens[i, :n] for i, n in enumerate(lengths)]
    total, width = sum(lengths), 48
    packed = np.zeros((1, width), np.int32)
    packed[0, :total] = np.concatenate(parts)
    segment_ids, positions = np.zeros((2, 1, width), np.int32)
    segment_ids[0, :total] = np.repeat([1, 2, 3], lengths)
    positions[0, :total] = np.concatenate([np.arange(n) for n in lengths])
    logits, routes = run(cfg, params, packed, jnp.asarray(positions), jnp.asarray(segment_ids))
    rows = [arrays[name + "/logits"][i, :n] for i, n in enumerate(lengths)]
    assert np.abs(logits[0, :total] - np.concatenate(rows)).max() <= 2e-4
    if cfg.moe is None:
        return
    rows = [arrays[name + "/routes"][:, i, :n] for i, n in enumerate(lengths)]
    order = np.sort if CASES[name][0] == "deepseek_v3" else np.asarray
    np.testing.assert_array_equal(order(routes[:, 0, :total]), order(np.concatenate(rows, axis=1)))


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_to_the_bit(checked, name, tmp_path):
    base, params, _ = checked
    family, cfg = CASES[name]
    got_cfg, got = import_checkpoint(base / name)
    assert FAMILIES[family].write_config(got_cfg) == FAMILIES[family].write_config(cfg)
    assert_same_params(got, params[name])
    assert got["embed"]["table"].dtype == DTYPE.get(name, np.float32)
    # What transformers saved says the same, in its own spelling of config.json.
    resaved_cfg, resaved = import_checkpoint(base / (name + "_resaved"))
    assert resaved_cfg == got_cfg
    assert_same_params(resaved, jax.tree.map(lambda a: np.asarray(a, np.float32), got))
    export_checkpoint(got_cfg, got, tmp_path / "out", family)
    assert_same_tensors(tmp_path / "out", base / name)
