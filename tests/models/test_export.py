"""What export cannot carry, and the command line there and back."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from flax import traverse_util

from pr2jax.core.checkpoint import Checkpointer
from pr2jax.models.importers import hf, store
from pr2jax.models.importers.hf import (
    CheckpointFormatError,
    export_checkpoint,
    import_checkpoint,
    load_params,
)
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
    edit_config,
    random_params,
)


@pytest.mark.parametrize(
    "family, cfg, message",
    [
        ("qwen3_moe", change(QWEN, {"shared_dim": 8}), r"moe\.shared_dim=8"),
        ("qwen3_moe", change(QWEN, {"score": "sigmoid"}), r"moe\.score='sigmoid'"),
        ("qwen3_moe", change(QWEN, {"routed_scaling": 2.5}), r"moe\.routed_scaling=2\.5"),
        ("qwen3_moe", change(QWEN, qk_norm="full"), "qk_norm='full'"),
        ("qwen3_moe", change(QWEN, clip_qkv=1.0), "clip_qkv=1.0"),
        ("qwen3_moe", change(QWEN, attention_bias=True), "attention_out_bias=False"),
        (
            "qwen3_moe",
            change(QWEN, sliding_window=4, window_pattern=(True, False)),
            "window_pattern=",
        ),
        ("olmoe", change(OLMOE, first_dense=1), r"dense_layers=\(0,\)"),
        ("olmoe", change(OLMOE, head_dim=16), "head_dim=16"),
        ("olmoe", change(OLMOE, sliding_window=4), "sliding_window=4"),
        ("olmoe", dataclasses.replace(OLMOE, moe=None), "moe=None"),
        ("llama", QWEN, r"llama cannot express MoE layers \(layer 0\)"),
        ("llama", QWEN_DENSE, "qk_norm='head'"),
        ("llama", change(LLAMA, num_heads=6, num_kv_heads=2), "num_heads=6 with d_model=32"),
        ("llama", change(LLAMA, sliding_window=4), "sliding_window=4"),
        ("qwen3", change(QWEN, dense_layers=(0,)), r"qwen3 cannot express MoE layers \(layer 1\)"),
        ("qwen3", LLAMA, "qk_norm='none'"),
        ("mixtral", change(MIXTRAL, {"normalize": "none"}), r"moe\.normalize='none'"),
        ("mixtral", change(MIXTRAL, {"shared_dim": 8}), r"moe\.shared_dim=8"),
        ("mixtral", LLAMA, "mixtral cannot express moe=None"),
        ("mixtral", QWEN, "qk_norm='head'"),
        ("mixtral", MOONLIGHT, r"mla\.kv_lora_rank=16"),
        ("deepseek_v3", QWEN, "deepseek_v3 cannot express mla=None"),
        (
            "deepseek_v3",
            dataclasses.replace(MOONLIGHT, moe=None),
            "deepseek_v3 cannot express moe=None",
        ),
        ("deepseek_v3", change(MOONLIGHT, {"score": "softmax"}), r"moe\.score='softmax'"),
        ("deepseek_v3", change(MOONLIGHT, {"shared_dim": 8}), r"moe\.shared_dim=8"),
        ("deepseek_v3", change(MOONLIGHT, {"shared_dim": 0}), r"moe\.shared_dim=0"),
        ("deepseek_v3", change(MOONLIGHT, sliding_window=4), "sliding_window=4"),
        ("deepseek_v3", change(MOONLIGHT, dense_layers=(2,)), r"dense_layers=\(0, 2\)"),
        (
            "deepseek_v3",
            change(MOONLIGHT, mla=dataclasses.replace(MOONLIGHT.mla, norm_eps=1e-5)),
            r"mla\.norm_eps=1e-05",
        ),
        ("mamba", QWEN, "unknown family 'mamba'"),
    ],
)
def test_what_a_family_cannot_express_is_refused(tmp_path, family, cfg, message):
    with pytest.raises(CheckpointFormatError, match=message):
        export_checkpoint(cfg, random_params(cfg), tmp_path, family)
    assert not list(tmp_path.iterdir())


def test_how_a_model_is_run_is_not_part_of_it(tmp_path):
    """Remat, kernels, another spelling of the same layers or gates: the same checkpoint."""
    cfg = change(QWEN, {"normalize": "pre", "impl": "dense"}, remat="full", first_dense=1)
    cfg = dataclasses.replace(cfg, num_layers=3, scan_layers=False)
    params = random_params(cfg)
    export_checkpoint(cfg, params, tmp_path, "qwen3_moe")
    got, imported = import_checkpoint(tmp_path)
    assert got.dense_layers == (0,)
    assert_same_params(imported, params)


def test_wrong_parameters_are_not_exported(tmp_path):
    params = random_params(QWEN)
    flat = traverse_util.flatten_dict(params, sep="/")
    name = "final_norm/scale"

    def attempt(flat):
        tree = traverse_util.unflatten_dict(flat, sep="/")
        export_checkpoint(QWEN, tree, tmp_path, "qwen3_moe")

    with pytest.raises(CheckpointFormatError, match=f"{name} is missing"):
        attempt({p: a for p, a in flat.items() if p != name})
    with pytest.raises(CheckpointFormatError, match="parameter new is extra"):
        attempt(flat | {"new": np.zeros(3)})
    with pytest.raises(CheckpointFormatError, match=rf"{name} has the shape \(3,\), not \(32,\)"):
        attempt(flat | {name: np.zeros(3)})


def test_command_line_there_and_back(folder, tmp_path, capsys):
    edit_config(folder, eos_token_id=7, max_position_embeddings=123)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    assert hf.main(["import", str(folder), str(tmp_path / "ours")]) == 0
    cfg, params = load_params(tmp_path / "ours")
    assert cfg == import_checkpoint(folder)[0] == hf.read_model_config(tmp_path / "ours")
    assert cfg == hf.read_model_config(folder)
    assert hf.is_published(folder)
    assert hf.is_published(tmp_path / "ours")
    assert not hf.is_published(tmp_path)
    assert isinstance(params["embed"]["table"], ts.TensorStore)
    as_arrays = jax.tree.map(lambda a: a.read().result(), params)
    assert_same_params(as_arrays, random_params(QWEN))
    assert hf.main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    assert "dropped" not in capsys.readouterr().out
    assert_same_tensors(tmp_path / "back", folder)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["eos_token_id"], config["max_position_embeddings"]) == (7, 123)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == '{"a": 1}'
    # Not over what is there, and not half a folder.
    assert hf.main(["import", str(folder), str(tmp_path / "ours")]) == 1
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "ours" / store.MANIFEST).unlink()
    assert hf.main(["export", str(tmp_path / "ours"), str(tmp_path / "again")]) == 1
    assert "not a finished pr2jax checkpoint" in capsys.readouterr().err


def test_what_was_trained_is_dropped_only_by_name(folder, tmp_path, capsys):
    hf.main(["import", str(folder), str(tmp_path / "ours")])
    _, params = load_params(tmp_path / "ours")
    path = "segment_0/block_0/moe/predictor/kernel"
    params["segment_0"]["block_0"]["moe"]["predictor"]["kernel"][1, 2, 3].write(0.5).result()
    command = ["export", str(tmp_path / "ours"), str(tmp_path / "back")]
    assert hf.main(command) == 1
    said = capsys.readouterr().err
    assert f"predictor: qwen3_moe has no place for it, and this model's was trained ({path}" in said
    assert "--drop=predictor" in said
    assert not (tmp_path / "back").exists()
    assert hf.main([*command, "--drop=selection_bias"]) == 1
    assert hf.main([*command, "--drop=selection_bias,predictor"]) == 0
    assert f"dropped, though trained: {path}" in capsys.readouterr().out
    assert_same_tensors(tmp_path / "back", folder)
    with pytest.raises(SystemExit):
        hf.main([*command, "--drop=router"])
    assert "'router' is none of predictor, selection_bias" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'router' is none of"):
        export_checkpoint(QWEN, random_params(QWEN), tmp_path / "no", drop=["router"])


@pytest.mark.parametrize("family", ["qwen3_moe", None])
def test_a_selection_bias_is_dropped_where_it_does_nothing(tmp_path, caplog, family):
    cfg = change(QWEN, {"selection_bias": True})
    params = random_params(cfg)
    router = params["segment_0"]["block_0"]["moe"]["router"]
    router["selection_bias"][:] = 0
    with caplog.at_level("INFO", "pr2jax"):
        assert export_checkpoint(cfg, params, tmp_path / "zero", family) == []
    for name in ("selection_bias", "predictor"):
        assert f"the {name} is zero and is left out" in caplog.text
    got, imported = import_checkpoint(tmp_path / "zero")
    assert got == QWEN
    router["selection_bias"][1, 3] = -0.1
    path = "segment_0/block_0/moe/router/selection_bias"
    with pytest.raises(CheckpointFormatError, match=rf"selection_bias: .*{path} is not zero"):
        export_checkpoint(cfg, params, tmp_path / "no", family)
    dropped = export_checkpoint(cfg, params, tmp_path / "yes", family, drop=["selection_bias"])
    assert dropped == [path]
    del router["selection_bias"]
    for folder in ("zero", "yes"):
        assert_same_params(import_checkpoint(tmp_path / folder)[1], params)
    assert_same_params(imported, params)


@pytest.mark.parametrize(
    "cfg, family",
    [
        (LLAMA, "llama"),
        (QWEN_DENSE, "qwen3"),
        (QWEN, "qwen3_moe"),
        (OLMOE, "olmoe"),
        (MIXTRAL, "mixtral"),
        (MOONLIGHT, "deepseek_v3"),
    ],
)
def test_the_family_is_found(tmp_path, cfg, family):
    export_checkpoint(cfg, random_params(cfg), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family


def test_a_training_run_is_exported(tmp_path, capsys):
    """The best checkpoint's parameters, as the family that fits them."""
    runs = {}
    with Checkpointer(tmp_path / "run" / "checkpoints", best_metric="score") as checkpoints:
        for step, score in ((1, 0.9), (2, 0.1)):
            runs[step] = random_params(OLMOE, step)
            extra = {"config": {"model": dataclasses.asdict(OLMOE)}}
            state = {"params": jax.tree.map(jnp.asarray, runs[step])}
            checkpoints.save(step, state, extra, {"score": score})
    assert hf.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "olmoe"
    assert_same_params(import_checkpoint(tmp_path / "out")[1], runs[1])
    command = ["export", str(tmp_path / "run"), str(tmp_path / "no"), "--family=qwen3_moe"]
    assert hf.main(command) == 1
    assert "qwen3_moe cannot express qk_norm='full'" in capsys.readouterr().err
    assert hf.main(["export", str(tmp_path / "nothing"), str(tmp_path / "no")]) == 1
    assert str(tmp_path / "nothing") in capsys.readouterr().err
