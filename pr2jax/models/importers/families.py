"""Model families of Hugging Face: one table of tensors each, and their config.json, both ways.

A new family is a new entry of `FAMILIES`.  The transformer has no branch by family: what a family
is, is said here in ModelConfig's terms, and what cannot be said in them is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.models.config import ModelConfig, MoEConfig, block_specs
from pr2jax.models.importers.files import CheckpointFormatError, drop_none, require
from pr2jax.models.importers.rope import canonical_rope, read_rope, write_rope


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor there and one parameter here.

    Attributes:
      name: its name there; within "model.layers.N." for a tensor of a layer.  "{expert}" stands for
        an expert's number: one tensor there is one slice of the parameter here.
      path: the parameter's path here, within its block for a tensor of a layer.
      inputs: of a linear layer, how many of its axes here are inputs: it is [in, ..., out, ...]
        here and [out, in] there.  0: not a linear layer; the same there, its axes joined if `flat`.
    """

    name: str
    path: str
    inputs: int = 0
    flat: bool = False

    def shape_there(self, here: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor there that is `here` in this project."""
        if self.inputs:
            return math.prod(here[self.inputs :]), math.prod(here[: self.inputs])
        return (math.prod(here),) if self.flat else here

    def to_here(self, array: np.ndarray, here: tuple[int, ...]) -> np.ndarray:
        """The tensor there as the parameter here."""
        return (array.T if self.inputs else array).reshape(here)

    def to_there(self, array: np.ndarray) -> np.ndarray:
        """The parameter here as the tensor there."""
        there = self.shape_there(array.shape)
        return array.reshape(there[::-1]).T if self.inputs else array.reshape(there)


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: its names, its tensors, and its configuration both ways.

    A row whose parameter a configuration does not have (biases, an untied head) is not used.
    """

    model_type: str
    architecture: str
    top: tuple[Row, ...]
    layer: tuple[Row, ...]
    read: Callable[[Mapping[str, Any]], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]

    def read_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """ModelConfig of a config.json; CheckpointFormatError names what is not supported."""
        config = drop_none(hf)
        require(config, "hidden_act", "silu")
        require(config, "partial_rotary_factor", 1.0)
        if "quantization_config" in config:
            raise CheckpointFormatError("config.json: quantization_config: not supported")
        try:
            cfg = self.read(config)
            return from_config_dict(ModelConfig, dataclasses.asdict(cfg))
        except KeyError as error:
            raise CheckpointFormatError(f"config.json: {error.args[0]} is missing") from None
        except (ConfigError, TypeError) as error:
            raise CheckpointFormatError(f"config.json: {error}") from None

    def write_config(self, cfg: ModelConfig) -> dict[str, Any]:
        """config.json of a ModelConfig.

        Raises:
          CheckpointFormatError: the family cannot express it (read back, it would be another
            model); names the fields.
        """
        hf = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            **self.write(cfg),
        }
        want, got = (_flatten(_canonical(c)) for c in (cfg, self.read_config(hf)))
        differ = [f"{k}={want.get(k)!r}" for k in sorted(want | got) if want.get(k) != got.get(k)]
        if differ:
            raise CheckpointFormatError(f"{self.model_type} cannot express {', '.join(differ)}")
        return hf


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family that a config.json belongs to, by its model_type."""
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        named = f"{kind!r} (architectures {hf.get('architectures')})"
        raise CheckpointFormatError(f"config.json: unknown model_type {named}; known: {known}")
    return FAMILIES[kind]


def _num_experts(hf: Mapping[str, Any]) -> int:
    """Under its published name, or the one that transformers 5 writes."""
    found = {hf[k] for k in ("num_experts", "num_local_experts") if k in hf}
    if not found:
        raise KeyError("num_experts")
    if len(found) > 1:
        raise CheckpointFormatError(f"config.json: num_experts says two things: {sorted(found)}")
    return found.pop()


def _read_common(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that all families call by the same names."""
    heads = hf["num_attention_heads"]
    return {
        "vocab_size": hf["vocab_size"],
        "d_model": hf["hidden_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads", heads),
        "head_dim": hf.get("head_dim", hf["hidden_size"] // heads),
        "dense_dim": hf["intermediate_size"],
        "attention_bias": hf.get("attention_bias", False),
        "attention_out_bias": hf.get("attention_bias", False),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "init_stddev": hf.get("initializer_range", 0.02),
        **read_rope(hf),
    }


def _write_common(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "attention_bias": cfg.attention_bias,
        "tie_word_embeddings": cfg.tie_embeddings,
        "initializer_range": cfg.init_stddev,
        "rms_norm_eps": cfg.norm_eps,
        **write_rope(cfg),
    }


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
        **_read_common(hf), moe=None, qk_norm="none", norm_eps=hf.get("rms_norm_eps", 1e-6)
    )


