"""The journal: what a batch cost to make, on disk before anything is learned from it.

`WORKDIR/journal/step_NNNNNN.pI.batch` holds process I's part of the batch of position N. What
every host knows (tokens, routes, rewards) is in that of process 0; router features, which are
never all on one host, lie in each host's own. A file is the BLAKE2b digest of the rest (16
bytes), the length of a header (8, little-endian), the header (JSON: arrays by name, and `meta`),
and the arrays' bytes in that order. It takes its name when all of it is on disk, so a run killed
at any moment finds a batch whole or not at all. A file that is damaged, or was written by another
run, is told, removed, and made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from pr2jax.core import hosts
from pr2jax.core.config import from_config_dict
from pr2jax.core.files import remove_leftovers, replacing
from pr2jax.core.hosts import EveryHost, Global, OwnHost
from pr2jax.core.sharding import batch_sharding
from pr2jax.core.store import as_path
from pr2jax.models.predictor import RouterFeatures
from pr2jax.sampler.types import Rollout, SamplingParams

log = logging.getLogger("pr2jax")

Buffer = bytes | memoryview
Entry = tuple[dict[str, np.ndarray], dict[str, Any]]

_DIGEST = 16
_FEATURES = "features/"
# Of each field of RouterFeatures, the dimension that counts rows.
_ROW_AXES = {"positions": 0, "mask": 0, "logits": 1, "inputs": 1}
_NAME = re.compile(r"step_(\d+)[.]p(\d+)[.]batch")


def _digest(parts: Sequence[Buffer]) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for part in parts:
        digest.update(part)
    return digest.digest()


class Journal:
    """Batches by position, in one folder.

    `run` names the run that an entry belongs to: what its batches are a function of. Entries of
    another are not used.
    """

    def __init__(self, folder: str | os.PathLike, run: str):
        self.folder, self.run = as_path(folder), run
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in remove_leftovers(self.folder):
            log.info("journal: %s was not finished; removed", name)

    def write(
        self, step: int, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], part: int = 0
    ) -> int:
        """Writes a process's part of the entry of `step`, all of it or nothing; its bytes."""
        held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        layout = {name: [x.dtype.name, list(np.shape(arrays[name]))] for name, x in held.items()}
        head = {"run": self.run, "step": step, "arrays": layout, "meta": dict(meta)}
        text = json.dumps(head).encode()
        parts = [len(text).to_bytes(8, "little"), text]
        parts += [x.reshape(-1).view(np.uint8).data for x in held.values()]
        path = self._path(step, part)
        with replacing(path) as file:
            file.write(_digest(parts))
            for part in parts:
                file.write(part)
        return path.stat().length

    def read(self, step: int, part: int = 0) -> Entry | None:
        """(arrays, meta) of a part of `step` to the bit; None where none can be used."""
        path = self._path(step, part)
        try:
            whole = np.frombuffer(path.read_bytes(), np.uint8)
        except FileNotFoundError:
            return None
        if whole[:_DIGEST].tobytes() != _digest([whole[_DIGEST:].data]):
            self.drop(step, "is damaged")
            return None
        start = _DIGEST + 8
        end = start + int.from_bytes(whole[_DIGEST:start].tobytes(), "little")
        head = json.loads(whole[start:end].tobytes())
        if (head["run"], head["step"]) != (self.run, step):
            self.drop(step, "is of a run with other settings")
            return None
        arrays = {}
        for name, (kind, shape) in head["arrays"].items():
            dtype = jnp.dtype(kind)  # NumPy alone does not know bfloat16
            start, end = end, end + math.prod(shape) * dtype.itemsize
            arrays[name] = whole[start:end].copy().view(dtype).reshape(shape)
        return arrays, head["meta"]

    def drop(self, step: int, why: str) -> None:
        """Removes the entry of `step` and says why: its batch will be made again."""
        log.warning("journal: %s %s; its batch is made again", self._path(step), why)
        self._remove(step)

    def _remove(self, step: int) -> None:
        if hosts.first():
            for path in self.folder.glob(f"step_{step:06d}.p*.batch"):
                path.unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """Positions that there are entries of, ascending."""
        if not self.folder.is_dir():  # a store has no empty folders
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in found if name and int(name[2]) == 0)

    def trim(self, before: int) -> None:
        """Removes entries of positions < `before`: no checkpoint that is left needs them."""
        for step in self.steps():
            if step < before:
                self._remove(step)

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(self.size_of(step) for step in self.steps())

    def size_of(self, step: int) -> int:
        """Bytes of what process 0 wrote of `step`."""
        return self._path(step).stat().length

    def _path(self, step: int, part: int = 0) -> epath.Path:
        return self.folder / f"step_{step:06d}.p{part}.batch"


