"""What a model family of Hugging Face is: a table of tensors, and its config.json both ways."""

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
      rotary: the last axis here ends with a rotated part, and there its two halves alternate.
    """

    name: str
    path: str
    inputs: int = 0
    flat: bool = False
    rotary: bool = False

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


# Tensors that most families call by the same names.
TOP = (
    Row("model.embed_tokens.weight", "embed/table"),
    Row("model.norm.weight", "final_norm/scale"),
    Row("lm_head.weight", "lm_head/kernel", inputs=1),
)

EXPERTS = (
    Row("mlp.gate.weight", "moe/router/kernel", inputs=1),
    Row("mlp.experts.{expert}.gate_proj.weight", "moe/experts/gate", inputs=1),
    Row("mlp.experts.{expert}.up_proj.weight", "moe/experts/up", inputs=1),
    Row("mlp.experts.{expert}.down_proj.weight", "moe/experts/down", inputs=1),
)

DENSE = (
    Row("mlp.gate_proj.weight", "ffn/gate", inputs=1),
    Row("mlp.up_proj.weight", "ffn/up", inputs=1),
    Row("mlp.down_proj.weight", "ffn/down", inputs=1),
)


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


def read_common(hf: Mapping[str, Any]) -> dict[str, Any]:
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


def write_common(cfg: ModelConfig) -> dict[str, Any]:
    """What all families write by the same names."""
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
    if cfg.mla is not None:
        changes |= {"num_kv_heads": cfg.num_heads, "head_dim": cfg.mla.qk_head_dim}
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
