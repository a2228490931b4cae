"""Every way in which a checkpoint can be wrong, and placement on a mesh."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pr2jax.core.params import abstract_params
from pr2jax.core.sharding import MeshConfig, make_mesh, param_shardings
from pr2jax.models.config import MLAConfig, RopeScaling
from pr2jax.models.importers import files
from pr2jax.models.importers.families import FAMILIES
from pr2jax.models.importers.hf import (
    CheckpointFormatError,
    export_checkpoint,
    import_checkpoint,
    load_params,
)
from pr2jax.models.transformer import param_specs
from pr2jax.models.upcycling import UpcycleConfig, upcycle, upcycled_config
from tests.models.checkpoints import (
    LLAMA,
    MIXTRAL,
    MOONLIGHT,
    OLMOE,
    QWEN,
    QWEN_DENSE,
    assert_same_params,
    edit_config,
    random_params,
)


def edit_tensors(folder, fn):
    tensors = load_file(folder / "model.safetensors")
    fn(tensors)
    save_file(tensors, folder / "model.safetensors")


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    "fn, message",
    [
        (lambda t: t.pop(EXPERT), rf"tensors missing \(1\): {EXPERT}"),
        (
            lambda t: t.update(extra=np.zeros(2, np.float32)),
            r"not in this model \(1\): extra",
        ),
        (
            lambda t: t.update({EXPERT: np.zeros((32, 16), np.float32)}),
            rf"{EXPERT} has the shape \(32, 16\), and config.json means \(16, 32\)",
        ),
        (lambda t: t.update({EXPERT: np.zeros((16, 32), np.int8)}), f"{EXPERT} is I8"),
    ],
)
def test_wrong_tensors_are_named(folder, fn, message):
    edit_tensors(folder, fn)
    with pytest.raises(CheckpointFormatError, match=message):
        import_checkpoint(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model_type": "mamba"},
            r"unknown model_type 'mamba' .*; "
            "known: deepseek_v3, llama, mixtral, olmoe, qwen3, qwen3_moe",
        ),
        ({"model_type": "absent"}, r"unknown model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, 'silu' is"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position_embedd"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "short_factor": [1.0]}},
            "short_factor is not supported",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"num_experts": "absent"}, "num_experts is missing"),
        ({"num_local_experts": 9}, "num_experts says two things"),
        ({"num_experts_per_tok": 99}, "moe.top_k"),
        ({"hidden_size": "wide"}, "d_model|unsupported operand"),
    ],
)
def test_unsupported_configs_are_named(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(CheckpointFormatError, match=message):
        import_checkpoint(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"clip_qkv": -1.0}, "clip_qkv=-1.0"),
        ({"sliding_window": 4}, "sliding_window is not supported in olmoe"),
        ({"head_dim": 16}, "head_dim=16"),
    ],
)
def test_unsupported_olmoe(tmp_path, changes, message):
    export_checkpoint(OLMOE, random_params(OLMOE), tmp_path, "olmoe")
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointFormatError, match=message):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "cfg, family, changes, message",
    [
        (LLAMA, "llama", {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA, "llama", {"rope_interleaved": True}, "rope_interleaved=True"),
        (QWEN_DENSE, "qwen3", {"head_dim": "absent"}, "head_dim is missing"),
        (QWEN_DENSE, "qwen3", {"layer_types": ["full_attention", "chunked"]}, "layer_types="),
        (QWEN_DENSE, "qwen3", {"layer_types": ["full_attention"]}, "layer_types="),
    ],
)
def test_unsupported_dense(tmp_path, cfg, family, changes, message):
    export_checkpoint(cfg, random_params(cfg), tmp_path, family)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointFormatError, match=message):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "cfg, family, changes, message",
    [
        (MIXTRAL, "mixtral", {"attention_bias": True}, "attention_bias=True"),
        (MIXTRAL, "mixtral", {"num_key_value_heads": "absent"}, "num_key_value_heads is missing"),
        (MIXTRAL, "mixtral", {"num_local_experts": "absent"}, "num_experts is missing"),
        (MOONLIGHT, "deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        (MOONLIGHT, "deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
        (MOONLIGHT, "deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        (MOONLIGHT, "deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
        (MOONLIGHT, "deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
        (MOONLIGHT, "deepseek_v3", {"kv_lora_rank": "absent"}, "kv_lora_rank is missing"),
        (MOONLIGHT, "deepseek_v3", {"n_group": 3}, "moe.num_groups: 3 does not divide"),
        (MOONLIGHT, "deepseek_v3", {"qk_rope_head_dim": 3}, "mla.qk_rope_head_dim: rotary"),
        (
            MOONLIGHT,
            "deepseek_v3",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}},
            "'linear' with mscale_all_dim is not supported",
        ),
        (
            MOONLIGHT,
            "deepseek_v3",
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            "rope type 'longrope' is not supported",
        ),
        (MOONLIGHT, "deepseek_v3", {"q_lora_rank": 8}, r"missing \(9\): .*q_a_"),
    ],
)
def test_unsupported_moe_families(tmp_path, cfg, family, changes, message):
    export_checkpoint(cfg, random_params(cfg), tmp_path, family)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointFormatError, match=message):
        import_checkpoint(tmp_path)


def test_layers_behind_the_last_are_not_ignored(tmp_path):
    """DeepSeek's layer of multi-token prediction, which this transformer does not have."""
    export_checkpoint(MOONLIGHT, random_params(MOONLIGHT), tmp_path)
    name = "model.layers.3.eh_proj.weight"
    edit_tensors(tmp_path, lambda t: t.update({name: np.zeros((2, 2), np.float32)}))
    with pytest.raises(CheckpointFormatError, match=rf"not in this model \(1\): {name}"):
        import_checkpoint(tmp_path)


