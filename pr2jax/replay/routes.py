"""Route logs: compact ids, where they are valid, and how they are kept on disk.

routes [L, B, T, K] holds expert ids of MoE layer l at *input* position t. A sequence of n tokens
has n - 1 inputs whose output mattered: its last token was never fed, so routes are valid for
t < n - 1 and hold the filler 0..K-1 elsewhere. There is no sentinel: whatever reads routes masks
by lengths.
"""

from __future__ import annotations

import json
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jaxtyping import Array, Int

from pr2jax.core.store import as_path, kvstore


def route_dtype(num_experts: int) -> np.dtype:
    """The smallest unsigned type that holds ids below `num_experts`.

    Raises ValueError beyond 65,536 experts.
    """
    if num_experts > 1 << 16:
        raise ValueError(f"route ids of {num_experts} experts do not fit uint16")
    return np.dtype(np.uint8 if num_experts <= 1 << 8 else np.uint16)


def encode(routes: Int[np.ndarray, "L B T K"], num_experts: int) -> Int[np.ndarray, "L B T K"]:
    """Routes as they are kept: host array of `route_dtype`.

    Raises ValueError for an id that is not an expert.
    """
    routes = np.asarray(routes)
    if routes.size and not (routes.min() >= 0 and routes.max() < num_experts):
        raise ValueError(
            f"route ids span {routes.min()}..{routes.max()}; experts are 0..{num_experts - 1}"
        )
    return routes.astype(route_dtype(num_experts))


def decode(routes: Int[Array, "L B T K"]) -> Int[Array, "L B T K"]:
    """Routes as the model takes them: int32."""
    return jnp.asarray(routes).astype(jnp.int32)


def to_inputs(values: Array) -> Array:
    """Moves per-token values [B, T] to the input position that predicts the token.

    out[b, t] = values[b, t + 1]; the last column is 0. A loss mask becomes the mask of response
    inputs, token log-probs become those of `token_logprobs(hidden, targets)`.
    """
    return jnp.pad(values[:, 1:], ((0, 0), (0, 1)))


def save_routes(
    path: str | os.PathLike,
    routes: Int[np.ndarray, "L B T K"],
    meta: dict[str, Any],
    *,
    rows_per_chunk: int = 16,
) -> None:
    """Writes a route log as a compressed zarr v3 array (TensorStore), replacing what is there.

    Args:
      path: directory of the array.
      routes: ids as `encode` returns them.
      meta: JSON-able facts kept as the array's attributes (step, lengths, mode, ...).
      rows_per_chunk: rows in one file.
    """
    routes = np.asarray(routes)
    layers, rows, length, top_k = routes.shape
    chunk = [max(layers, 1), min(rows_per_chunk, max(rows, 1)), max(length, 1), top_k]
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore(path),
        "metadata": {
            "shape": list(routes.shape),
            "data_type": routes.dtype.name,
            "dimension_names": ["layer", "row", "position", "expert"],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "zstd", "configuration": {"level": 3}},
            ],
            # Through JSON, so that numpy scalars fail here and not in a notebook.
            "attributes": json.loads(json.dumps(meta)),
        },
    }
    ts.open(spec, create=True, delete_existing=True).result().write(routes).result()


def open_routes(path: str | os.PathLike) -> tuple[ts.TensorStore, dict[str, Any]]:
    """Opens a route log: (array [L, B, T, K], meta).

    The array is read lazily: `array[2, 5].read().result()` is layer 2 of row 5.

    Raises FileNotFoundError naming the path where there is no log.
    """
    where = as_path(path)
    if not (where / "zarr.json").exists():
        raise FileNotFoundError(f"no route log at {where}")
    spec = {"driver": "zarr3", "kvstore": kvstore(path)}
    store = ts.open(spec, open=True, read=True).result()
    return store, json.loads((where / "zarr.json").read_text()).get("attributes", {})
