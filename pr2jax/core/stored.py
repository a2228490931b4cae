"""Reading a step of a checkpoint directory: its record and arrays, and whether they are sound."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array

from pr2jax.core import manifest
from pr2jax.core.fingerprints import describe
from pr2jax.core.manifest import CheckpointError, DamagedCheckpoint

SCHEMA = 1  # of a record; one without a number is of before there was one


class Stored:
    """The steps below `directory`, read with `manager`; `steps` says which there are."""

    def __init__(
        self, directory: str, manager: ocp.CheckpointManager, steps: Callable[[], list[int]]
    ):
        self.directory, self.manager, self._steps = directory, manager, steps

    def path(self, step: int) -> str:
        """The folder of a step."""
        return os.path.join(self.directory, str(step))

    def record(self, step: int) -> dict[str, Any]:
        """The record of a step. Raises CheckpointError, DamagedCheckpoint where it is damaged."""
        record = self.read(step, record=ocp.args.JsonRestore())["record"]
        where = os.path.join(self.path(step), "record")
        if not isinstance(record, dict) or not {"extra", "metrics", "arrays"} <= record.keys():
            raise DamagedCheckpoint(f"{where}: damaged: it is incomplete")
        if record.get("schema", 0) != 0:
            if record["schema"] > SCHEMA:
                raise CheckpointError(manifest.later(where, record["schema"], SCHEMA))
            if record.pop("digest", None) != manifest.digest(record):
                raise DamagedCheckpoint(f"{where}: damaged: it is not as written")
        return record

    def read(self, step: int, **items: Any) -> Any:
        """Items of a step. Raises CheckpointError, DamagedCheckpoint unless it is about access."""
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            others = [s for s in self._steps() if s != step]
            hint = f"; other steps here: {others}" if others else ""
            kind = CheckpointError if _is_about_access(error) else DamagedCheckpoint
            raise kind(f"{self.path(step)}: cannot be read: {brief(error)}{hint}") from error

    def check(self, step: int, wanted: Mapping[str, Any], present: Mapping[str, Any]) -> None:
        """Raises CheckpointError where an array is missing or of another shape than wanted."""
        for path, leaf in wanted.items():
            if path not in present:
                raise CheckpointError(f"{self.path(step)}: has no array {path!r}")
            shape = tuple(present[path]["shape"])
            if shape != tuple(leaf.shape):
                raise CheckpointError(
                    f"{self.path(step)}: {path!r} has shape {shape}, not {tuple(leaf.shape)}"
                )

    def arrays(
        self, step: int, wanted: Mapping[str, Any], present: Mapping[str, Any]
    ) -> dict[str, Array]:
        """The wanted arrays in the dtypes they were saved in, fingerprints verified."""
        default = SingleDeviceSharding(jax.devices()[0])
        flat = {
            path: jax.ShapeDtypeStruct(
                leaf.shape,
                np.dtype(present[path]["dtype"]),
                sharding=getattr(leaf, "sharding", None) or default,
            )
            for path, leaf in wanted.items()
        }
        nested = traverse_util.unflatten_dict(flat, sep="/")
        args = ocp.args.PyTreeRestore(
            nested,
            restore_args=ocp.checkpoint_utils.construct_restore_args(nested),
            partial_restore=True,
        )
        arrays = traverse_util.flatten_dict(self.read(step, state=args)["state"], sep="/")
        for path, found in describe(arrays).items():
            if found != present[path]:
                raise DamagedCheckpoint(
                    f"{self.path(step)}: damaged: array {path!r} is not what was saved"
                )
        return arrays


def _is_about_access(error: BaseException) -> bool:
    """Whether reading failed for a reason that says nothing about the file's contents."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return True
    if isinstance(error, MemoryError):
        return True
    named = ("PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
    return any(name in str(error) for name in named)


def brief(error: BaseException) -> str:
    """An error in a line."""
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"
