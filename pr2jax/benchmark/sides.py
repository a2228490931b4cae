"""The two sides of a benchmark: starting them, telling them when to work, never both at once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pr2jax.benchmark import serve

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).resolve().parent / "peers"
LIMIT_S = 3600.0
_KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")


class BenchmarkError(RuntimeError):
    """A benchmark that cannot be run, or whose two sides do not compute the same."""


class Side:
    """A process that serves one job. Close it, or use it as a context.

    Attributes:
      name: what the table calls it.
    """

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str]):
        """Raises BenchmarkError where the interpreter cannot be started."""
        self.name = name
        # Open for as long as the side is.
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._buffer = b""
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=dict(env),
            )
        except OSError as error:
            self._log.close()
            raise BenchmarkError(f"{name}: cannot start {command[0]}: {error.strerror}") from None

    def ask(self, message: Mapping[str, Any], limit_s: float = LIMIT_S) -> dict[str, Any]:
        """Sends a message and waits for its answer.

        Raises BenchmarkError with the side's own message where it failed, ended or took longer
        than `limit_s`.
        """
        with contextlib.suppress(OSError):  # a side that is gone has left its reason to be read
            self._process.stdin.write(json.dumps(dict(message)).encode() + b"\n")
            self._process.stdin.flush()
        line = self._line(time.monotonic() + limit_s, limit_s)
        if line is None:
            code = self._process.wait()
            raise BenchmarkError(f"{self.name}: ended with status {code}: {self._last_lines()}")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(f"{self.name}: {answer['error']}")
        return answer

    def _line(self, deadline: float, limit_s: float) -> bytes | None:
        """One line of the side's answers; None where they end."""
        pipe = self._process.stdout
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([pipe], [], [], max(deadline - time.monotonic(), 0.0))
            if not ready:
                raise BenchmarkError(f"{self.name}: no answer within {limit_s:.0f} s")
            data = os.read(pipe.fileno(), 1 << 16)
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _last_lines(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return " | ".join(lines[-3:])[-600:] or "it wrote nothing"

    def close(self) -> None:
        """Ends the process: by closing its stdin, and by force where that is not enough."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def our_side(name: str, job: str) -> Side:
    """Ours, running pr2jax.benchmark.jobs.JOB in this interpreter's environment."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [
        sys.executable,
        *("-m", "pr2jax.benchmark.serve", f"pr2jax.benchmark.jobs.{job}"),
    ]
    return Side(name, command, os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"})


def peer_side(name: str, python: Path, job: str) -> Side:
    """A peer, running peers/JOB.py in an environment of its own."""
    kept = {key: os.environ[key] for key in _KEPT if key in os.environ}
    offline = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [str(python), "-I", serve.__file__, str(PEERS / f"{job}.py")]
    return Side(name, command, kept | offline)


def find_peer_python(named: str | None) -> Path:
    """The interpreter with the peers: --peer_python, else PR2JAX_REFERENCE_PYTHON.

    Raises BenchmarkError where neither names one, or it is not there.
    """
    value = named or os.environ.get("PR2JAX_REFERENCE_PYTHON")
    source = "--peer_python" if named else "PR2JAX_REFERENCE_PYTHON"
    if not value:
        raise BenchmarkError(
            "--peer needs a Python that has it: set PR2JAX_REFERENCE_PYTHON, or --peer_python=FILE"
        )
    path = Path(value).expanduser()
    if not path.is_file() or not os.access(path, os.X_OK):
        raise BenchmarkError(f"{source}: {value} is not an interpreter that can be run")
    return path


def checkpoint(python: Path, model: Mapping[str, Any], folder: Path) -> Path:
    """The random checkpoint of `model` (a Hugging Face configuration), made once by a peer.

    The folder's name is that of its configuration; it appears whole or not at all.
    """
    name = hashlib.sha256(json.dumps(dict(model), sort_keys=True).encode()).hexdigest()[:12]
    target = folder / f"{model['model_type']}-{name}"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / "checkpoint"
        with peer_side("checkpoint", python, "random_checkpoint") as side:
            side.ask({"model": dict(model), "folder": str(made)})
        with contextlib.suppress(OSError):  # another run may have made it meanwhile
            os.replace(made, target)
    if not target.is_dir():
        raise BenchmarkError(f"{target}: the random checkpoint could not be put there")
    return target


def interleave(sides: Sequence[Side], rounds: int) -> list[list[dict[str, Any]]]:
    """`rounds` rounds, in each every side once and in turn; the answers of each side.

    Every other round goes backwards, so that no side always follows the same one.
    """
    answers: list[list[dict[str, Any]]] = [[] for _ in sides]
    for round_index in range(rounds):
        order = list(range(len(sides)))
        if round_index % 2:
            order.reverse()
        for i in order:
            answers[i].append(sides[i].ask({"round": round_index}))
    return answers
