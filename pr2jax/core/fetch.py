"""Inputs out of a store, copied to this machine: what reads them reads files."""

from __future__ import annotations

import fnmatch
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from pr2jax.core.files import replacing, user_cache
from pr2jax.core.store import StorageError, as_path, files_below, is_store

log = logging.getLogger("pr2jax")

_THREADS = 8


def fetched(path: str | os.PathLike) -> str:
    """A path of this machine: `path` itself, or the copy in the user's cache of what a store has
    under that address, an object, all objects below a folder, or those a glob stands for.

    What was copied before is copied again where its size or time has changed. Of a glob the result
    is one, too, with the copies alone in its place. Raises StorageError.
    """
    if not is_store(path):
        return os.fspath(path)
    base, pattern = _split(os.fspath(path))
    target = user_cache("stores", os.fspath(base).partition("://")[2])
    if not fetch_all(base, target, pattern):
        raise StorageError(f"{os.fspath(path)}: there is no such object")
    return os.fspath(target / pattern)


def fetch_all(base: epath.Path, target: Path, pattern: str = "") -> int:
    """Copies an object, or those below a folder (that `pattern` means), unless they are there
    already; how many there are. Raises StorageError."""
    try:
        found = _objects(base, pattern)
    except StorageError:
        raise
    except Exception as error:  # whatever the store's library raises
        raise StorageError(f"{base}: cannot be read: {error}") from error
    if pattern:
        found = {name: file for name, file in found.items() if _matches(name, pattern)}
    if target.is_dir():  # what was copied and is there no more
        for path in target.rglob("*"):
            name = path.relative_to(target).as_posix()
            gone = name not in found and (not pattern or _matches(name, pattern))
            if gone and path.is_file() and not path.name.startswith("."):
                path.unlink(missing_ok=True)
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = list(pool.map(lambda name: _fetch(found[name], target / name), found))
    if any(sizes):
        count = sum(size > 0 for size in sizes)
        log.info("%s: %d files, %.1f MB, copied to %s", base, count, sum(sizes) / 1e6, target)
    return len(found)


def _split(path: str) -> tuple[epath.Path, str]:
    """(what to list, glob below it); "" where there is none."""
    parts = path.rstrip("/").split("/")
    first = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts))
    return as_path("/".join(parts[:first])), "/".join(parts[first:])


def _objects(base: epath.Path, pattern: str) -> dict[str, epath.Path]:
    """{name below `base`: path}, as deep as the glob goes; of an object {"": path}."""
    if base.is_dir():
        endless = not pattern or "**" in pattern.split("/")
        return files_below(base, float("inf") if endless else pattern.count("/") + 1)
    return {"": base} if base.exists() else {}


def _matches(name: str, pattern: str) -> bool:
    """Whether the glob means it; `**` stands for any number of folders."""
    parts, wanted = name.split("/"), pattern.split("/")
    if not wanted:
        return not parts
    if wanted[0] == "**":
        rest = "/".join(wanted[1:])
        if not rest:
            return True
        return any(_matches("/".join(parts[i:]), rest) for i in range(len(parts)))
    if not fnmatch.fnmatchcase(parts[0], wanted[0]):
        return False
    if len(parts) == 1 or len(wanted) == 1:
        return len(parts) == len(wanted)
    return _matches("/".join(parts[1:]), "/".join(wanted[1:]))


def _fetch(source: epath.Path, target: Path) -> int:
    """Copies an object unless it is there already; bytes copied."""
    try:
        told = source.stat()
        if target.is_file():
            own = target.stat()
            if (own.st_size, int(own.st_mtime)) == (told.length, int(told.mtime)):
                return 0
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as file, source.open("rb") as stream:
            while chunk := stream.read(8 << 20):
                file.write(chunk)
    except StorageError:
        raise
    except Exception as error:
        raise StorageError(f"{source}: cannot be copied to {target}: {error}") from error
    os.utime(target, (told.mtime, told.mtime))
    return told.length
