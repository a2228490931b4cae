"""Parameters on disk, one TensorStore array each, written and read in slices.

A folder holds `pr2jax.json` (the ModelConfig and the parameters' paths) and `params/PATH/`, zarr3
arrays with one chunk a layer (an expert of a layer), so that neither writing nor a sharded read
ever holds a whole model, and a notebook can open one parameter.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import traverse_util

from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.core.params import map_with_path
from pr2jax.models.config import ModelConfig
from pr2jax.models.importers.files import CheckpointFormatError

MANIFEST = "pr2jax.json"


def create(
    directory: Path, path: str, shape: tuple[int, ...], dtype: Any, leading: int
) -> ts.TensorStore:
    """A new array of zeros at `path`; a chunk is one index of the first `leading` axes."""
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{directory.absolute()}/params/{path}/"},
    }
    layout = ts.ChunkLayout(chunk_shape=(1,) * leading + shape[leading:])
    kind = ts.dtype(np.dtype(dtype).name)
    return ts.open(spec, create=True, shape=shape, dtype=kind, chunk_layout=layout).result()


def finish(directory: Path, cfg: ModelConfig, paths: list[str]) -> None:
    """Writes the manifest, last and atomically: without it a folder is not a checkpoint."""
    manifest = {"model": dataclasses.asdict(cfg), "params": sorted(paths)}
    partial = directory / (MANIFEST + ".partial")
    partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, directory / MANIFEST)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, its "model" a ModelConfig; CheckpointFormatError where it is unusable."""
    file = directory / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        manifest["model"] = from_config_dict(ModelConfig, manifest["model"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError, ConfigError) as error:
        raise CheckpointFormatError(f"{file}: not a finished pr2jax checkpoint: {error}") from None
    return manifest


def open_params(directory: str | os.PathLike) -> tuple[ModelConfig, dict]:
    """(ModelConfig, parameters as TensorStore arrays, which read what is asked of them)."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    flat = {}
    for path in manifest["params"]:
        kvstore = {"driver": "file", "path": f"{directory.absolute()}/params/{path}/"}
        try:
            flat[path] = ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
        except ValueError as error:
            raise CheckpointFormatError(f"{directory}: parameter {path}: {error}") from None
    return manifest["model"], traverse_util.unflatten_dict(flat, sep="/")


def place(params: dict, abstract: Any) -> Any:
    """Host or TensorStore parameters onto devices: the shapes, dtypes and shardings of `abstract`.

    Each device reads its own slices.  The route predictor, which published checkpoints do not
    have, is zero where `params` lacks it; a parameter that `abstract` lacks is left out.

    Raises:
      CheckpointFormatError: a parameter is missing or misshapen; names it.
    """
    flat = traverse_util.flatten_dict(params, sep="/")

    def one(path: str, want: jax.ShapeDtypeStruct) -> jax.Array:
        source = flat.get(path)
        if source is None and "/predictor/" in path:
            source = np.zeros((1,) * len(want.shape), want.dtype)
            source = np.broadcast_to(source, want.shape)
        if source is None:
            raise CheckpointFormatError(f"parameter {path} is missing")
        if tuple(source.shape) != tuple(want.shape):
            shapes = f"{tuple(source.shape)}, and the model's is {tuple(want.shape)}"
            raise CheckpointFormatError(f"parameter {path} has the shape {shapes}")

        def read(index: tuple[slice, ...]) -> np.ndarray:
            part = source[index]
            part = part.read().result() if isinstance(part, ts.TensorStore) else part
            return np.asarray(part).astype(want.dtype)

        whole = (slice(None),) * len(want.shape)
        if want.sharding is None:
            return jnp.asarray(read(whole))
        return jax.make_array_from_callback(want.shape, want.sharding, read)

    return map_with_path(one, abstract)
