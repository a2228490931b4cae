"""Where curation keeps its work: stages that go on after a kill, rows by number, texts on disk.

WORKDIR/stages/NAME holds a stage's parts, each written whole, and the key of what they were made
from: the stage's own settings and the key of the stage before. A stage of another key is begun
anew, one of the same key goes on after its last part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float, Int, UInt64

from pr2jax.core.config import ConfigError
from pr2jax.core.files import replacing
from pr2jax.core.metrics import Progress, write_json
from pr2jax.tasks.rows import read_rows

log = logging.getLogger("pr2jax")

STAGES = "stages"
# Reasons in the order they are looked for; the number is what is stored, 0 stays.
REASONS = (
    *("kept", "exact", "contained", "near", "contaminated"),
    *("too_long", "too_hard", "too_easy"),
)
REASON = {name: number for number, name in enumerate(REASONS)}


class Stage:
    """One stage's folder of parts."""

    def __init__(self, root: Path, name: str, settings: Any, before: str = ""):
        """Opens or begins the stage; `before` is the key of the stage it builds on."""
        text = json.dumps([name, settings, before], sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.name, self.folder = name, root / STAGES / name
        self._clock = time.monotonic()
        stamp = self.folder / "key.json"
        if stamp.exists() and json.loads(stamp.read_text())["key"] != self.key:
            log.info("%s: begun anew, its settings or its input changed", name)
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not stamp.exists():
            write_json(stamp, {"key": self.key, "settings": settings})

    def path(self, part: int | str, end: str = "npz") -> Path:
        """The file of a part."""
        name = part if isinstance(part, str) else f"part-{part:05d}"
        return self.folder / f"{name}.{end}"

    def has(self, part: int | str, end: str = "npz") -> bool:
        """Whether a part is there."""
        return self.path(part, end).exists()

    def save(self, part: int | str, **arrays: Any) -> None:
        """Writes a part, whole or not at all."""
        with replacing(self.path(part)) as file:
            np.savez(file, **arrays)

    def load(self, part: int | str) -> dict[str, np.ndarray]:
        """The arrays of a part."""
        with np.load(self.path(part), allow_pickle=False) as found:
            return dict(found)

    def array(self, part: int | str, name: str) -> np.ndarray:
        """One array of a part; the others are not read."""
        with np.load(self.path(part), allow_pickle=False) as found:
            return found[name]

    def todo(self, parts: Sequence[int | str], label: str, end: str = "npz") -> Iterator[int]:
        """Numbers of the parts from the first that is not there, with a line of progress.

        Parts are made in order, so none after that one counts.
        """
        first = next((k for k, part in enumerate(parts) if not self.has(part, end)), len(parts))
        if 0 < first < len(parts):
            log.info("%s: %d of %d parts are there", label, first, len(parts))
        progress = Progress(label, len(parts), start=first)
        for k in range(first, len(parts)):
            yield k
            progress.update(k + 1, {})
        progress.close()

    def finish(self) -> float:
        """Seconds it took the process that finished the stage; read from disk in later ones."""
        path = self.path("seconds", "json")
        if not path.exists():
            write_json(path, {"seconds": time.monotonic() - self._clock})
        return float(json.loads(path.read_text())["seconds"])


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The files, and how many rows each has (unreadable ones too)."""

    paths: tuple[str, ...]
    rows: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.rows)

    def read(self, start: int = 0) -> Iterator[tuple[int, int, int, dict | Exception]]:
        """(position from 0, file, line from 1, row or its error) of the rows from `start`."""
        position = 0
        for number, (path, count) in enumerate(zip(self.paths, self.rows, strict=True)):
            if position + count > start:
                skipped = max(start - position, 0)
                found = itertools.islice(read_rows(path), skipped, None)
                for at, (line, row) in enumerate(found, position + skipped):
                    yield at, number, line, row
            position += count

    def stamp(self) -> list[Any]:
        """What tells whether the files are those of an earlier run."""
        return [file_stamp(path) for path in self.paths]


def file_stamp(path: str) -> list[Any]:
    """[absolute path, bytes, time of change in ns]."""
    found = os.stat(path)
    return [os.path.abspath(path), found.st_size, found.st_mtime_ns]


def open_inputs(paths: Sequence[str]) -> Inputs:
    """Counts the rows of the files. Raises ConfigError naming one that cannot be read."""
    if not paths:
        raise ConfigError("curate.inputs: mode 'curate' needs files of rows")
    counts = []
    for i, path in enumerate(paths):
        if not os.path.isfile(path):
            raise ConfigError(f"curate.inputs[{i}]: no file {path}")
        if path.endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            try:
                counts.append(pyarrow.parquet.ParquetFile(path).metadata.num_rows)
            except (pyarrow.ArrowException, OSError) as error:
                raise ConfigError(
                    f"curate.inputs[{i}]: {path} is not a parquet file ({error})"
                ) from None
        else:
            with open(path, "rb") as file:
                counts.append(sum(1 for line in file if line.strip()))
        if not counts[-1]:
            raise ConfigError(f"curate.inputs[{i}]: {path} has no rows")
    return Inputs(tuple(paths), tuple(counts))


@dataclasses.dataclass
class Index:
    """What is held of N well-formed rows: about 100 bytes of each, and no text.

    position, file, line: where a row stands. digest: of the compared text. start, size: its bytes
    in its part's text file. chars: its length. category: number in `categories`, (domain, data
    source). rates: the pass rates it brought, NaN where it brought none. reason, partner: by what
    it goes (REASONS), and with which row; -1 for none. similarity: to the partner, NaN for none.
    """

    position: Int[np.ndarray, " N"]
    file: Int[np.ndarray, " N"]
    line: Int[np.ndarray, " N"]
    digest: UInt64[np.ndarray, "N 2"]
    start: Int[np.ndarray, " N"]
    size: Int[np.ndarray, " N"]
    chars: Int[np.ndarray, " N"]
    category: Int[np.ndarray, " N"]
    rates: Float[np.ndarray, "N 2"]
    part_starts: Int[np.ndarray, " P+1"]
    categories: list[tuple[str, str]]
    reason: Int[np.ndarray, " N"]
    partner: Int[np.ndarray, " N"]
    similarity: Float[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.position)

    @property
    def parts(self) -> int:
        return len(self.part_starts) - 1

    def alive(self, part: int) -> Int[np.ndarray, " R"]:
        """The rows of a part that stay so far."""
        low, high = self.part_starts[part : part + 2]
        return low + np.flatnonzero(self.reason[low:high] == 0)

    def drop(self, rows, reason: str, partner=-1, similarity=np.nan) -> None:
        """`rows` go by `reason`."""
        self.reason[rows] = REASON[reason]
        self.partner[rows] = partner
        self.similarity[rows] = similarity


class Texts:
    """The compared texts on disk, read by number: no more in memory than what is asked for."""

    def __init__(self, stage: Stage, index: Index):
        self._stage, self._index = stage, index
        self._files: dict[int, BinaryIO] = {}

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __getitem__(self, row: int) -> bytes:
        """UTF-8 of a row's compared text."""
        part = int(np.searchsorted(self._index.part_starts, row, "right")) - 1
        if part not in self._files:
            self._files[part] = open(self._stage.path(part, "txt"), "rb")  # noqa: SIM115
        file = self._files[part]
        return os.pread(file.fileno(), int(self._index.size[row]), int(self._index.start[row]))

    def part(self, part: int) -> list[bytes]:
        """The texts of all rows of a part."""
        data = self._stage.path(part, "txt").read_bytes()
        low, high = self._index.part_starts[part : part + 2]
        starts, sizes = self._index.start[low:high], self._index.size[low:high]
        return [data[a : a + n] for a, n in zip(starts.tolist(), sizes.tolist(), strict=True)]


def selected(
    inputs: Inputs, index: Index, rows: Int[np.ndarray, " R"]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of the rows whose numbers are given in order, read from the files."""
    if not len(rows):
        return
    wanted = iter(zip(index.position[rows].tolist(), rows.tolist(), strict=True))
    at, number = next(wanted)
    for position, _, _, row in inputs.read(at):
        if position == at:
            yield number, row
            following = next(wanted, None)
            if following is None:
                return
            at, number = following


def peak_memory() -> int:
    """Most bytes that this process has had in memory; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:")), 0)
