"""The faults: when each can be put to a run, how, and what the run must do then.

  kill   SIGKILL to all processes.
  hang   SIGSTOP; we, as a launcher would, see no sign of progress for `hang_s` and kill.
  torn   SIGKILL, then a random file of the latest checkpoint is cut short; an older one is there.
  flip   as torn, with one bit of the file flipped.
  disk   every write of the running processes fails: all must end by themselves, saying so.
  pool   SIGKILL to all verifier workers: the run goes on, or ends with the code for "again".
  peer   SIGKILL to one of several processes: the others must end by themselves within a minute.

After all but pool the run is started again with the same command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import time
from pathlib import Path

from pr2jax.chaos import progress
from pr2jax.chaos.processes import Processes, wait_for_orphans
from pr2jax.core import manifest

KINDS = ("kill", "hang", "torn", "flip", "disk", "pool", "peer")
EXIT_FAILED, EXIT_AGAIN = 2, 75  # pr2jax.main's: told as an error; saved, run it again
PEER_S = 60.0
_DISK_S = 180.0
WORKER = "pr2jax.tasks.worker"
UNSEALED = " (before its manifest)"
_TOLD = ("StorageError: ", "CheckpointError: ")


class NotSurvived(RuntimeError):
    """The run did not do what it must after a fault."""


class NotPut(Exception):
    """What the fault is for has ended since it was found to be possible."""


@dataclasses.dataclass
class Fault:
    """One fault: seconds after its process started, steps in the ledger, and amid what.

    `wait_s`: from the fault to the end of all processes; `detail`: the file that was damaged, the
    message, or the processes that were killed.
    """

    kind: str
    seconds: float
    steps: int
    amid: str
    orphans: int = 0
    wait_s: float = 0.0
    detail: str = ""


def schedule(count: int, kinds: tuple[str, ...], draw: random.Random) -> list[str]:
    """`count` kinds, as many of each as can be, in a random order."""
    found = [kinds[i % len(kinds)] for i in range(count)]
    draw.shuffle(found)
    return found


def possible(kind: str, workdir: Path, processes: Processes, stepping: bool) -> bool:
    """Whether the fault can be put to the run now; `stepping`: its processes are at their steps."""
    if kind in ("torn", "flip"):
        stages = progress.stages(workdir)
        return bool(stages) and len(progress.checkpoints(stages[-1])) >= 2
    if kind == "pool":
        return bool(processes.having(WORKER))
    return kind != "peer" or stepping  # until they have found each other they wait for minutes


def inject(
    fault: Fault, workdir: Path, processes: Processes, draw: random.Random, hang_s: float
) -> bool:
    """Puts the fault to the run and waits for what must follow; whether the processes ended.

    Raises NotSurvived where it does not follow, NotPut where the fault is no longer possible.
    """
    below, start = processes.below(), time.monotonic()
    if fault.kind == "pool":
        killed = 0
        for pid in processes.having(WORKER):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed += 1
        if not killed:
            raise NotPut("pool: the workers have ended since")
        fault.detail = f"{killed} workers"
        return False
    if fault.kind == "hang":
        processes.send(signal.SIGSTOP)
        wait_for_stall(workdir, processes, hang_s)
    elif fault.kind == "disk":
        _fill(fault, workdir, processes)
    elif fault.kind == "peer":
        _lose(fault, processes, draw)
    processes.kill()
    fault.wait_s = round(time.monotonic() - start, 3)
    if fault.kind in ("torn", "flip"):
        fault.detail = damage(workdir, fault.kind, draw)
    fault.orphans = len(wait_for_orphans(below))
    return True


def wait_for_stall(workdir: Path, processes: Processes, hang_s: float) -> bool:
    """Whether the run gave no sign of progress for `hang_s` (False: it ended meanwhile)."""
    seen, since = progress.signs(workdir), time.monotonic()
    while time.monotonic() - since < hang_s:
        if None not in processes.codes():
            return False
        time.sleep(0.1)
        now = progress.signs(workdir)
        if now != seen:
            seen, since = now, time.monotonic()
    return True


def damage(workdir: Path, kind: str, draw: random.Random) -> str:
    """Cuts or flips a random file of the latest checkpoint; the file's path, and UNSEALED where
    the step has no manifest yet: its arrays are held against their fingerprints then, and bytes
    that nothing refers to against nothing."""
    step = progress.checkpoints(progress.stages(workdir)[-1])[-1]
    files = sorted(p for p in step.rglob("*") if p.is_file() and p.stat().st_size)
    victim = draw.choice(files)
    content = bytearray(victim.read_bytes())
    at = draw.randrange(len(content))
    if kind == "torn":
        content = content[:at]
    else:
        content[at] ^= 1 << draw.randrange(8)
    victim.write_bytes(content)
    return str(victim) + ("" if (step / manifest.NAME).exists() else UNSEALED)


def _fill(fault: Fault, workdir: Path, processes: Processes) -> None:
    log = workdir / "chaos.log"
    told_before = log.stat().st_size
    processes.forbid_writing()
    if not processes.wait(_DISK_S):
        raise NotSurvived(f"disk: still running {_DISK_S:.0f} s after its disk was full")
    time.sleep(0.2)  # its last words are on the way to the log
    with open(log, "rb") as file:
        file.seek(told_before)
        said = file.read().decode(errors="replace").splitlines()
    codes = processes.codes()
    if set(codes) == {0}:
        fault.detail = "it had written everything already"
        return
    errors = [line for line in said if any(word in line for word in _TOLD)]
    if EXIT_FAILED not in codes or not errors:
        tail = "\n".join(said[-15:])
        raise NotSurvived(f"disk: exit codes {codes} without a clear error:\n{tail}")
    fault.detail = errors[-1][:300]


def _lose(fault: Fault, processes: Processes, draw: random.Random) -> None:
    victim = draw.randrange(len(processes.all))
    processes.send(signal.SIGKILL, victim)
    if not processes.wait(PEER_S):
        raise NotSurvived(f"peer: others run {PEER_S:.0f} s after process {victim} was killed")
    codes = processes.codes()
    others = [code for i, code in enumerate(codes) if i != victim]
    if any(others) and not all(others):
        raise NotSurvived(f"peer: exit codes {codes} after process {victim} was killed")
    through = "" if any(others) else ", the others were through"
    fault.detail = f"process {victim} killed, exit codes {codes}{through}"
