"""Paths, of this machine or in a store ("gs://BUCKET/..."), by way of etils.epath.

A store has no folders, renames nothing and appends to nothing; an object is there, whole, once its
upload has ended. `Staged` stands between it and what can only write to files of this machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

SCHEMES = ("gs",)
_UPLOAD_S = 30.0


class StorageError(OSError):
    """A file cannot be written (full, read-only, gone), or a store's cannot be read; names the
    path and the reason."""


def is_store(path: str | os.PathLike) -> bool:
    """Whether it is an address in a store, "gs://..."."""
    return "://" in os.fspath(path)


def as_path(path: str | os.PathLike) -> epath.Path:
    """The path of either kind. Raises StorageError for a store that cannot be reached from here."""
    text = os.fspath(path)
    if is_store(text):
        scheme, _, rest = text.partition("://")
        if scheme not in SCHEMES or not rest.strip("/"):
            raise StorageError(f"{text}: not an address of a store that is known: gs://BUCKET/NAME")
        _prepare(text)
    return epath.Path(text)


@contextlib.contextmanager
def storing(path: str | os.PathLike) -> Iterator[None]:
    """What the block cannot write (OSError; in a store whatever its library raises) is told as
    StorageError naming `path`."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_store(path):
            raise
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError) and is_store(path):
            why = f"there is no such bucket ({why})"
        raise StorageError(f"{os.fspath(path)}: cannot be written: {why}") from error


def _prepare(address: str) -> None:
    """Has the package by which epath reaches the store, and sets it up, before its first use."""
    if importlib.util.find_spec("gcsfs") is None:
        raise StorageError(
            f'{address}: the package gcsfs is missing; install pr2jax with "[gcs]", or give a path '
            "of this machine"
        )
    import fsspec

    # Other processes write there, too: what was listed once says nothing about now.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    # It asks for each bucket's kind, which needs a right of its own, for what we do not use.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


def local(path: str | os.PathLike, what: str) -> Path:
    """The path as one of this machine. Raises StorageError for an address in a store: `what` only
    works with files."""
    if is_store(path):
        raise StorageError(f"{os.fspath(path)}: {what} needs a folder of this machine")
    return Path(path)


class Staged:
    """A folder for what can only write local files: `path` is `folder` itself or, where that is in
    a store, an empty local one; `sync` uploads those of its files that have changed. A context.

    Raises StorageError.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = as_path(folder)
        self._own = (
            tempfile.TemporaryDirectory(prefix="pr2jax-staged-") if is_store(folder) else None
        )
        self.path = Path(self._own.name if self._own else folder)
        with storing(folder):
            self.path.mkdir(parents=True, exist_ok=True)
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._synced = time.monotonic()

    def fetch(self, name: str) -> Path:
        """The path of the file `name`, which has by now what the folder had under that name."""
        path, source = self.path / name, self.folder / name
        with storing(source):
            if self._own is not None and source.exists():
                path.write_bytes(source.read_bytes())
        return path

    def sync(self) -> None:
        """Has all that was written in the folder."""
        if self._own is None:
            return
        for name, version in versions(self.path).items():
            if self._uploaded.get(name) != version:
                upload(self.path / name, self.folder / name)
                self._uploaded[name] = version
        self._synced = time.monotonic()

    def sync_now_and_then(self) -> None:
        """`sync`, where the last one is half a minute ago: somebody may be reading along."""
        if self._own is not None and time.monotonic() - self._synced > _UPLOAD_S:
            self.sync()

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """`sync`, and removes the local folder if it is not the folder itself."""
        try:
            self.sync()
        finally:
            if self._own is not None:
                self._own.cleanup()
                self._own = None


def files_below(
    folder: epath.Path, depth: float = float("inf"), prefix: str = ""
) -> dict[str, epath.Path]:
    """{relative name: path} of all files below `folder`, those `depth` levels down at most."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if depth > 1:
                found |= files_below(path, depth - 1, f"{prefix}{path.name}/")
        elif path.name:  # a store's own mark of a folder has none
            found[prefix + path.name] = path
    return found


def versions(folder: Path) -> dict[str, tuple[int, int]]:
    """{relative name: (bytes, time)} of all files below a folder of this machine but those that
    have no name of their own yet."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(p.startswith(".") or "orbax-checkpoint-tmp" in p for p in name.parts):
            continue
        with contextlib.suppress(FileNotFoundError):  # gone since
            if path.is_file():
                state = path.stat()
                found[name.as_posix()] = (state.st_size, state.st_mtime_ns)
    return found


def kvstore(path: str | os.PathLike) -> dict[str, str]:
    """The folder `path` as TensorStore names it."""
    where = as_path(path)
    if is_store(path):
        bucket, _, name = os.fspath(where).removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": name + "/"}
    return {"driver": "file", "path": os.path.abspath(where) + "/"}


def upload(source: Path, target: epath.Path) -> None:
    """Copies a file of this machine to `target`, over what is there. Raises StorageError."""
    with storing(target), open(source, "rb") as file, target.open("wb") as out:
        shutil.copyfileobj(file, out, 1 << 20)
