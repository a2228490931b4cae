"""Manifests: what the files of a finished checkpoint are, so that damage is found and named.

`STEP/pr2jax_manifest.json` lists every file of the step's folder with its size, and with its
BLAKE2b digest up to 16 MiB; of larger ones, which hold arrays, the contents are covered by the
arrays' fingerprints (core/fingerprints.py). It ends in a digest of itself. A file that is not
listed is nobody's business.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from pr2jax.core.files import replacing
from pr2jax.core.store import files_below, is_store

NAME = "pr2jax_manifest.json"
SCHEMA = 1
COMMITTED = "commit_success.txt"  # orbax's mark, in a store, of a step that is all there
HASHED_BYTES = 16 << 20


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or not of the state that was asked for; names the path."""


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is not what was written; an earlier step may be whole."""


def digest(value: Any) -> str:
    """BLAKE2b of a JSON value, whatever the order of its keys."""
    return _blake(json.dumps(value, sort_keys=True).encode())


def write(folder: str | os.PathLike) -> None:
    """Writes the manifest of `folder`, all of it or nothing. Raises OSError."""
    folder, files = epath.Path(folder), {}
    for name, path in sorted(files_below(folder).items()):
        if name == NAME or name.startswith("." + NAME):
            continue
        size = path.stat().length
        files[name] = [size, _blake(path.read_bytes()) if size <= HASHED_BYTES else None]
    whole = {"schema": SCHEMA, "files": files}
    text = json.dumps(whole | {"digest": digest(whole)}, indent=1)
    with replacing(folder / NAME) as file:
        file.write(text.encode())


def verify(folder: str | os.PathLike) -> bool:
    """Holds the files of `folder` against its manifest; False where it has none.

    Raises DamagedCheckpoint naming the first file that is missing or not what was written,
    CheckpointError where a file cannot be read or the manifest is of a later version.
    """
    folder = epath.Path(folder)
    listed = _listed(folder)
    for name, (size, wanted) in (listed or {}).items():
        path = folder / name
        try:
            found = path.stat().length
            if found != size:
                raise DamagedCheckpoint(f"{path}: damaged: it has {found} bytes, not {size}")
            if wanted is not None and _blake(path.read_bytes()) != wanted:
                raise DamagedCheckpoint(f"{path}: damaged: its {size} bytes are not as written")
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{path}: damaged: the file is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return listed is not None


def _listed(folder: epath.Path) -> dict[str, list] | None:
    path = folder / NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    try:
        found = json.loads(text)
        told = found.pop("digest")
        good = told == digest(found)
    except (ValueError, KeyError, AttributeError, TypeError):
        good = False
    if not good:
        raise DamagedCheckpoint(f"{path}: damaged: it is not as written")
    if found["schema"] > SCHEMA:
        raise CheckpointError(later(path, found["schema"], SCHEMA))
    return found["files"]


class Sealer:
    """Writes a step's manifest as soon as orbax is through (`busy`) with its folder."""

    def __init__(self, folder: str, busy: Callable[[], bool]):
        self._folder, self._busy = folder, busy
        self._error: CheckpointError | None = None
        self._thread = threading.Thread(target=self._run, name="manifest", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._busy():
            time.sleep(0.02)
        folder = epath.Path(self._folder)
        # Otherwise the save failed, which `wait` tells.
        if (folder / COMMITTED).exists() if is_store(folder) else folder.is_dir():
            try:
                seal(self._folder)
            except CheckpointError as error:
                self._error = error

    def wait(self) -> None:
        """Raises CheckpointError where the manifest could not be written."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def seal(folder: str) -> None:
    """`write`, with CheckpointError where it cannot be written."""
    try:
        write(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: no manifest could be written: {error}") from error


def later(path: Any, schema: int, known: int) -> str:
    """The message for a file of a later version."""
    return f"{path}: of schema {schema}, of a later version of pr2jax; this one reads {known}"


def _blake(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
