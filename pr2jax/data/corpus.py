"""The text that every machine with Python has: its standard library's sources and texts."""

from __future__ import annotations

import os
import sysconfig

from pr2jax.core.config import ConfigError

# Tests hold broken encodings and machine-made tables; the others are not of the library.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SUFFIXES = (".py", ".txt", ".rst")


def stdlib_folder() -> str:
    """Where the running interpreter's standard library is."""
    return sysconfig.get_path("stdlib")


def stdlib_files(folder: str | None = None) -> list[str]:
    """Sources (docstrings in them) and texts below `folder` (default: the standard library's).

    Sorted by path; tests, installed packages and files that are not UTF-8 are left out. Raises
    ConfigError("path: why") where there are none (some distributions ship only bytecode).
    """
    folder = stdlib_folder() if folder is None else folder
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [n for n in folders if n not in _LEFT_OUT and not n.startswith(".")]
        found += [os.path.join(here, n) for n in names if n.endswith(_SUFFIXES)]
    kept = sorted((p for p in found if _is_text(p)), key=lambda p: os.path.relpath(p, folder))
    if not kept:
        raise ConfigError(f"path: no sources of the standard library below {folder}")
    return kept


def _is_text(path: str) -> bool:
    with open(path, "rb") as file:
        try:
            file.read().decode("utf-8")
        except UnicodeDecodeError:
            return False
    return True