def test_selection_biases_keep_their_precision(tmp_path):
    """Where all else goes to bfloat16: sigmoid scores stand closer than it tells apart."""
    params = random_params(MOONLIGHT)
    bias = params["segment_1"]["block_0"]["moe"]["router"]["selection_bias"]
    export_checkpoint(MOONLIGHT, params, tmp_path / "half", dtype=ml_dtypes.bfloat16)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    _, stored = import_checkpoint(tmp_path / "half")
    _, cast = import_checkpoint(tmp_path / "half", dtype=ml_dtypes.bfloat16)
    for got in (stored, cast):
        assert got["embed"]["table"].dtype == ml_dtypes.bfloat16
        router = got["segment_1"]["block_0"]["moe"]["router"]
        assert router["kernel"].dtype == ml_dtypes.bfloat16
        assert router["selection_bias"].tobytes() == bias.tobytes()


def test_deepseeks_own_spelling_of_yarn(tmp_path):
    """Without attention_factor: mscale over mscale_all_dim is that of cosines and sines."""
    scaling = RopeScaling("yarn", factor=40.0, original_max_position=4096, attention_factor=1.0)
    mla = dataclasses.replace(MOONLIGHT.mla, yarn_mscale_all_dim=1.0)
    cfg = dataclasses.replace(MOONLIGHT, rope_scaling=scaling, mla=mla)
    written = FAMILIES["deepseek_v3"].write_config(cfg)["rope_scaling"]
    assert written["mscale"] == written["mscale_all_dim"] == 1.0
    assert "attention_factor" not in written
    export_checkpoint(MOONLIGHT, random_params(MOONLIGHT), tmp_path)
    published = {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    }
    edit_config(tmp_path, rope_scaling=published)
    assert import_checkpoint(tmp_path)[0] == cfg


def test_moonlights_published_config():
    """The config.json of Moonlight-16B-A3B, whose nulls are absent keys."""
    published = {
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 11264,
        "kv_lora_rank": 512,
        "max_position_embeddings": 8192,
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 163840,
    }
    cfg = FAMILIES["deepseek_v3"].read_config(published)
    assert cfg.mla == MLAConfig(512, 0, 128, 64, 128)
    assert (cfg.norm_eps, cfg.mla.norm_eps) == (1e-5, 1e-6)
    assert (cfg.moe.shared_dim, cfg.moe.score, cfg.moe.normalize) == (2816, "sigmoid", "post")
    written = FAMILIES["deepseek_v3"].write_config(cfg)
    kept = {k: v for k, v in published.items() if k in written}
    assert kept == {k: written[k] for k in kept}
    assert len(kept) == len(published) - 4  # aux_loss_alpha, ep_size, lengths, seq_aux


