"""Rotary embeddings in a config.json of Hugging Face, both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pr2jax.models.config import ModelConfig, RopeScaling
from pr2jax.models.importers.files import CheckpointFormatError, drop_none, require

_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


def read_rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """ModelConfig's rope fields, from `rope_parameters` (transformers 5) or `rope_scaling`.

    Raises CheckpointFormatError, or KeyError naming the key that is missing.
    """
    rope = drop_none(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    if kind not in _ROPE_KEYS:
        known = ", ".join(_ROPE_KEYS)
        raise CheckpointFormatError(
            f"config.json: rope type {kind!r} is not supported; {known} are"
        )
    require(rope, "partial_rotary_factor", 1.0)
    common = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    # Where the type says nothing of an original length, transformers puts it there all the same.
    unknown = set(rope) - _ROPE_KEYS[kind] - common - {"original_max_position_embeddings"}
    if unknown:
        raise CheckpointFormatError(
            f"config.json: rope type {kind!r} with {', '.join(sorted(unknown))} is not supported"
        )
    if kind == "default":
        return {"rope_theta": theta}
    scaling = {"kind": kind}
    if kind != "linear":
        original = hf.get(
            "original_max_position_embeddings",
            rope.get("original_max_position_embeddings", hf.get("max_position_embeddings")),
        )
        if original is None:
            raise KeyError("original_max_position_embeddings")
        scaling["original_max_position"] = int(original)
    for key in ("low_freq_factor", "high_freq_factor"):
        if kind == "llama3":
            scaling[key] = float(rope[key])
    if "factor" in rope or kind != "yarn":
        scaling["factor"] = float(rope["factor"])
    else:
        scaling["factor"] = hf["max_position_embeddings"] / scaling["original_max_position"]
    if kind == "yarn":
        scaling |= {k: float(rope[k]) for k in ("beta_fast", "beta_slow") if k in rope}
        scaling["truncate"] = rope.get("truncate", True)
        if "attention_factor" in rope:
            scaling["attention_factor"] = float(rope["attention_factor"])
        elif rope.get("mscale") and rope.get("mscale_all_dim"):
            log = math.log(max(scaling["factor"], 1.0))
            ratio = (0.1 * rope["mscale"] * log + 1) / (0.1 * rope["mscale_all_dim"] * log + 1)
            scaling["attention_factor"] = ratio
    return {"rope_theta": theta, "rope_scaling": RopeScaling(**scaling)}


def read_mscale_all_dim(hf: Mapping[str, Any]) -> float:
    """Yarn's `mscale_all_dim`, by which DeepSeek-V3 scales its softmax (0: it does not)."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    return float(rope.get("mscale_all_dim") or 0.0)


def write_rope(cfg: ModelConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`: every version of transformers reads these."""
    s = cfg.rope_scaling
    rope: dict[str, Any] = {"rope_type": s.kind}
    if s.kind != "none":
        rope["factor"] = s.factor
    if s.kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = s.original_max_position
    if s.kind == "llama3":
        rope |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind == "yarn":
        rope |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
        softmax = 0.0 if cfg.mla is None else cfg.mla.yarn_mscale_all_dim
        if softmax:
            rope["mscale_all_dim"] = softmax
        if softmax and s.attention_factor == 1.0:
            # DeepSeek's own code knows no attention_factor: it is mscale over mscale_all_dim.
            rope["mscale"] = softmax
        elif s.attention_factor:
            rope["attention_factor"] = s.attention_factor
    return {"rope_theta": cfg.rope_theta, "rope_scaling": None if s.kind == "none" else rope}


def canonical_rope(scaling: RopeScaling) -> RopeScaling:
    """`scaling` with every field at its default that its kind does not read."""
    names = {"none": (), "linear": ("factor",)}
    names["llama3"] = ("factor", "original_max_position", "low_freq_factor", "high_freq_factor")
    names["yarn"] = ("factor", "original_max_position", "beta_fast", "beta_slow")
    names["yarn"] += ("attention_factor", "truncate")
    kept = {name: getattr(scaling, name) for name in names[scaling.kind]}
    return RopeScaling(kind=scaling.kind, **kept)
