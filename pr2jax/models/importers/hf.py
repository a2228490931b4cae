"""Published checkpoints in and out, streamed tensor by tensor.

    python -m pr2jax.models.importers.hf import SRC DST [--dtype=bfloat16]
    python -m pr2jax.models.importers.hf export SRC DST [--dtype=bfloat16] [--family=qwen3_moe]
                                                        [--drop=predictor,selection_bias]

`import` reads a Hugging Face directory (config.json + safetensors), a .gguf file or
`package:NAME` (the one .gguf file of an installed Python package) and writes a folder that
`init_from` reads; `export` turns such a folder, or a training run's, into a Hugging Face directory
that `transformers` loads.  Nothing is read before every name and shape has been checked against
the family's table, and nothing is left out silently: a trained route predictor or selection bias
that the format has no place for is an error until `--drop` names it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pr2jax.core.checkpoint import CheckpointError, read_checkpoint, restore_params
from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.core.fetch import fetched
from pr2jax.core.params import abstract_params
from pr2jax.core.store import as_path, is_store
from pr2jax.models.config import ModelConfig
from pr2jax.models.importers import files, gguf, store
from pr2jax.models.importers.export import DROPPABLE, MAX_SHARD_BYTES, export_checkpoint
from pr2jax.models.importers.families import FAMILIES, family_of
from pr2jax.models.importers.files import DTYPES, INDEX, SINGLE, CheckpointFormatError
from pr2jax.models.importers.slots import check_tensors, slots_of
from pr2jax.models.transformer import param_specs

__all__ = [
    "MAX_SHARD_BYTES",
    "CheckpointFormatError",
    "export_checkpoint",
    "import_checkpoint",
    "is_published",
    "load_params",
    "read_model_config",
    "resolve",
]


def import_checkpoint(
    src: str | os.PathLike, dst: str | os.PathLike | None = None, *, dtype: Any = None
) -> tuple[ModelConfig, dict]:
    """Reads a published checkpoint of a known family.

    Args:
      src: folder with config.json and model.safetensors, or shards and their index; or a .gguf
        file, whose tensors are dequantised to fp32.
      dst: folder to write to; then the parameters returned are TensorStore arrays in it, and no
        more than a tensor is held in memory.  None: they are numpy arrays.
      dtype: of the parameters but selection biases, which differ by less than half precision
        tells apart; None keeps each as it is stored.

    Returns:
      (ModelConfig, parameters in the tree of `param_specs`, the route predictor zero).

    Raises:
      CheckpointFormatError: the configuration says something unsupported; a tensor is missing,
        extra or misshapen; a file is missing, truncated or corrupt; dst is not empty.  Names which.
    """
    source: files.Source
    source = gguf.GGUFFile(src) if gguf.is_gguf(src) else files.Folder(Path(src))
    hf = source.config()
    family = family_of(hf)
    cfg = family.read_config(hf)
    slots = slots_of(cfg, family)
    found = source.inspect()
    tied_head = check_tensors(slots, found, cfg)

    specs = traverse_util.flatten_dict(param_specs(cfg), sep="/")
    dtypes = {path: np.dtype(dtype or np.float32) for path in specs}
    for path in {slot.path for slot in slots.values()}:
        if dtype is None or path.endswith(DROPPABLE["selection_bias"]):
            kinds = [found[n].dtype for n, slot in slots.items() if slot.path == path]
            dtypes[path] = jnp.result_type(*kinds)
    if dst is not None:
        dst = Path(dst)
        files.require_empty(dst)
        leading = dict.fromkeys(specs, 1) | {s.path: len(s.index) for s in slots.values()}
        sink = {p: store.create(dst, p, s.shape, dtypes[p], leading[p]) for p, s in specs.items()}
    else:
        sink = {p: np.zeros(s.shape, dtypes[p]) for p, s in specs.items()}

    for name, array in source.stream(found, skip=tied_head):
        slot = slots[name]
        value = slot.to_here(array).astype(dtypes[slot.path])
        if dst is None:
            sink[slot.path][slot.index] = value
        else:
            sink[slot.path][slot.index].write(np.ascontiguousarray(value)).result()
    if tied_head:
        source.check_tied(found)
    if dst is None:
        return cfg, traverse_util.unflatten_dict(sink, sep="/")
    source.write_companions(dst)
    store.finish(dst, cfg, list(specs))
    return store.open_params(dst)


def resolve(name: str | os.PathLike) -> str:
    """What `load_params` reads for `name`: a folder as it is; of a .gguf file, or of
    `package:NAME`, the imported folder in the user's cache, made once for each file's content.
    Of what was published (not of a run's checkpoints) in a store: its copy in the user's cache.

    Raises:
      CheckpointFormatError: no such package, or not one .gguf file in it; what
        `import_checkpoint` raises.
      StorageError: a store cannot be read.
    """
    name = str(name)
    if is_store(name) and (gguf.is_gguf(name) or is_published(name)):
        name = fetched(name)
    file = gguf.package_file(name) if name.startswith(gguf.PACKAGE) else Path(name)
    if not gguf.is_gguf(file):
        return name
    folder = gguf.cache_folder(file)
    if not (folder / store.MANIFEST).exists():
        logging.getLogger("pr2jax").info("importing %s into %s", file, folder)
        with files.new_folder(folder) as partial:
            import_checkpoint(file, partial)
    return str(folder)


def is_published(directory: str | os.PathLike) -> bool:
    """Whether `directory` is what `load_params` reads: a Hugging Face folder or an imported one."""
    directory = as_path(directory)
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


def _export(options: argparse.Namespace, dtype: Any) -> None:
    family, base = options.family, None
    if (options.src / "params").is_dir():
        cfg, params = store.open_params(options.src)
        base = files.read_json(options.src / "config.json")
        family = family or base["model_type"]
    else:
        cfg, params = _load_run(options.src)
    lost = export_checkpoint(
        cfg, params, options.dst, family, dtype=dtype, base_config=base, drop=options.drop
    )
    files.copy_companions(options.src, options.dst)
    print(f"exported to {options.dst}")
    if lost:
        print(f"dropped, though trained: {', '.join(lost)}")


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
    names = ", ".join(DROPPABLE)
    parser.add_argument(
        "--drop",
        default=[],
        type=lambda text: [n for n in text.split(",") if n],
        metavar="NAME,...",
        help=f"of export: what to leave out though it was trained ({names})",
    )
    options = parser.parse_args(arguments)
    dtype = None if options.dtype is None else jnp.dtype(options.dtype)
    if unknown := set(options.drop) - set(DROPPABLE):
        parser.error(f"--drop: {min(unknown)!r} is none of {names}")
    try:
        if options.command == "export":
            _export(options, dtype)
            return 0
        src = str(options.src)
        src = gguf.package_file(src) if src.startswith(gguf.PACKAGE) else options.src
        cfg, _ = import_checkpoint(src, options.dst, dtype=dtype)
        layers = f"{cfg.num_layers} layers of width {cfg.d_model}"
        print(f"imported {layers} into {options.dst}; route predictors start at zero")
    except (CheckpointFormatError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
