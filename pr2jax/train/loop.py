"""The one loop that every trainer runs in: resume, step, evaluate, log, save, stop.

A run's position is one number, the steps it has done: batches and random keys are functions of
it and of what the trainer remembers. Order of a resume: state, position and memory of the latest
checkpoint that is whole are restored (a damaged one is set aside) and the next step is the one
after it; rows of steps after it are dropped from metrics.jsonl and ledger.jsonl, since they come
again; batches of steps after it that are in the journal are learned from as they are.

So a run that is killed at any moment and started again ends in the state of one that never was,
where its programs repeat to the bit (as on CPU) and nothing in it goes by the clock (a verifier's
time limit that was reached; a stage of so many seconds).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import signal
import threading
import time
from typing import Any, Literal, Protocol, runtime_checkable

import jax
from etils import epath
from jax.experimental import multihost_utils

from pr2jax.core import goodput, hosts
from pr2jax.core.checkpoint import Checkpointer
from pr2jax.core.device import CompilationCounter, profile
from pr2jax.core.files import remove_leftovers
from pr2jax.core.metrics import MetricWriter, Progress, RowWriter, reduce
from pr2jax.core.state import TrainState
from pr2jax.core.store import as_path
from pr2jax.core.watchdog import Watchdog
from pr2jax.train.config import LoopConfig

log = logging.getLogger("pr2jax")

CHECKPOINTS = "checkpoints"
LEDGER = "ledger.jsonl"


class Interrupted(Exception):
    """The run was asked to stop, and has saved; the same command resumes it."""


class TrainingDiverged(RuntimeError):
    """Too many non-finite steps in a row."""


class Trainer(Protocol):
    """What a trainer gives the loop."""

    name: str
    steps: int
    eval_every: int
    max_skipped_in_row: int
    console: tuple[str, ...]

    def step(self, state: TrainState, index: int) -> tuple[TrainState, dict[str, Any]]:
        """One step from position `index`; metrics are (sum, weight) pairs."""
        ...

    def evaluate(self, state: TrainState, index: int) -> dict[str, float]:
        """Held-out figures at position `index`; empty where there are none."""
        ...

    def memory(self) -> dict[str, Any]:
        """What later steps depend on besides state and position, as JSON."""
        ...

    def remember(self, memory: dict[str, Any]) -> None:
        """Takes back what `memory` gave."""
        ...


@runtime_checkable
class Accountable(Protocol):
    """A trainer that says what it learned from: a row of ledger.jsonl a step,
    {"step": n, "items": [...]}."""

    def consumed(self, index: int) -> list:
        """Ids, as JSON, of the items of the step just done, from position `index`."""
        ...


@runtime_checkable
class Filtering(Protocol):
    """A trainer that also passes items over: "filtered" in their step's row."""

    def filtered(self, index: int) -> list:
        """Ids of those items."""
        ...


