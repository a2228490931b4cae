"""The processes of a run, one or one a host: started, watched, stopped, and what they leave."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

_ORPHAN_S = 30.0


def processes_below(pid: int) -> dict[int, str]:
    """{pid: start time} of all descendants of a process, from /proc."""
    parents, starts = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # gone since
            parents[int(entry.name)], starts[int(entry.name)] = int(fields[1]), fields[19]
    found, todo = {}, [pid]
    while todo:
        parent = todo.pop()
        for child in [c for c, p in parents.items() if p == parent and c not in found]:
            found[child] = starts[child]
            todo.append(child)
    return found


def _running(processes: dict[int, str]) -> list[int]:
    left = []
    for pid, start in processes.items():
        try:
            fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[19] == start and fields[0] != "Z":
            left.append(pid)
    return left


def wait_for_orphans(processes: dict[int, str], seconds: float = _ORPHAN_S) -> list[int]:
    """Those of `processes` that outlive their killed parent by `seconds`."""
    limit = time.monotonic() + seconds
    while (left := _running(processes)) and time.monotonic() < limit:
        time.sleep(0.05)
    return left


class Processes:
    """A run's processes: one, or `hosts` of them that find each other on a free local port.

    What they say goes to `log` by way of this process: a limit on the size of their files is not
    one on that.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, hosts: int = 1):
        joined: list[list[str]] = [[]]
        if hosts > 1:
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                address = f"--coordinator_address=localhost:{probe.getsockname()[1]}"
            count = f"--num_processes={hosts}"
            joined = [[address, count, f"--process_id={index}"] for index in range(hosts)]
        self.started = time.time()
        self._log, self._lock = open(log, "ab"), threading.Lock()  # noqa: SIM115 (closed by close)
        # A session each: a signal is for all of its group, and for no one else.
        self.all = [
            subprocess.Popen(
                [*command, *flags],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            for flags in joined
        ]
        self._readers = [
            threading.Thread(target=self._read, args=(process,), daemon=True)
            for process in self.all
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            with self._lock:
                if self._log.closed:  # an orphan that still talks
                    return
                self._log.write(line)
                self._log.flush()

    def codes(self) -> list[int | None]:
        """Exit codes; None of those that run."""
        return [process.poll() for process in self.all]

    def below(self) -> dict[int, str]:
        """All their descendants."""
        found: dict[int, str] = {}
        for process in self.all:
            found |= processes_below(process.pid)
        return found

    def send(self, number: int, index: int | None = None) -> None:
        """Sends a signal to the groups of all that run, or of one."""
        for i, process in enumerate(self.all):
            if process.poll() is None and index in (None, i):
                os.killpg(process.pid, number)

    def kill(self) -> None:
        """Ends what is left of them, by SIGKILL."""
        self.send(signal.SIGKILL)
        for process in self.all:
            process.wait()

    def forbid_writing(self) -> None:
        """From now on every write of theirs to a file fails, as on a full disk (EFBIG)."""
        for pid in (*(process.pid for process in self.all), *self.below()):
            try:
                _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
            except ProcessLookupError:
                continue

    def having(self, word: str) -> list[int]:
        """Descendants with a word of their command line."""
        found = []
        for pid in self.below():
            with contextlib.suppress(OSError):
                words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
                if word.encode() in words:
                    found.append(pid)
        return found

    def wait(self, seconds: float) -> bool:
        """Whether all have ended within `seconds`."""
        limit = time.monotonic() + seconds
        while None in self.codes() and time.monotonic() < limit:
            time.sleep(0.05)
        return None not in self.codes()

    def close(self) -> None:
        """Ends what is left, and has all they said in the log."""
        self.kill()
        for reader, process in zip(self._readers, self.all, strict=True):
            reader.join(timeout=10.0)
            if not reader.is_alive():
                process.stdout.close()
        with self._lock:
            self._log.close()
