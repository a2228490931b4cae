"""What is measured: the model, the sizes of each workload, and our settings for them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.core.params import Tree, abstract_params, init_params
from pr2jax.core.rng import root
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.models.importers import hf
from pr2jax.models.transformer import param_specs
from pr2jax.sampler.types import SamplerConfig


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a run: `batch` rows of `length` tokens in training; `rows` of `prompt` + `new`
    tokens in decoding; `prompts` x `samples` of `prompt` + `completion` tokens in GRPO;
    `feature_tokens` is T_c."""

    batch: int = 8
    length: int = 512
    rows: int = 32
    prompt: int = 64
    new: int = 128
    prompts: int = 4
    samples: int = 8
    completion: int = 64
    feature_tokens: int = 1024

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name}: must be at least 1")
        if self.length < 2 or self.samples < 2:
            raise ConfigError("length, samples: must be at least 2")


FULL = Sizes()
SMOKE = Sizes(
    batch=2, length=16, rows=4, prompt=8, new=8, prompts=2, samples=2, completion=8,
    feature_tokens=4,
)  # fmt: skip


def model_json(smoke: bool) -> dict[str, Any]:
    """The model as a Hugging Face configuration (Qwen3-MoE), which both sides read."""
    small = {
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    full = {
        "vocab_size": 8192,
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    }
    return (small if smoke else full) | {
        "model_type": "qwen3_moe",
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
    }


def model_config(smoke: bool, overrides: dict[str, Any] | None = None) -> ModelConfig:
    """The same model as ours; `overrides` are dotted keys of ModelConfig (--set=model.KEY=...).

    Raises ConfigError for a key or value that cannot be.
    """
    there = model_json(smoke)
    cfg = ModelConfig(
        vocab_size=there["vocab_size"],
        d_model=there["hidden_size"],
        num_layers=there["num_hidden_layers"],
        num_heads=there["num_attention_heads"],
        num_kv_heads=there["num_key_value_heads"],
        head_dim=there["head_dim"],
        dense_dim=there["intermediate_size"],
        moe=MoEConfig(
            num_experts=there["num_experts"],
            top_k=there["num_experts_per_tok"],
            expert_dim=there["moe_intermediate_size"],
        ),
        qk_norm="head",
        tie_embeddings=False,
    )
    return edited(cfg, overrides or {}, "model")


def experts_model(smoke: bool, experts: int, overrides: dict[str, Any]) -> ModelConfig:
    """EMO's main run (arXiv 2605.13247) made small: k = 8 of `experts` and a shared one, experts
    3/8 as wide as the model, sigmoid scores with a selection bias; `overrides` as above."""
    cfg = model_config(smoke)
    width = 3 * cfg.d_model // 8
    moe = MoEConfig(
        num_experts=experts,
        top_k=2 if smoke else 8,
        expert_dim=width,
        shared_dim=width,
        score="sigmoid",
        selection_bias=True,
        predictor=False,
    )
    layers = min(cfg.num_layers, 4)
    cfg = dataclasses.replace(cfg, moe=moe, num_layers=layers, tie_embeddings=True)
    return edited(cfg, overrides, "model")


def sampler_config(
    sizes: Sizes, rows: int, new: int, overrides: dict[str, Any] | None = None
) -> SamplerConfig:
    """Our sampler for `rows` responses of `new` tokens at once."""
    cfg = SamplerConfig(
        slots=rows,
        chunk=min(new, 32),
        max_prompt=sizes.prompt,
        max_tokens=new,
        bucket=min(64, sizes.prompt),
        prefill_rows=min(rows, 32),
    )
    return edited(cfg, overrides or {}, "sampler")


def edited(cfg: Any, overrides: dict[str, Any], prefix: str) -> Any:
    """`cfg` with the overrides "PREFIX.key[.key]": value; those of other prefixes are left.

    Raises ConfigError naming the key.
    """
    values = dataclasses.asdict(cfg)
    for dotted, value in overrides.items():
        first, *path = dotted.split(".")
        if first != prefix:
            continue
        place = values
        for key in path[:-1]:
            place = place.get(key)
            if not isinstance(place, dict):
                raise ConfigError(f"{dotted}: unknown key {key!r}")
        if not path or path[-1] not in place:
            raise ConfigError(f"{dotted}: unknown key")
        place[path[-1]] = value
    return from_config_dict(type(cfg), values, prefix)


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """{"model.KEY": value} of "model.KEY=VALUE" (VALUE is JSON, or else a text).

    Raises ConfigError for anything else.
    """
    found = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or key.split(".")[0] not in ("model", "sampler"):
            raise ConfigError(f"--set={item}: want model.KEY=VALUE or sampler.KEY=VALUE")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


def load_params(cfg: ModelConfig, checkpoint: str) -> Tree:
    """Parameters out of the checkpoint that the peer made, or ours where there is none.

    Raises CheckpointFormatError; ConfigError where the checkpoint is of another model.
    """
    specs = param_specs(cfg)
    if not checkpoint:
        return init_params(specs, root(0))
    found, params = hf.load_params(Path(checkpoint), abstract_params(specs))
    how = ("moe", "scan_layers", "logprob_chunk", "attention_impl", "remat")
    same = {name: getattr(cfg, name) for name in how}
    if dataclasses.replace(found, **same, init_stddev=cfg.init_stddev) != cfg:
        raise ConfigError(f"{checkpoint}: holds {found}, not {cfg}")
    return jax.tree.map(jax.numpy.asarray, params)


def tokens(shape: tuple[int, int], vocab_size: int, seed: int = 0) -> Int[np.ndarray, "B T"]:
    """The random tokens that both sides get. The last two ids are left to specials."""
    return np.random.default_rng(seed).integers(0, vocab_size - 2, shape).astype(np.int32)