@runtime_checkable
class Journalling(Protocol):
    """A trainer whose batches cost much: it keeps them on disk until they are learned from."""

    def open_journal(self, workdir: epath.Path) -> None:
        """Keeps them in a folder of `workdir` from here on, and takes what is there."""
        ...

    def trim_journal(self, position: int) -> None:
        """Batches before `position` are not needed any more."""
        ...


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: `seconds` of stepping (over all resumes), `steps` done in all."""

    state: TrainState
    steps: int
    seconds: float
    compile: dict[str, float]


class StopRequest:
    """SIGINT and SIGTERM set `requested`; a second SIGINT raises KeyboardInterrupt at once.

    Of several hosts whichever is told first stops all of them, after the same step (`poll`).
    """

    # Calls of `poll`, over all stages: what the hosts agree on is one of them.
    _polls = itertools.count(1)

    def __init__(self) -> None:
        self.requested = False
        self._asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # JAX itself listens for SIGTERM where there are several processes.
        numbers = (signal.SIGINT,) if hosts.several() else (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                self._old[number] = signal.signal(number, self._on_signal)
        return self

    def poll(self) -> bool:
        """Whether to stop after this step: the same answer on all hosts."""
        if hosts.several() and not self.requested:
            self.requested = multihost_utils.reached_preemption_sync_point(next(self._polls))
            if self.requested:
                log.warning("a host was told to stop: stopping after this step")
        return self.requested

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        log.warning("stopping after this step (again to stop at once)")
        if hosts.several():
            os.kill(os.getpid(), signal.SIGTERM)  # the others are to hear of it
        else:
            self.requested = True


def _differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name}: {a!r} -> {b!r}")
    return found


class _Run:
    """The moving parts of one `run`."""

    def __init__(self, trainer, state, workdir, options, config, best, compilations, start):
        self.trainer, self.state, self.options, self.config = trainer, state, options, config
        self.checkpoints = Checkpointer(workdir / CHECKPOINTS, keep=options.keep, **best)
        self.index, self.seconds = start, 0.0
        remove_leftovers(workdir)
        # Without a checkpoint the row of the start is written again, too.
        kept = self.index if self._restore() else start - 1
        self.writer = MetricWriter(workdir, tensorboard=options.tensorboard, resume_step=kept)
        self.ledger = None
        if isinstance(trainer, Accountable):
            self.ledger = RowWriter(workdir / LEDGER, resume_step=kept)
        self.journal = options.journal and isinstance(trainer, Journalling)
        if self.journal:
            trainer.open_journal(workdir)
        self.compilations = compilations
        self.pending: list[tuple[int, dict[str, Any]]] = []
        self.last_eval: dict[str, float] = {}
        self.last_eval_index = -1
        self.in_steps = True

    def _restore(self) -> bool:
        """Takes the latest checkpoint that is whole, if there is any checkpoint."""
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state
        )
        with goodput.during("checkpoint"):
            found = self.checkpoints.restore_whole(abstract)
        if found is None:
            return False
        _, self.state, extra = found
        self.index, self.seconds = int(extra["position"]), float(extra["seconds"])
        self.trainer.remember(extra["memory"])
        log.info("%s: resumed at step %d of %d", self.trainer.name, self.index, self.trainer.steps)
        for line in _differences(extra["config"], self.config):
            log.warning("configuration differs from the checkpoint's: %s", line)
        return True

    def save(self, metrics: dict[str, float] | None = None) -> None:
        extra = {
            "config": self.config,
            "position": self.index,
            "seconds": self.seconds,
            "memory": self.trainer.memory(),
        }
        # Rows up to here are never written again.
        self.writer.sync()
        if self.ledger is not None:
            self.ledger.sync()
        with goodput.during("checkpoint"):
            done = self.checkpoints.steps()[-self.options.keep :] if self.journal else []
            self.checkpoints.save(self.index, self.state, extra, metrics)
        if done:
            self.trainer.trim_journal(done[0])

    def account(self, index: int) -> None:
        """Writes down what the step from position `index` learned from."""
        if self.ledger is None:
            return
        row = {"step": index + 1, "items": self.trainer.consumed(index)}
        if isinstance(self.trainer, Filtering):
            row["filtered"] = self.trainer.filtered(index)
        self.ledger.write(row)

    def close(self) -> None:
        """Closes what it writes to, each whatever becomes of the others."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.checkpoints.close)
            if self.ledger is not None:
                stack.callback(self.ledger.close)
            stack.callback(self.writer.close)

    def evaluate(self) -> dict[str, float]:
        if self.last_eval_index != self.index:
            with goodput.during("evaluate"):
                self.last_eval = self.trainer.evaluate(self.state, self.index)
            self.last_eval_index = self.index
        return self.last_eval

    def flush(self, progress: Progress | None) -> None:
        """Reads pending metrics from the device, one row a step; stops a run that diverged."""
        for index, metrics in self.pending:
            row = reduce(metrics)
            row["compilations"] = self.compilations.compilations
            if index == self.index == self.last_eval_index:
                row |= self.last_eval
            self.writer.write(index, row)
            if progress is not None:
                shown = {k: row[k] for k in self.trainer.console if k in row}
                progress.update(index if self.in_steps else int(self.seconds), shown)
        self.pending.clear()
        in_row = int(self.state.skipped_in_row)
        if in_row >= self.trainer.max_skipped_in_row:
            self.save()
            self.checkpoints.wait()
            raise TrainingDiverged(
                f"{self.trainer.name}: {in_row} steps in a row had a non-finite loss or gradient "
                f"at step {self.index}; the state before them is saved. Lower the learning rate."
            )


