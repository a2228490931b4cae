"""The journal: what a batch cost to make, on disk before anything is learned from it.

`WORKDIR/journal/step_NNNNNN.pI.batch` holds process I's share of the batch of position N: the
BLAKE2b digest of the rest (16 bytes), the length of a header (8, little-endian), the header
(JSON: arrays by name, and `meta`), and the arrays' bytes in that order. A file takes its name when
all of it is on disk, so a run killed at any moment finds a batch whole or not at all. A file that
is damaged, or was written by another run, is told, removed, and made again.
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
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pr2jax.core.config import from_config_dict
from pr2jax.core.metrics import remove_leftovers, replacing
from pr2jax.models.predictor import RouterFeatures
from pr2jax.sampler.types import Rollout, SamplingParams

log = logging.getLogger("pr2jax")

Buffer = bytes | memoryview
Entry = tuple[dict[str, np.ndarray], dict[str, Any]]

_DIGEST = 16
_FEATURES = "features/"
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
        self.folder, self.run = Path(folder), run
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in remove_leftovers(self.folder):
            log.info("journal: %s was not finished; removed", name)

    def write(self, step: int, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> int:
        """Writes the entry of `step`, all of it or nothing; returns its bytes."""
        held = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        layout = {name: [x.dtype.name, list(np.shape(arrays[name]))] for name, x in held.items()}
        head = {"run": self.run, "step": step, "arrays": layout, "meta": dict(meta)}
        text = json.dumps(head).encode()
        parts = [len(text).to_bytes(8, "little"), text]
        parts += [x.reshape(-1).view(np.uint8).data for x in held.values()]
        path = self._path(step)
        with replacing(path) as file:
            file.write(_digest(parts))
            for part in parts:
                file.write(part)
        return path.stat().st_size

    def read(self, step: int) -> Entry | None:
        """(arrays, meta) of `step` to the bit; None where there is none that can be used."""
        path = self._path(step)
        if not path.exists():
            return None
        whole = np.fromfile(path, np.uint8)
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
        self._path(step).unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """Positions that this process has entries of, ascending."""
        mine = []
        for path in self.folder.iterdir():
            found = _NAME.fullmatch(path.name)
            if found and int(found[2]) == jax.process_index():
                mine.append(int(found[1]))
        return sorted(mine)

    def trim(self, before: int) -> None:
        """Removes entries of positions < `before`: no checkpoint that is left needs them."""
        for step in self.steps():
            if step < before:
                self._path(step).unlink(missing_ok=True)

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(self.size_of(step) for step in self.steps())

    def size_of(self, step: int) -> int:
        """Bytes of the entry of `step`."""
        return self._path(step).stat().st_size

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.p{jax.process_index()}.batch"


def pack(rollout: Rollout, features: RouterFeatures | None) -> Entry:
    """A rollout and its recorded features as what an entry holds."""
    arrays = {}
    for prefix, held in (("", rollout), (_FEATURES, features)):
        for field in () if held is None else _array_fields(type(held)):
            value = getattr(held, field)
            if value is not None:
                arrays[prefix + field] = np.asarray(jax.device_get(value))
    meta = {"reasons": rollout.reasons, "sampling": dataclasses.asdict(rollout.sampling)}
    return arrays, meta


def unpack(
    arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]
) -> tuple[Rollout, RouterFeatures | None]:
    """The inverse of `pack`."""
    rollout = Rollout(
        **{field: arrays.get(field) for field in _array_fields(Rollout)},
        reasons=tuple(meta["reasons"]),
        sampling=from_config_dict(SamplingParams, meta["sampling"]),
    )
    fields = _array_fields(RouterFeatures)
    if _FEATURES + fields[0] not in arrays:
        return rollout, None
    return rollout, RouterFeatures(**{field: arrays[_FEATURES + field] for field in fields})


def _array_fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.metadata.get("pytree_node", True)]
