"""Hugging Face directories (config.json + safetensors) in and out, streamed tensor by tensor.

    python -m pr2jax.models.importers.hf import SRC DST [--dtype=bfloat16]
    python -m pr2jax.models.importers.hf export SRC DST [--dtype=bfloat16] [--family=qwen3_moe]

`import` writes a folder that `init_from` reads; `export` turns such a folder, or a training run's,
into one that `transformers` loads.  Nothing is read before every name and shape has been checked
against the family's table, and nothing is left out silently: the route predictor W_p, for which
the published formats have no place, is reported by `export`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import traverse_util
from safetensors.numpy import save_file

from pr2jax.core.checkpoint import CheckpointError, read_checkpoint, restore_params
from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.core.params import abstract_params
from pr2jax.models.config import ModelConfig, segments
from pr2jax.models.importers import files, store
from pr2jax.models.importers.families import FAMILIES, Family, Row, family_of
from pr2jax.models.importers.files import DTYPES, INDEX, SINGLE, CheckpointFormatError
from pr2jax.models.transformer import param_specs

__all__ = [
    "CheckpointFormatError",
    "export_checkpoint",
    "import_checkpoint",
    "is_published",
    "load_params",
    "read_model_config",
]

PREDICTOR = "moe/predictor/kernel"
MAX_SHARD_BYTES = 4 << 30
# Kept beside imported parameters, for their tokenizer and for export.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one tensor of a checkpoint goes: params[path][index], of the shape `here`."""

    path: str
    index: tuple[int, ...]
    row: Row
    here: tuple[int, ...]

    @property
    def there(self) -> tuple[int, ...]:
        """The tensor's shape in the checkpoint."""
        return self.row.shape_there(self.here)


def import_checkpoint(
    src: str | os.PathLike, dst: str | os.PathLike | None = None, *, dtype: Any = None
) -> tuple[ModelConfig, dict]:
    """Reads a Hugging Face directory of a known family.

    Args:
      src: folder with config.json and model.safetensors, or shards and their index.
      dst: folder to write to; then the parameters returned are TensorStore arrays in it, and no
        more than a tensor is held in memory.  None: they are numpy arrays.
      dtype: of the parameters; None keeps each as it is stored.

    Returns:
      (ModelConfig, parameters in the tree of `param_specs`, the route predictor zero).

    Raises:
      CheckpointFormatError: config.json says something unsupported; a tensor is missing, extra or
        misshapen; a file is missing, truncated or corrupt; dst is not empty.  Names which.
    """
    src = Path(src)
    hf = files.read_json(src / "config.json")
    family = family_of(hf)
    cfg = family.read_config(hf)
    slots = _slots(cfg, family)
    found = files.inspect(src)
    tied_head = _check(slots, found, cfg)

    specs = traverse_util.flatten_dict(param_specs(cfg), sep="/")
    dtypes = {path: np.dtype(dtype or np.float32) for path in specs}
    if dtype is None:
        for path in {slot.path for slot in slots.values()}:
            kinds = [found[n].dtype for n, slot in slots.items() if slot.path == path]
            dtypes[path] = jnp.result_type(*kinds)
    if dst is not None:
        dst = Path(dst)
        _require_empty(dst)
        leading = dict.fromkeys(specs, 1) | {s.path: len(s.index) for s in slots.values()}
        sink = {p: store.create(dst, p, s.shape, dtypes[p], leading[p]) for p, s in specs.items()}
    else:
        sink = {p: np.zeros(s.shape, dtypes[p]) for p, s in specs.items()}

    for name, array in files.stream(src, found, skip=tied_head):
        slot = slots[name]
        value = slot.row.to_here(array, slot.here).astype(dtypes[slot.path])
        if dst is None:
            sink[slot.path][slot.index] = value
        else:
            sink[slot.path][slot.index].write(np.ascontiguousarray(value)).result()
    if tied_head:
        files.check_tied(src, found)
    if dst is None:
        return cfg, traverse_util.unflatten_dict(sink, sep="/")
    _copy_companions(src, dst)
    store.finish(dst, cfg, list(specs))
    return store.open_params(dst)


