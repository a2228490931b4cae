"""The model families of Hugging Face that can be read and written.

A new family is a new entry of `FAMILIES`.  The transformer has no branch by family: what a family
is, is said here in ModelConfig's terms, and what cannot be said in them is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pr2jax.models.config import ModelConfig, MoEConfig, block_specs
from pr2jax.models.importers.deepseek import DEEPSEEK_V3
from pr2jax.models.importers.family import (
    DENSE,
    EXPERTS,
    TOP,
    Family,
    Row,
    read_common,
    write_common,
)
from pr2jax.models.importers.files import CheckpointFormatError, require


def _num_experts(hf: Mapping[str, Any]) -> int:
    """Under its published name, or the one that transformers 5 writes."""
    found = {hf[k] for k in ("num_experts", "num_local_experts") if k in hf}
    if not found:
        raise KeyError("num_experts")
    if len(found) > 1:
        raise CheckpointFormatError(f"config.json: num_experts says two things: {sorted(found)}")
    return found.pop()


def _read_moe(hf: Mapping[str, Any], expert_dim: int) -> MoEConfig:
    return MoEConfig(
        num_experts=_num_experts(hf),
        top_k=hf["num_experts_per_tok"],
        expert_dim=expert_dim,
        normalize="post" if hf.get("norm_topk_prob", False) else "none",
    )


def _write_moe(moe: MoEConfig) -> dict[str, Any]:
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.normalize != "none",
    }


def _require_dense(cfg: ModelConfig, family: str) -> None:
    moe = [i for i, block in enumerate(block_specs(cfg)) if block.moe]
    if moe:
        raise CheckpointFormatError(f"{family} cannot express MoE layers (layer {moe[0]})")


def _read_llama(hf: Mapping[str, Any]) -> ModelConfig:
    require(hf, "mlp_bias", False)
    require(hf, "rope_interleaved", False)
    return ModelConfig(
        **read_common(hf), moe=None, qk_norm="none", norm_eps=hf.get("rms_norm_eps", 1e-6)
    )


def _write_llama(cfg: ModelConfig) -> dict[str, Any]:
    _require_dense(cfg, "llama")
    if cfg.d_model % cfg.num_heads:
        raise CheckpointFormatError(
            f"llama cannot express num_heads={cfg.num_heads} with d_model={cfg.d_model}"
        )
    return {
        **write_common(cfg),
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.dense_dim,
        "mlp_bias": False,
    }


def _read_qwen3(hf: Mapping[str, Any]) -> ModelConfig:
    layers, window = hf["num_hidden_layers"], 0
    if hf.get("use_sliding_window", False):
        window = hf.get("sliding_window", 4096)
    # Not derived from the other sizes where they are absent, as they are in other families.
    if missing := [k for k in ("head_dim", "num_key_value_heads") if k not in hf]:
        raise KeyError(missing[0])
    # Where the layers' kinds are not listed, the first max_window_layers see everything.
    first = hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise CheckpointFormatError(f"config.json: layer_types={kinds} is not supported")
    pattern = tuple(kind == "sliding_attention" for kind in kinds)
    windowed = window > 0 and any(pattern)
    return ModelConfig(
        **read_common(hf),
        moe=None,
        qk_norm="head",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        sliding_window=window if windowed else 0,
        window_pattern=pattern if windowed else (True,),
    )


def _write_qwen3(cfg: ModelConfig) -> dict[str, Any]:
    _require_dense(cfg, "qwen3")
    windows = [block.window > 0 for block in block_specs(cfg)]
    return {
        **write_common(cfg),
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.dense_dim,
        "use_sliding_window": any(windows),
        "sliding_window": cfg.sliding_window or None,
        "max_window_layers": windows.index(True) if any(windows) else cfg.num_layers,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
    }


def _read_qwen3_moe(hf: Mapping[str, Any]) -> ModelConfig:
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else 0
    moe = _read_moe(hf, hf["moe_intermediate_size"]) if _num_experts(hf) else None
    return ModelConfig(
        **read_common(hf),
        moe=moe,
        moe_every=hf.get("decoder_sparse_step", 1),
        dense_layers=tuple(hf.get("mlp_only_layers", ())),
        qk_norm="head",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        sliding_window=window,
    )


def _write_qwen3_moe(cfg: ModelConfig) -> dict[str, Any]:
    dense = [i for i in range(cfg.num_layers) if i < cfg.first_dense or i in cfg.dense_layers]
    moe = {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
    if cfg.moe is not None:
        moe = {**_write_moe(cfg.moe), "moe_intermediate_size": cfg.moe.expert_dim}
    return {
        **write_common(cfg),
        **moe,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.dense_dim,
        "decoder_sparse_step": cfg.moe_every,
        "mlp_only_layers": dense,
        "use_sliding_window": cfg.sliding_window > 0,
        "sliding_window": cfg.sliding_window or None,
        "max_window_layers": cfg.num_layers,
    }


def _read_olmoe(hf: Mapping[str, Any]) -> ModelConfig:
    if hf.get("sliding_window"):
        raise CheckpointFormatError("config.json: sliding_window is not supported in olmoe")
    if hf.get("clip_qkv", 1.0) <= 0:
        raise CheckpointFormatError(f"config.json: clip_qkv={hf['clip_qkv']!r} must be positive")
    require(hf, "head_dim", hf["hidden_size"] // hf["num_attention_heads"])
    return ModelConfig(
        **read_common(hf),
        moe=_read_moe(hf, hf["intermediate_size"]),
        qk_norm="full",
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        clip_qkv=float(hf.get("clip_qkv", 0.0)),
    )


def _write_olmoe(cfg: ModelConfig) -> dict[str, Any]:
    if cfg.moe is None:
        raise CheckpointFormatError("olmoe cannot express moe=None")
    return {
        **write_common(cfg),
        **_write_moe(cfg.moe),
        "intermediate_size": cfg.moe.expert_dim,
        "clip_qkv": cfg.clip_qkv or None,
    }


def _read_mixtral(hf: Mapping[str, Any]) -> ModelConfig:
    require(hf, "attention_bias", False)
    if "num_key_value_heads" not in hf:
        raise KeyError("num_key_value_heads")
    return ModelConfig(
        **read_common({"rope_theta": 1e6, **hf}),
        moe=_read_moe({**hf, "norm_topk_prob": True}, hf["intermediate_size"]),
        qk_norm="none",
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        sliding_window=hf.get("sliding_window", 0),
    )


def _write_mixtral(cfg: ModelConfig) -> dict[str, Any]:
    if cfg.moe is None:
        raise CheckpointFormatError("mixtral cannot express moe=None")
    return {
        **write_common(cfg),
        "num_local_experts": cfg.moe.num_experts,
        "num_experts_per_tok": cfg.moe.top_k,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.moe.expert_dim,
        "sliding_window": cfg.sliding_window or None,
    }


_ATTENTION = (
    Row("input_layernorm.weight", "attention_norm/scale"),
    Row("self_attn.q_proj.weight", "attention/q/kernel", inputs=1),
    Row("self_attn.k_proj.weight", "attention/k/kernel", inputs=1),
    Row("self_attn.v_proj.weight", "attention/v/kernel", inputs=1),
    Row("self_attn.o_proj.weight", "attention/o/kernel", inputs=2),
    Row("self_attn.q_proj.bias", "attention/q/bias", flat=True),
    Row("self_attn.k_proj.bias", "attention/k/bias", flat=True),
    Row("self_attn.v_proj.bias", "attention/v/bias", flat=True),
    Row("self_attn.o_proj.bias", "attention/o/bias"),
    Row("self_attn.q_norm.weight", "attention/q_norm/scale"),
    Row("self_attn.k_norm.weight", "attention/k_norm/scale"),
    Row("post_attention_layernorm.weight", "ffn_norm/scale"),
)

# Mixtral calls gate, up and down w1, w3 and w2.
_BLOCK_SPARSE = (
    Row("block_sparse_moe.gate.weight", "moe/router/kernel", inputs=1),
    Row("block_sparse_moe.experts.{expert}.w1.weight", "moe/experts/gate", inputs=1),
    Row("block_sparse_moe.experts.{expert}.w3.weight", "moe/experts/up", inputs=1),
    Row("block_sparse_moe.experts.{expert}.w2.weight", "moe/experts/down", inputs=1),
)

# In the order in which export tries them.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        top=TOP,
        layer=_ATTENTION + DENSE,
        read=_read_llama,
        write=_write_llama,
    ),
    "qwen3": Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        top=TOP,
        layer=_ATTENTION + DENSE,
        read=_read_qwen3,
        write=_write_qwen3,
    ),
    "qwen3_moe": Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        top=TOP,
        layer=_ATTENTION + EXPERTS + DENSE,
        read=_read_qwen3_moe,
        write=_write_qwen3_moe,
    ),
    "olmoe": Family(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        top=TOP,
        layer=_ATTENTION + EXPERTS,
        read=_read_olmoe,
        write=_write_olmoe,
    ),
    "mixtral": Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        top=TOP,
        layer=_ATTENTION + _BLOCK_SPARSE,
        read=_read_mixtral,
        write=_write_mixtral,
    ),
    "deepseek_v3": DEEPSEEK_V3,
}


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family that a config.json belongs to, by its model_type."""
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        named = f"{kind!r} (architectures {hf.get('architectures')})"
        raise CheckpointFormatError(f"config.json: unknown model_type {named}; known: {known}")
    return FAMILIES[kind]
