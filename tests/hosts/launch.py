"""Starts `pr2jax.main` as one or several processes on this machine, four devices in all."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests import xla

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 4


def start(processes: int, workdir: Path, *flags: str) -> list[subprocess.Popen]:
    """The processes; what process I says goes to WORKDIR.I.log."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    each = xla.flags(DEVICES // processes)
    environment = {**os.environ, "XLA_FLAGS": each, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pr2jax.main", f"--workdir={workdir}", *flags]
    found = []
    for index in range(processes):
        joined = [
            f"--coordinator_address=localhost:{port}",
            f"--num_processes={processes}",
            f"--process_id={index}",
        ]
        with open(log(workdir, index), "wb") as out:
            found.append(
                subprocess.Popen(
                    [*command, *(joined if processes > 1 else ())],
                    cwd=ROOT,
                    env=environment,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
    return found


def log(workdir: Path, index: int) -> Path:
    """What process `index` said."""
    return workdir.with_name(f"{workdir.name}.{index}.log")


def run(processes: int, workdir: Path, *flags: str, timeout: float = 900.0) -> None:
    """Runs to the end. Raises AssertionError with the log of a process that failed."""
    started = start(processes, workdir, *flags)
    try:
        codes = [process.wait(timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    for index, code in enumerate(codes):
        assert code == 0, (index, code, log(workdir, index).read_text()[-6000:])


def python(module: str, processes: int, what: str) -> list[subprocess.Popen]:
    """`python -m MODULE WHAT INDEX COUNT PORT` for every index; standard output is a pipe."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    each = xla.flags(DEVICES // processes)
    environment = {**os.environ, "XLA_FLAGS": each, "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, what, str(index), str(processes), str(port)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for index in range(processes)
    ]


def call(module: str, processes: int, what: str) -> list[str]:
    """The line of JSON that each process says, which must end well."""
    started = python(module, processes, what)
    try:
        said = [process.communicate(timeout=120)[0].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, said
    return [next(t for t in text.splitlines() if t.startswith("{")) for text in said]


def ready(process: subprocess.Popen) -> None:
    """Returns when it has said so (transports print lines of their own)."""
    for line in process.stdout:
        if line.strip().endswith(b"ready"):
            return
    raise AssertionError(f"ended with {process.wait()}")
