"""One side of a benchmark as a process: told over stdin when to work, answers on stdout.

  python -m pr2jax.benchmark.serve pr2jax.benchmark.jobs.train    (ours)
  PEER_PYTHON -I .../serve.py .../peers/transformers_train.py     (a peer)

It knows only the standard library, since peers run it where pr2jax is not. A message is a line of
JSON. The first one is handed to the job's `serve(channel, params)`; the job prepares itself,
answers, and then measures a round for each further message, until stdin closes. So a side that is
not being measured waits in a read and uses no CPU. What a job or a library prints goes to stderr.
An exception is answered as {"error": "Type: message"} and ends the process.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


class Channel:
    """The lines that come in and the lines that go out."""

    def __init__(self, read: TextIO, write: TextIO):
        self._read, self._write = read, write

    def next(self) -> dict[str, Any] | None:
        """The next message; None once there will be none."""
        line = self._read.readline()
        return json.loads(line) if line else None

    def reply(self, message: dict[str, Any]) -> None:
        """Answers the message read last, with the peak memory since the answer before."""
        self._write.write(json.dumps({"peak_rss_bytes": peak_rss()} | message) + "\n")
        self._write.flush()
        reset_peak_rss()

    def loop(self, ready: dict[str, Any], measure: Callable[[dict[str, Any]], Any]) -> None:
        """Answers `ready`, then `measure(message)` to every message."""
        self.reply(ready)
        while (message := self.next()) is not None:
            self.reply(measure(message))


def peak_rss() -> int:
    """Most bytes that this process has had in memory (ru_maxrss would count its parent's too)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_rss() -> None:
    """From now on `peak_rss` counts anew, where the system can do that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _load(job: str) -> Any:
    if not job.endswith(".py"):
        return importlib.import_module(job)
    path = Path(job)
    sys.path.append(str(path.parent))  # a peer's job may use files beside it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(job: str) -> int:
    """Serves `job`, a module's name or a file; the exit status."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # stdout is for answers alone
    channel = Channel(sys.stdin, out)
    try:
        params = channel.next()
        if params is not None:
            _load(job).serve(channel, params)
    except Exception as error:
        traceback.print_exc()
        channel.reply({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stderr.flush()
    # Threads of a library must not keep a side alive that has nothing more to do.
    os._exit(code)
