"""A workdir in a store for what works with files in many places: a copy on this machine.

Jobs that append to files all over, lock them, or start processes of their own (studies, curation,
evaluation) run in a folder of the user's cache, always the same one for an address. It is made anew
out of the store at the start, and goes there once a minute and at the end: the store is what
counts, and a job whose machine vanishes goes on from its last minute.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
from pathlib import Path

from pr2jax.core.fetch import fetch_all
from pr2jax.core.files import user_cache
from pr2jax.core.store import StorageError, as_path, storing, upload, versions

log = logging.getLogger("pr2jax")

EVERY_S = 60.0


class Mirror:
    """A context: the local folder that stands for `address`. Raises StorageError."""

    def __init__(self, address: str | os.PathLike, every_s: float = EVERY_S):
        self.store = as_path(address)
        self.folder = user_cache("workdirs", os.fspath(self.store).partition("://")[2])
        self._every_s, self._done = every_s, threading.Event()
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def __enter__(self) -> Path:
        with storing(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock = open(f"{self.folder}.lock", "wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(
                f"{self.store}: another process here works in {self.folder}"
            ) from None
        shutil.rmtree(self.folder, ignore_errors=True)
        with storing(self.folder):
            self.folder.mkdir()
        fetch_all(self.store, self.folder)
        self._uploaded = versions(self.folder)
        log.info("%s: work goes on in %s, and from there to the store", self.store, self.folder)
        self._thread.start()
        return self.folder

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._done.set()
        self._thread.join()
        try:
            self.sync()
        except StorageError as error:
            if kind is None:
                raise
            log.error("%s", error)  # what ended the job is to be told, not what follows
        finally:
            self._lock.close()

    def _run(self) -> None:
        while not self._done.wait(self._every_s):
            try:
                self.sync()
            except StorageError as error:
                log.warning("%s; trying again in %.0f s", error, self._every_s)

    def sync(self) -> None:
        """Uploads what has changed, and removes what is gone. Raises StorageError."""
        now = versions(self.folder)
        if not self.folder.is_dir():  # somebody cleared the cache: that is no wish of the job
            raise StorageError(f"{self.folder}: is gone; {self.store} is left as it was")
        for name, version in now.items():
            if self._uploaded.get(name) != version:
                try:
                    upload(self.folder / name, self.store / name)
                except StorageError:
                    if (self.folder / name).exists():
                        raise
                    continue  # gone since we looked
                self._uploaded[name] = version
        for name in self._uploaded.keys() - now.keys():
            with storing(self.store / name):
                (self.store / name).unlink(missing_ok=True)
            del self._uploaded[name]
