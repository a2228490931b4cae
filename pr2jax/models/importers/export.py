"""Export to Hugging Face directories, which `transformers` loads; and what they cannot carry."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from flax import traverse_util
from safetensors.numpy import save_file

from pr2jax.models.config import ModelConfig
from pr2jax.models.importers import files
from pr2jax.models.importers.families import FAMILIES
from pr2jax.models.importers.family import Family
from pr2jax.models.importers.files import INDEX, SINGLE, CheckpointFormatError
from pr2jax.models.importers.slots import Slot, slots_of
from pr2jax.models.transformer import param_specs

log = logging.getLogger("pr2jax")

MAX_SHARD_BYTES = 4 << 30
# Parameters that a published format may have no place for, by the name that drops them.
DROPPABLE = {
    "predictor": "moe/predictor/kernel",
    "selection_bias": "moe/router/selection_bias",
}


def export_checkpoint(
    cfg: ModelConfig,
    params: Mapping[str, Any],
    dst: str | os.PathLike,
    family: str | None = None,
    *,
    dtype: Any = None,
    base_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    drop: Collection[str] = (),
) -> list[str]:
    """Writes a Hugging Face directory that `transformers` loads.

    What no family has a place for is not lost silently. The route predictor W_p, and a selection
    bias in a family without one, are left out where they are zero (never trained: the model
    exported is the same function), which is logged; where they are not, they must be named in
    `drop`, and the exported model may route otherwise than this one.

    Args:
      params: tree of `param_specs(cfg)`; numpy, JAX or TensorStore arrays.
      family: a key of FAMILIES; None: the first of them that can express `cfg`.
      dtype: of the tensors but selection biases, which differ by less than half precision tells
        apart; None keeps each parameter's.
      base_config: a config.json whose other keys (token ids, lengths) are kept.
      drop: which of DROPPABLE to leave out though they were trained.

    Returns:
      Paths of the trained parameters that were dropped.

    Raises:
      CheckpointFormatError: the family cannot express `cfg`; a trained predictor or selection
        bias that `drop` does not name; a parameter is missing, extra or misshapen; dst is not
        empty.  Names which.
      ValueError: `drop` names something else.
    """
    unknown = sorted(set(drop) - set(DROPPABLE))
    if unknown:
        raise ValueError(f"drop: {unknown[0]!r} is none of {', '.join(DROPPABLE)}")
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    _check_params(cfg, flat)
    table, written = _table(cfg, family)
    dropped = _without_place(flat, cfg, written, table, drop)
    config = {**_without_ours(base_config or {}), **table.write_config(written)}
    slots = slots_of(written, table)
    dst = Path(dst)
    files.require_empty(dst)
    kind = {path: np.dtype(_dtype(leaf)) for path, leaf in flat.items()}
    if dtype is not None:
        kind |= {p: np.dtype(dtype) for p in flat if not p.endswith(DROPPABLE["selection_bias"])}
    config["torch_dtype"] = kind["embed/table"].name
    _write_shards(dst, slots, flat, kind, max_shard_bytes)
    files.write_json(dst / "config.json", config)
    return dropped


def _write_shards(
    dst: Path,
    slots: Mapping[str, Slot],
    flat: Mapping[str, Any],
    kind: Mapping[str, np.dtype],
    max_shard_bytes: int,
) -> None:
    """model.safetensors, or shards of at most so many bytes and their index."""
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, slot in slots.items():
        size = int(np.prod(slot.here)) * kind[slot.path].itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    weight_map, total = {}, 0
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            slot = slots[name]
            value = slot.to_there(_slice(flat[slot.path], slot.index))
            tensors[name] = np.ascontiguousarray(value.astype(kind[slot.path]))
            weight_map[name] = file
            total += tensors[name].nbytes
        save_file(tensors, dst / file, metadata={"format": "pt"})
    if len(shards) > 1:
        files.write_json(dst / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _table(cfg: ModelConfig, name: str | None) -> tuple[Family, ModelConfig]:
    """The family of this name, or the first that can express `cfg`; and `cfg` as it does.

    A selection bias that no family can express is left out of the latter.
    """
    if name is not None and name not in FAMILIES:
        raise CheckpointFormatError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
    candidates = list(FAMILIES.values()) if name is None else [FAMILIES[name]]
    forms = [cfg]
    if cfg.moe is not None and cfg.moe.selection_bias:
        plain = dataclasses.replace(cfg.moe, selection_bias=False)
        forms.append(dataclasses.replace(cfg, moe=plain))
    why = []
    for form in forms:
        why = []
        for family in candidates:
            try:
                family.write_config(form)
                return family, form
            except CheckpointFormatError as error:
                why.append(str(error))
    raise CheckpointFormatError("; ".join(why))


def _without_place(
    flat: Mapping[str, Any],
    cfg: ModelConfig,
    written: ModelConfig,
    family: Family,
    drop: Collection[str],
) -> list[str]:
    """Paths of trained parameters that are dropped, and may be."""
    gone = ["predictor"]
    if cfg.moe is not None and cfg.moe.selection_bias and not written.moe.selection_bias:
        gone.append("selection_bias")
    lost = []
    for name in gone:
        paths = sorted(p for p in flat if p.endswith(DROPPABLE[name]))
        trained = [p for p in paths if np.any(np.asarray(flat[p]))]
        if trained and name not in drop:
            raise CheckpointFormatError(
                f"{name}: {family.model_type} has no place for it, and this model's was trained "
                f"({trained[0]} is not zero); --drop={name} exports without it"
            )
        if trained:
            log.warning("export: dropped the trained %s: %s", name, ", ".join(trained))
        elif paths:
            log.info("export: the %s is zero and is left out; nothing changes", name)
        lost += trained
    return lost


def _check_params(cfg: ModelConfig, flat: Mapping[str, Any]) -> None:
    want = traverse_util.flatten_dict(param_specs(cfg), sep="/")
    for kind, paths in (("missing", set(want) - set(flat)), ("extra", set(flat) - set(want))):
        if paths:
            raise CheckpointFormatError(f"parameter {min(paths)} is {kind}")
    for path, spec in want.items():
        if tuple(flat[path].shape) != tuple(spec.shape):
            raise CheckpointFormatError(
                f"parameter {path} has the shape {tuple(flat[path].shape)}, not {spec.shape}"
            )


def _dtype(leaf: Any) -> np.dtype:
    return leaf.dtype.numpy_dtype if isinstance(leaf, ts.TensorStore) else leaf.dtype


def _slice(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
    if isinstance(leaf, ts.TensorStore):
        return leaf[index].read().result()
    # The whole of a JAX array is fetched (a view, on a CPU): slicing it would compile.
    return np.asarray(leaf)[index]


def _without_ours(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the other spellings of what `write_config` writes."""
    other = {"rope_parameters", "num_local_experts", "dtype", "original_max_position_embeddings"}
    other |= {"num_experts", "head_dim", "num_mtp_layers"}
    return {k: v for k, v in config.items() if k not in other}