def test_an_upcycled_llama_is_a_mixtral(tmp_path):
    cfg = upcycled_config(LLAMA, UpcycleConfig(experts=4, top_k=2))
    params = jax.tree.map(jnp.asarray, random_params(LLAMA))
    sparse = upcycle(params, LLAMA, UpcycleConfig(experts=4, top_k=2), jax.random.key(0))
    export_checkpoint(cfg, sparse, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mixtral"
    got, imported = import_checkpoint(tmp_path)
    assert got == cfg
    assert_same_params(imported, sparse)
    some = upcycled_config(LLAMA, UpcycleConfig(experts=4, top_k=2, every=2))
    with pytest.raises(CheckpointFormatError, match=r"cannot express .*dense_layers=\(0,\)"):
        FAMILIES["mixtral"].write_config(some)


def test_windows_of_a_config_without_layer_types(tmp_path):
    """Published Qwen3 configurations say only from which layer on there are windows."""
    cfg = dataclasses.replace(
        QWEN_DENSE, num_layers=3, sliding_window=4, window_pattern=(False, True, True)
    )
    export_checkpoint(cfg, random_params(cfg), tmp_path, "qwen3")
    edit_config(tmp_path, layer_types="absent")
    assert import_checkpoint(tmp_path)[0] == cfg
    edit_config(tmp_path, max_window_layers=3)
    assert import_checkpoint(tmp_path)[0].sliding_window == 0


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_truncated_file_is_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointFormatError, match=r"model\.safetensors: truncated or corrupt"):
        import_checkpoint(folder)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointFormatError, match=r"config\.json is missing"):
        import_checkpoint(tmp_path)
    src = tmp_path / "src"
    export_checkpoint(QWEN, random_params(QWEN), src, "qwen3_moe", max_shard_bytes=20_000)
    assert len(list(src.glob("*.safetensors"))) > 3
    assert_same_params(import_checkpoint(src)[1], random_params(QWEN))
    shard = min(src.glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointFormatError, match=f"{shard.name} is missing"):
        import_checkpoint(src)
    tensors = load_file(max(src.glob("*.safetensors")))
    save_file(tensors, shard)
    with pytest.raises(CheckpointFormatError, match=r" is in .*\.safetensors and in "):
        import_checkpoint(src)
    shard.write_bytes(whole)
    tensors = load_file(shard)
    gone = min(tensors)
    del tensors[gone]
    save_file(tensors, shard)
    with pytest.raises(CheckpointFormatError, match=f"{shard.name}: has no {gone}, which"):
        import_checkpoint(src)
    (src / files.INDEX).unlink()
    with pytest.raises(CheckpointFormatError, match=r"neither model\.safetensors nor"):
        import_checkpoint(src)
    (src / "config.json").write_text("{")
    with pytest.raises(CheckpointFormatError, match=r"config\.json: not JSON"):
        import_checkpoint(src)


def test_a_stored_tied_head_must_be_the_embedding(tmp_path):
    cfg = dataclasses.replace(QWEN, tie_embeddings=True)
    params = random_params(cfg)
    export_checkpoint(cfg, params, tmp_path, "qwen3_moe")
    table = params["embed"]["table"]
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": table}))
    assert_same_params(import_checkpoint(tmp_path)[1], params)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": table + 1}))
    with pytest.raises(CheckpointFormatError, match=r"lm_head\.weight is not the embedding"):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize("imported", [False, True])
def test_parameters_come_placed(folder, tmp_path, imported):
    """Onto eight devices, in another dtype, from either kind of folder."""
    src = folder
    if imported:
        import_checkpoint(folder, tmp_path / "ours")
        src = tmp_path / "ours"
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    specs = param_specs(QWEN)
    abstract = abstract_params(specs, param_shardings(specs, mesh))
    abstract = jax.tree.map(lambda a: a.update(dtype=jnp.bfloat16), abstract)
    _, params = load_params(src, abstract)
    want = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), random_params(QWEN))
    assert_same_params(params, want)
    got = jax.tree.map(lambda a, b: a.sharding == b.sharding, params, abstract)
    assert all(jax.tree.leaves(got))
    wide = param_specs(dataclasses.replace(QWEN, vocab_size=65))
    with pytest.raises(CheckpointFormatError, match=r"embed/table has the shape \(64, 32\), and"):
        load_params(src, abstract_params(wide))
