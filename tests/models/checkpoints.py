"""Small models of the families and their random checkpoints, for the importers' tests."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file

from pr2jax.models.config import MLAConfig, ModelConfig, MoEConfig
from pr2jax.models.transformer import param_specs

QWEN = ModelConfig(
    vocab_size=64,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    dense_dim=48,
    moe=MoEConfig(num_experts=8, top_k=3, expert_dim=16),
    qk_norm="head",
    tie_embeddings=False,
)
OLMOE = dataclasses.replace(
    QWEN, qk_norm="full", norm_eps=1e-5, moe=dataclasses.replace(QWEN.moe, normalize="none")
)
QWEN_DENSE = dataclasses.replace(QWEN, moe=None)
LLAMA = dataclasses.replace(QWEN_DENSE, qk_norm="none")
MIXTRAL = dataclasses.replace(QWEN, qk_norm="none", norm_eps=1e-5)
# Moonlight's shape: no latent of the queries, two shared experts, one group, a dense layer first.
MOONLIGHT = dataclasses.replace(
    QWEN,
    num_layers=3,
    num_kv_heads=4,
    head_dim=12,
    first_dense=1,
    qk_norm="none",
    norm_eps=1e-5,
    rope_theta=5e4,
    mla=MLAConfig(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6),
    moe=MoEConfig(
        num_experts=8,
        top_k=3,
        expert_dim=16,
        shared_dim=32,
        score="sigmoid",
        selection_bias=True,
        routed_scaling=2.446,
    ),
)


def change(cfg, moe=None, **fields):
    if moe:
        fields["moe"] = dataclasses.replace(cfg.moe, **moe)
    return dataclasses.replace(cfg, **fields)


def random_params(cfg, seed=0, dtype=np.float32):
    """Parameters under which activations and logits are of unit scale, and no two are equal."""
    rng = np.random.default_rng(seed)

    def one(path, spec):
        shape = spec.shape
        x = rng.standard_normal(shape)
        if path.endswith("scale"):
            x = 1 + 0.2 * x
        elif path.endswith("bias"):
            x = 0.2 * x
        elif path == "embed/table":
            x = x / np.sqrt(cfg.d_model) if cfg.tie_embeddings else x
        elif "predictor" in path:
            return np.zeros(shape, np.float32)
        elif "attention/o" in path:
            x = x / np.sqrt(shape[1] * shape[2])
        elif "attention/" in path:
            x = x / np.sqrt(shape[1])
        else:
            x = x / np.sqrt(shape[-2])
        return x.astype(dtype)

    flat = traverse_util.flatten_dict(param_specs(cfg), sep="/")
    flat = {path: one(path, spec) for path, spec in flat.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def assert_same_params(got, want):
    got, want = (traverse_util.flatten_dict(t, sep="/") for t in (got, want))
    assert set(got) == set(want)
    for path in want:
        a, b = np.asarray(got[path]), np.asarray(want[path])
        assert a.dtype == b.dtype, path
        assert a.tobytes() == b.tobytes(), path


def tensors_of(folder):
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


def assert_same_tensors(a, b):
    a, b = tensors_of(a), tensors_of(b)
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].tobytes() == b[name].tobytes(), name


def edit_config(folder, **changes):
    """Writes `changes` over config.json; "absent" takes a key out."""
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    config = {k: v for k, v in config.items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
