"""Where a run's wall time went, over all of its processes, to the last second.

WORKDIR/goodput.jsonl has a row for every stretch of time, [`began`, `time`] in unix seconds, with
the seconds of each activity in it, which sum to its length; a stretch begins where the one before
it ended, so the rows of a process leave nothing out. A row is written at every step's end and
where a long activity outside the steps ends. What lies between the last row of a process and the
start of the next is `wait`: a process that is killed loses what it did since its last row.

The activities, and what ml-goodput-measurement calls them:

  generate, verify, learn   productive (GoodputType.TOTAL)
  startup      TPU_INITIALIZATION and TRAINING_PREP: imports, devices, parameters, tokenizer
  compile      PROGRAM_STARTUP: tracing and compiling, or reading a compiled program
  data         DATA_LOADING_SYNC: the step waits for its data
  checkpoint   UNPRODUCTIVE_CHECKPOINT_SAVE_TIME and ..._RESTORE_TIME (the blocking part)
  redo         WASTED_PROGRESS_FROM_DISRUPTION: steps that an earlier process had done already
  wait         INFRASTRUCTURE_RECOVERY_FROM_DISRUPTION: no process ran, or what it did was lost
  evaluate     CUSTOM_BADPUT_EVENTS
  other        OTHER: reports, reading metrics, the end
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from pr2jax.core.metrics import RowWriter
from pr2jax.core.store import as_path

FILE = "goodput.jsonl"
PRODUCTIVE = ("generate", "verify", "learn")
ACTIVITIES = (
    *("generate", "verify", "learn", "data", "compile", "startup"),
    *("evaluate", "checkpoint", "redo", "wait", "other"),
)
# What a step is made of: in vain the first time where it is done again.
_OF_STEPS = (*PRODUCTIVE, "data")
_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_ROW_S = 1.0  # an activity outside the steps that takes longer is written down at its end


class Ledger:
    """The time of one process, from `began` (unix seconds) on; only its own thread is counted."""

    def __init__(
        self,
        workdir: str | os.PathLike,
        began: float | None = None,
        clock: Callable[[], float] | None = None,
    ):
        self.folder = as_path(workdir)
        offset = time.time() - time.monotonic()  # a clock that is set meanwhile changes nothing
        self._clock = clock or (lambda: offset + time.monotonic())
        earlier = read(self.folder)
        self._reached: dict[str, int] = {}
        for row in earlier:
            if "step" in row:
                stage = row["stage"]
                self._reached[stage] = max(row["step"], self._reached.get(stage, 0))
        self._process = 1 + max((row["process"] for row in earlier), default=0)
        last = max((row["time"] for row in earlier), default=0.0)
        self._row_began = max(last, self._clock() if began is None else began)
        self._mark = self._row_began
        self._seconds: dict[str, float] = {}
        self._compiled: list[tuple[float, float]] = []
        self._stack = ["startup"]
        self._thread = threading.get_ident()
        self._rows = RowWriter(self.folder / FILE)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        self._write()

    @property
    def doing(self) -> str:
        """What the innermost activity is now."""
        return self._stack[-1]

    @contextlib.contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """The time inside is of `activity`, unless another begins in it."""
        if threading.get_ident() != self._thread:
            yield
            return
        self._count()
        self._stack.append(activity)
        try:
            yield
        finally:
            self._count()
            self._stack.pop()
            long = self._mark - self._row_began >= _ROW_S
            if long and len(self._stack) == 1 and activity not in _OF_STEPS:
                self._write()

    def started(self) -> None:
        """Start-up is over: what is nothing else from here on is `other`."""
        if self._stack[0] == "startup":
            self._count()
            self._stack[0] = "other"
            self._write()

    def step(self, stage: str | os.PathLike, step: int) -> None:
        """Step number `step` of the stage in folder `stage` is done, with all that goes with it."""
        stage = os.path.relpath(stage, self.folder)
        again = step <= self._reached.get(stage, 0)
        self._write(stage=stage, step=step, **({"again": True} if again else {}))

    def close(self) -> None:
        """Writes down the rest."""
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        self._write()
        self._rows.close()

    def flush(self) -> None:
        """Writes a row of what is not in one yet."""
        self._write()

    def _count(self) -> float:
        now = self._clock()
        name = self._stack[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now
        return now

    def _write(self, **what: Any) -> None:
        now = self._count()
        self._rows.write(
            {
                "process": self._process,
                "began": self._row_began,
                "time": now,
                "seconds": {k: s for k, s in self._seconds.items() if s},
                **what,
            }
        )
        self._row_began, self._seconds, self._compiled = now, {}, []

    def _on_duration(self, event: str, duration: float, **_: Any) -> None:
        """Takes what JAX spent on compiling out of the activity that it happened in."""
        if event not in _COMPILING or threading.get_ident() != self._thread:
            return
        now = self._count()
        start = max(now - duration, self._row_began)
        # An event comes after those inside it: their time is counted already.
        inside = sum(b - a for a, b in self._compiled if a >= start)
        self._compiled = [(a, b) for a, b in self._compiled if a < start] + [(start, now)]
        name = self._stack[-1]
        moved = min(max(now - start - inside, 0.0), self._seconds[name])
        self._seconds[name] -= moved
        self._seconds["compile"] = self._seconds.get("compile", 0.0) + moved


_current: Ledger | None = None


@contextlib.contextmanager
def recording(workdir: str | os.PathLike) -> Iterator[None]:
    """The time of this process, from its very start, goes to WORKDIR/goodput.jsonl."""
    global _current
    _current = ledger = Ledger(workdir, began=process_start())
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what ended the run is to be told
            ledger.close()
        raise
    else:
        ledger.close()
    finally:
        _current = None


@contextlib.contextmanager
def during(activity: str) -> Iterator[None]:
    """`Ledger.during` of the run that is being recorded, if one is."""
    if activity not in ACTIVITIES:
        raise ValueError(f"activity: {activity!r} is none of {ACTIVITIES}")
    with contextlib.nullcontext() if _current is None else _current.during(activity):
        yield


def started() -> None:
    """`Ledger.started` of the run that is being recorded."""
    if _current is not None:
        _current.started()


def step_done(stage: str | os.PathLike, step: int) -> None:
    """`Ledger.step` of the run that is being recorded."""
    if _current is not None:
        _current.step(stage, step)


def doing() -> str:
    """The activity that is going on; "" where nothing is recorded."""
    return "" if _current is None else _current.doing


def so_far() -> dict[str, Any]:
    """`summarize` of the run that is being recorded, up to now; {} where none is."""
    if _current is None:
        return {}
    _current.flush()
    return summarize(read(_current.folder))


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a run's ledger; a torn last line is left out."""
    path = as_path(workdir) / FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of the time of a run.

    Returns {} without rows, else "seconds" (first start to last row), "activities" (seconds of
    each, which sum to that), "goodput" (share of the productive ones), "processes", "steps"
    (distinct ones done), "redone" (steps done again).
    """
    if not rows:
        return {}
    total = dict.fromkeys(ACTIVITIES, 0.0)
    last, steps, redone = rows[0]["began"], set(), 0
    for row in rows:
        total["wait"] += row["began"] - last
        last = row["time"]
        for name, seconds in row["seconds"].items():
            again = row.get("again") and name in _OF_STEPS
            total["redo" if again else name] += seconds
        redone += bool(row.get("again"))
        if "step" in row:
            steps.add((row["stage"], row["step"]))
    whole = last - rows[0]["began"]
    productive = sum(total[name] for name in PRODUCTIVE)
    return {
        "seconds": round(whole, 3),
        "activities": {name: round(seconds, 3) for name, seconds in total.items()},
        "goodput": round(productive / whole, 4) if whole else 0.0,
        "processes": len({row["process"] for row in rows}),
        "steps": len(steps),
        "redone": redone,
    }


def process_start() -> float:
    """When this process began, in unix seconds (now, where the system does not tell)."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up = float(Path("/proc/uptime").read_text().split()[0])
        age = up - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - max(age, 0.0)