def export_checkpoint(
    cfg: ModelConfig,
    params: Mapping[str, Any],
    dst: str | os.PathLike,
    family: str | None = None,
    *,
    dtype: Any = None,
    base_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Writes a Hugging Face directory that `transformers` loads.

    Args:
      params: tree of `param_specs(cfg)`; numpy, JAX or TensorStore arrays.
      family: "qwen3_moe" or "olmoe"; None: the first of them that can express `cfg`.
      dtype: of the tensors; None keeps each parameter's.
      base_config: a config.json whose other keys (token ids, lengths) are kept.

    Returns:
      Paths of parameters that are not zero and that the format cannot carry: W_p, where it was
      trained.  The exported model then routes by its router alone.

    Raises:
      CheckpointFormatError: the family cannot express `cfg`; a parameter is missing, extra or
        misshapen; dst is not empty.  Names which.
    """
    table = _table(cfg, family)
    config = {**_without_ours(base_config or {}), **table.write_config(cfg)}
    slots = _slots(cfg, table)
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    _check_params(cfg, flat)
    dst = Path(dst)
    _require_empty(dst)
    kind = {path: np.dtype(dtype or _dtype(leaf)) for path, leaf in flat.items()}
    config["torch_dtype"] = kind["embed/table"].name

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
            value = slot.row.to_there(_slice(flat[slot.path], slot.index))
            tensors[name] = np.ascontiguousarray(value.astype(kind[slot.path]))
            weight_map[name] = file
            total += tensors[name].nbytes
        save_file(tensors, dst / file, metadata={"format": "pt"})
    if len(shards) > 1:
        files.write_json(dst / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    files.write_json(dst / "config.json", config)
    lost = [p for p in flat if p.endswith(PREDICTOR)]
    return [p for p in sorted(lost) if np.any(np.asarray(flat[p]))]


def is_published(directory: str | os.PathLike) -> bool:
    """Whether `directory` is what `load_params` reads: a Hugging Face folder or an imported one."""
    directory = Path(directory)
    return any((directory / n).is_file() for n in (store.MANIFEST, INDEX, SINGLE))


def read_model_config(directory: str | os.PathLike) -> ModelConfig:
    """The ModelConfig of such a folder, without its parameters. Raises CheckpointFormatError."""
    directory = Path(directory)
    if (directory / store.MANIFEST).exists():
        return store.read_manifest(directory)["model"]
    hf = files.read_json(directory / "config.json")
    return family_of(hf).read_config(hf)


def load_params(directory: str | os.PathLike, abstract: Any = None) -> tuple[ModelConfig, dict]:
    """(ModelConfig, parameters) of an imported folder or, directly, of a Hugging Face one.

    Args:
      abstract: `abstract_params(param_specs(cfg), shardings)`: parameters come as JAX arrays of
        these dtypes, placed so; None: as host or TensorStore arrays, as they are stored.

    Raises:
      CheckpointFormatError: as `import_checkpoint`; or a shape of `abstract` is another.
    """
    directory = Path(directory)
    imported = (directory / store.MANIFEST).exists()
    cfg, params = store.open_params(directory) if imported else import_checkpoint(directory)
    return cfg, (params if abstract is None else store.place(params, abstract))


def _load_run(directory: Path) -> tuple[ModelConfig, dict]:
    """(ModelConfig, parameters) of the best checkpoint of a training run.

    Raises CheckpointError, or CheckpointFormatError where the checkpoint does not say its model.
    """
    found = [d for d in (directory / "checkpoints", directory / "rl" / "checkpoints") if d.is_dir()]
    folder = found[0] if found else directory
    _, extra, _ = read_checkpoint(folder)
    try:
        cfg = from_config_dict(ModelConfig, extra["config"]["model"], "model")
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointFormatError(f"{folder}: does not say its model: {error}") from None
    return cfg, restore_params(folder, abstract_params(param_specs(cfg)))


# --- What goes where


def _table(cfg: ModelConfig, name: str | None) -> Family:
    """The family of this name, or the first that can express `cfg`."""
    if name is not None and name not in FAMILIES:
        raise CheckpointFormatError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
    why = []
    for family in FAMILIES.values() if name is None else [FAMILIES[name]]:
        try:
            family.write_config(cfg)
            return family
        except CheckpointFormatError as error:
            why.append(str(error))
    raise CheckpointFormatError("; ".join(why))


def _slots(cfg: ModelConfig, family: Family) -> dict[str, Slot]:
    """Every tensor of the family's checkpoint of `cfg`, in the order it is written."""
    top = {row.path: row for row in family.top}
    layer = {row.path: row for row in family.layer}
    layers = {
        (f"segment_{i}", f"block_{j}"): [
            segment.first_layer + r * len(segment.pattern) + j for r in range(segment.repeats)
        ]
        for i, segment in enumerate(segments(cfg))
        for j in range(len(segment.pattern))
    }
    ordered: dict[tuple, tuple[str, Slot]] = {}
    for path, spec in traverse_util.flatten_dict(param_specs(cfg), sep="/").items():
        if path.endswith(PREDICTOR):
            continue
        parts = path.split("/", 2)
        numbers = layers.get(tuple(parts[:2]))
        row = top.get(path) if numbers is None else layer.get(parts[2])
        if row is None:
            raise CheckpointFormatError(f"{family.model_type} has no tensor for parameter {path}")
        if numbers is None:
            ordered[(0, 0, row.name)] = (row.name, Slot(path, (), row, spec.shape))
            continue
        for r, number in enumerate(numbers):
            prefix = f"model.layers.{number}."
            if "{expert}" not in row.name:
                slot = Slot(path, (r,), row, spec.shape[1:])
                ordered[(1, number, 0, row.name)] = (prefix + row.name, slot)
                continue
            for e in range(spec.shape[1]):
                name = prefix + row.name.format(expert=e)
                slot = Slot(path, (r, e), row, spec.shape[2:])
                ordered[(1, number, 1, e, row.name)] = (name, slot)
    return dict(ordered[key] for key in sorted(ordered))


def _check(slots: Mapping[str, Slot], found: dict[str, files.Found], cfg: ModelConfig) -> set[str]:
    """Compares names and shapes; returns the names of a tied head that is stored all the same."""
    # Old checkpoints store this buffer; it is computed here.
    for name in [n for n in found if n.endswith("rotary_emb.inv_freq")]:
        del found[name]
    tied = {"lm_head.weight"} & set(found) if cfg.tie_embeddings else set()
    for kind, names in (
        ("missing", set(slots) - set(found)),
        ("not in this model", set(found) - set(slots) - tied),
    ):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise CheckpointFormatError(f"tensors {kind} ({len(names)}): {some}")
    for name, slot in slots.items():
        if found[name].shape != slot.there:
            raise CheckpointFormatError(
                f"{found[name].file}: {name} has the shape {found[name].shape}, and config.json"
                f" means {slot.there}"
            )
    return tied


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


# --- Files


def _require_empty(dst: Path) -> None:
    dst.mkdir(parents=True, exist_ok=True)
    if any(dst.iterdir()):
        raise CheckpointFormatError(f"{dst} is not empty")


def _copy_companions(src: Path, dst: Path) -> None:
    for name in COMPANIONS:
        if (src / name).exists() and not (dst / name).exists():
            shutil.copyfile(src / name, dst / name)


def _without_ours(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the other spellings of what `write_config` writes."""
    other = {"rope_parameters", "num_local_experts", "dtype", "original_max_position_embeddings"}
    return {k: v for k, v in config.items() if k not in other}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="pr2jax.models.importers.hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("import", "export"))
    parser.add_argument("src", type=Path)
    parser.add_argument("dst", type=Path)
    parser.add_argument("--dtype", choices=sorted(DTYPES.values()), help="default: as stored")
    parser.add_argument(
        "--family", choices=sorted(FAMILIES), help="of export; default: any fitting"
    )
    options = parser.parse_args(arguments)
    dtype = None if options.dtype is None else jnp.dtype(options.dtype)
    try:
        if options.command == "import":
            cfg, _ = import_checkpoint(options.src, options.dst, dtype=dtype)
            layers = f"{cfg.num_layers} layers of width {cfg.d_model}"
            print(f"imported {layers} into {options.dst}; route predictors start at zero")
            return 0
        family, base = options.family, None
        if (options.src / "params").is_dir():
            cfg, params = store.open_params(options.src)
            base = files.read_json(options.src / "config.json")
            family = family or base["model_type"]
        else:
            cfg, params = _load_run(options.src)
        lost = export_checkpoint(cfg, params, options.dst, family, dtype=dtype, base_config=base)
        _copy_companions(options.src, options.dst)
    except (CheckpointFormatError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"exported to {options.dst}")
    if lost:
        print(f"not in the format, left out: trained route predictors {', '.join(lost)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
