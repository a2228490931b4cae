"""Where files that can be made again are kept, and how a file that cannot be written is told."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


class StorageError(OSError):
    """A file cannot be written: full, read-only, gone; names the path and the reason."""


def user_cache(*names: str) -> Path:
    """The folder `names` of this project's part of the user's cache (XDG_CACHE_HOME, ~/.cache)."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base.joinpath("pr2jax", *names)


@contextlib.contextmanager
def storing(path: str | os.PathLike) -> Iterator[None]:
    """What the block cannot write (OSError) is told as StorageError naming `path`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        raise StorageError(f"{os.fspath(path)}: cannot be written: {why}") from error


def check_writable(folder: str | os.PathLike) -> None:
    """Makes `folder` and a file in it, which is removed again.

    Raises StorageError where that fails, and for an address of a store ("gs://..."): a run appends
    to its files and renames them, which stores cannot.
    """
    if "://" in os.fspath(folder):
        raise StorageError(
            f"{os.fspath(folder)}: a workdir is a folder; mount the store (gcsfuse, a shared disk) "
            "and give the folder that it is mounted at"
        )
    # Of the form that `remove_leftovers` knows, should we be killed right here.
    probe = Path(folder) / f".probe-{secrets.token_hex(4)}.{os.getpid()}"
    with storing(folder):
        probe.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(probe, "wb") as file:
                file.write(b"\0" * 4096)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
