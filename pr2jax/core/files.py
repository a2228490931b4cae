"""Where files that can be made again are kept; files that are there whole or not at all; and how
one that cannot be written is told."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pr2jax.core.store import as_path, is_store, storing

_SPOOL_BYTES = 64 << 20


def user_cache(*names: str) -> Path:
    """The folder `names` of this project's part of the user's cache (XDG_CACHE_HOME, ~/.cache)."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base.joinpath("pr2jax", *names)


def check_writable(folder: str | os.PathLike) -> None:
    """Makes `folder` and a file in it, which is removed again. Raises StorageError."""
    # Of the form that `remove_leftovers` knows, should we be killed right here.
    name = f".probe-{secrets.token_hex(4)}.{os.getpid()}"
    if is_store(folder):
        with storing(folder):
            probe = as_path(folder) / name
            probe.write_bytes(b"\0" * 4096)
            probe.unlink()
        return
    probe = Path(folder) / name
    with storing(folder):
        probe.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(probe, "wb") as file:
                file.write(b"\0" * 4096)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A new file (bytes) that takes `path`'s name, all of it stored, where the block ends well.

    Whoever is killed on the way leaves `.NAME.PID` behind, except in a store: `remove_leftovers`.
    Raises StorageError naming `path` where it cannot be written.
    """
    if is_store(path):
        # An upload that is left in the middle of its block would end as if that were all.
        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as file:
            yield file
            file.seek(0)
            with storing(path), as_path(path).open("wb") as out:
                shutil.copyfileobj(file, out, 1 << 20)
        return
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with storing(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the name, too
            finally:
                os.close(folder)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike) -> list[str]:
    """Removes what `replacing` left in `folder` where it was killed; returns the names.

    Only in a run of one process: another host's process may be alive under any number.
    """
    import jax  # verifiers' processes read files, and go without it

    gone = []
    if is_store(folder) or jax.process_count() > 1 or not Path(folder).is_dir():
        return gone
    for path in Path(folder).glob(".*"):
        found = re.fullmatch(r"[.].+[.](\d+)", path.name)
        if found and path.is_file() and not _alive(int(found[1])):
            path.unlink(missing_ok=True)
            gone.append(path.name)
    return gone


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OverflowError, PermissionError):
        return True  # no process's number, so not our file; or another user's process
    return True