def run(
    trainer: Trainer,
    state: TrainState,
    *,
    workdir: str | os.PathLike,
    options: LoopConfig,
    config: dict[str, Any],
    best_metric: str | None = None,
    best_mode: Literal["max", "min"] = "max",
    max_seconds: float | None = None,
    profile_steps: int = 0,
    start: int = 0,
) -> Outcome:
    """Runs `trainer` from its latest checkpoint in `workdir` (else from `state`) to its end.

    Args:
      state: the initial state; also gives shapes and shardings to a restored one.
      config: the resolved configuration, saved with every checkpoint.
      best_metric: held-out figure whose best checkpoint (its `best_mode`) is kept.
      max_seconds: stop after this much wall time of stepping, if that comes before the last step.
      start: position of `state`, for a run that goes on from another.
      profile_steps: trace that many steps (after two) into `workdir`/profile.

    Raises:
      Interrupted: after SIGINT or SIGTERM; the step was finished and saved.
      TrainingDiverged: too many non-finite steps in a row.
      StorageError: a file in the workdir cannot be written.
      CheckpointError: no checkpoint is whole, or it is of another model, or cannot be saved.
    """
    workdir = as_path(workdir)
    with CompilationCounter() as compilations, StopRequest() as stop:
        best = {"best_metric": best_metric, "best_mode": best_mode}
        work = _Run(trainer, state, workdir, options, config, best, compilations, start)
        del state
        try:
            with Watchdog(workdir, options.watchdog_factor, options.watchdog_min_s) as dog:
                _loop(work, stop, dog, max_seconds, profile_steps, workdir)
        except BaseException:
            try:
                work.close()
            except Exception as error:  # what ended the run is to be told, not what follows
                log.warning("%s: while closing: %s", trainer.name, error)
            raise
        work.close()
        if stop.requested:  # also after the last step: no next stage is begun
            raise Interrupted(
                f"{trainer.name}: stopped at step {work.index} of {trainer.steps} and saved in "
                f"{work.checkpoints.directory}; the same command resumes"
            )
        compiled = compilations.snapshot()
        log.info(
            "%s: %d steps in %.0f s; %d programs compiled, %d more out of the cache",
            *(trainer.name, work.index, work.seconds),
            *(compiled["compilations"], compiled["cache_hits"]),
        )
        return Outcome(work.state, work.index, work.seconds, compiled)


def _loop(
    work: _Run,
    stop: StopRequest,
    dog: Watchdog,
    max_seconds: float | None,
    profile_steps: int,
    workdir: epath.Path,
) -> None:
    trainer, options = work.trainer, work.options
    limit = float("inf") if max_seconds is None else max_seconds
    if work.index == 0 and trainer.eval_every:
        work.writer.write(0, work.evaluate())
    trace_from = work.index + 2
    if profile_steps and trace_from >= trainer.steps:
        log.warning("no step is left to trace: the two after a start are never traced")
    if max_seconds is None:
        progress = Progress(trainer.name, trainer.steps, start=work.index)
    else:
        work.in_steps = False
        label = f"{trainer.name} (seconds)"
        progress = Progress(label, int(max_seconds), start=int(work.seconds))
    trace = contextlib.ExitStack()
    goodput.started()
    while work.index < trainer.steps and work.seconds < limit and not stop.requested:
        if profile_steps and work.index == trace_from:
            trace.enter_context(profile(workdir / "profile"))
            log.info("tracing %d steps into %s", profile_steps, workdir / "profile")
        start = time.monotonic()
        dog.begin(work.index + 1)
        with goodput.during("learn"):
            work.state, metrics = trainer.step(work.state, work.index)
        work.account(work.index)
        work.index += 1
        last = work.index == trainer.steps
        stop.poll()
        if len(work.pending) + 1 >= options.log_every or last or stop.requested:
            with goodput.during("learn"):
                jax.block_until_ready(work.state.step)
        dog.end()
        goodput.step_done(workdir, work.index)
        work.seconds += time.monotonic() - start
        if max_seconds is not None:
            work.seconds = hosts.from_first(work.seconds)  # one clock decides
        work.pending.append((work.index, metrics))
        if work.index == trace_from + profile_steps:
            trace.close()
        figures = None
        if trainer.eval_every and (work.index % trainer.eval_every == 0 or last):
            figures = work.evaluate()
        due = options.checkpoint_every and work.index % options.checkpoint_every == 0
        if len(work.pending) >= options.log_every or figures is not None or due:
            work.flush(progress)
        if due or figures:
            work.save(figures)
    trace.close()
    if work.pending:
        work.flush(progress)
    work.save(work.last_eval if work.last_eval_index == work.index else None)
    progress.close()