def _write_llama(cfg: ModelConfig) -> dict[str, Any]:
    _require_dense(cfg, "llama")
    if cfg.d_model % cfg.num_heads:
        raise CheckpointFormatError(
            f"llama cannot express num_heads={cfg.num_heads} with d_model={cfg.d_model}"
        )
    return {
        **_write_common(cfg),
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
        **_read_common(hf),
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
        **_write_common(cfg),
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
        **_read_common(hf),
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
        **_write_common(cfg),
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
        **_read_common(hf),
        moe=_read_moe(hf, hf["intermediate_size"]),
        qk_norm="full",
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        clip_qkv=float(hf.get("clip_qkv", 0.0)),
    )


def _write_olmoe(cfg: ModelConfig) -> dict[str, Any]:
    if cfg.moe is None:
        raise CheckpointFormatError("olmoe cannot express moe=None")
    return {
        **_write_common(cfg),
        **_write_moe(cfg.moe),
        "intermediate_size": cfg.moe.expert_dim,
        "clip_qkv": cfg.clip_qkv or None,
    }


def _canonical(cfg: ModelConfig) -> ModelConfig:
    """`cfg` with every field at its default that changes nothing about the function computed."""
    default = ModelConfig()
    changes: dict[str, Any] = {
        name: getattr(default, name)
        for name in ("attention_impl", "remat", "scan_layers", "logprob_chunk")
    }
    dense = [i for i, block in enumerate(block_specs(cfg)) if not block.moe]
    changes |= {"first_dense": 0, "moe_every": 1, "dense_layers": tuple(dense)}
    if not dense:
        changes["dense_dim"] = default.dense_dim
    windows = tuple(block.window > 0 for block in block_specs(cfg))
    if not any(windows):
        changes["sliding_window"] = default.sliding_window
    some = any(windows) and not all(windows)
    changes["window_pattern"] = windows if some else default.window_pattern
    if cfg.moe is not None:
        plain = MoEConfig()
        moe = dataclasses.replace(
            cfg.moe, predictor=plain.predictor, impl=plain.impl, block_size=plain.block_size
        )
        if moe.score == "softmax" and moe.normalize == "pre":
            moe = dataclasses.replace(moe, normalize="post")  # the same numbers
        changes["moe"] = None if len(dense) == cfg.num_layers else moe
    changes["rope_scaling"] = canonical_rope(cfg.rope_scaling)
    return dataclasses.replace(cfg, **changes)


def _flatten(cfg: Any, path: str = "") -> dict[str, Any]:
    out = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            out |= _flatten(value, f"{path}{field.name}.")
        else:
            out[path + field.name] = value
    return out


_TOP = (
    Row("model.embed_tokens.weight", "embed/table"),
    Row("model.norm.weight", "final_norm/scale"),
    Row("lm_head.weight", "lm_head/kernel", inputs=1),
)

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

_EXPERTS = (
    Row("mlp.gate.weight", "moe/router/kernel", inputs=1),
    Row("mlp.experts.{expert}.gate_proj.weight", "moe/experts/gate", inputs=1),
    Row("mlp.experts.{expert}.up_proj.weight", "moe/experts/up", inputs=1),
    Row("mlp.experts.{expert}.down_proj.weight", "moe/experts/down", inputs=1),
)

_DENSE = (
    Row("mlp.gate_proj.weight", "ffn/gate", inputs=1),
    Row("mlp.up_proj.weight", "ffn/up", inputs=1),
    Row("mlp.down_proj.weight", "ffn/down", inputs=1),
)

# In the order in which export tries them.
FAMILIES: dict[str, Family] = {
    "llama": Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        top=_TOP,
        layer=_ATTENTION + _DENSE,
        read=_read_llama,
        write=_write_llama,
    ),
    "qwen3": Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        top=_TOP,
        layer=_ATTENTION + _DENSE,
        read=_read_qwen3,
        write=_write_qwen3,
    ),
    "qwen3_moe": Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        top=_TOP,
        layer=_ATTENTION + _EXPERTS + _DENSE,
        read=_read_qwen3_moe,
        write=_write_qwen3_moe,
    ),
    "olmoe": Family(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        top=_TOP,
        layer=_ATTENTION + _EXPERTS,
        read=_read_olmoe,
        write=_write_olmoe,
    ),
}