def pack(rollout: EveryHost[Rollout]) -> Entry:
    """A rollout as what an entry holds."""
    arrays = {}
    for field in _array_fields(Rollout):
        value = getattr(rollout, field)
        if value is not None:
            arrays[field] = np.asarray(value)
    meta = {"reasons": rollout.reasons, "sampling": dataclasses.asdict(rollout.sampling)}
    return arrays, meta


def unpack(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Rollout:
    """The inverse of `pack`."""
    return Rollout(
        **{field: arrays.get(field) for field in _array_fields(Rollout)},
        reasons=tuple(meta["reasons"]),
        sampling=from_config_dict(SamplingParams, meta["sampling"]),
    )


def pack_features(
    features: Global[RouterFeatures] | None, mesh: Mesh | None
) -> tuple[OwnHost[dict[str, np.ndarray]], dict[str, int] | None]:
    """This host's rows of recorded features, by the names that an entry has for them; and which
    rows of how many processes' parts these are (None: nothing was recorded)."""
    if features is None:
        return {}, None
    own = hosts.own_rows(mesh, len(features.mask))
    arrays = {
        _FEATURES + name: hosts.rows_of(getattr(features, name), own, axis)
        for name, axis in _ROW_AXES.items()
    }
    return arrays, {"processes": jax.process_count(), "first": own.start}


def has_features(entry: Entry) -> bool:
    """Whether features were recorded with it."""
    return _FEATURES + "mask" in entry[0]


def read_features(
    journal: Journal, step: int, entry: Entry, mesh: Mesh | None
) -> OwnHost[dict[str, np.ndarray]] | None:
    """The rows of features that this host needs, out of the parts of as many processes as wrote
    the entry; None where there are none, or a part is missing."""
    arrays = entry[0]
    if not has_features(entry):
        return None
    rows, own = len(arrays["lengths"]), hosts.own_rows(mesh, len(arrays["lengths"]))
    found: dict[str, np.ndarray] = {}
    alone = {"processes": 1, "first": 0}  # not said by entries of before
    for part in range(entry[1].get("features", alone)["processes"]):
        held = entry if part == 0 else journal.read(step, part)
        if held is None:
            return None
        first = held[1].get("features", alone)["first"]
        for name, axis in _ROW_AXES.items():
            x = held[0][_FEATURES + name]
            if name not in found:
                found[name] = np.zeros((*x.shape[:axis], rows, *x.shape[axis + 1 :]), x.dtype)
            found[name][(slice(None),) * axis + (slice(first, first + x.shape[axis]),)] = x
    return {name: hosts.rows_of(x, own, _ROW_AXES[name]) for name, x in found.items()}


def place_features(
    own: OwnHost[dict[str, np.ndarray]], rows: int, mesh: Mesh | None
) -> Global[RouterFeatures]:
    """A batch's features out of what `read_features` gave on every host."""
    if hosts.several():
        first = hosts.own_rows(mesh, rows).start
        for name, axis in _ROW_AXES.items():
            sharding = batch_sharding(mesh, own[name].ndim, axis)
            own[name] = hosts.put_own(own[name], sharding, rows, first, axis)
    return RouterFeatures(**own)


def _array_fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.metadata.get("pytree_node", True)]
