"""One workdir under a schedule of faults, and the run that is left alone."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from pathlib import Path

from pr2jax.chaos import faults, progress
from pr2jax.chaos.faults import Fault
from pr2jax.chaos.processes import Processes
from pr2jax.core import goodput

_IDLE = 5  # trials in a row that are through without a fault


@dataclasses.dataclass
class Start:
    """One start of a trial: after which fault, seconds to its first step, steps done, and how
    many of them again."""

    after: str
    restart_s: float | None
    steps: int
    redone: int


@dataclasses.dataclass(frozen=True)
class Whole:
    """The run that was left alone: its steps, its seconds in all and to the first step."""

    steps: int
    seconds: float
    start_up: float

    @property
    def pace(self) -> float:
        """Seconds a step; what comes after the steps counts as theirs."""
        return (self.seconds - self.start_up) / max(self.steps, 1)


class Schedule:
    """Which faults are to come, and when: moments are uniform over a window from a process's start
    to twice the run's remaining time over the remaining faults after start-up; a window in which a
    process saves nothing new grows until it does."""

    def __init__(self, kinds: list[str], draw: random.Random, whole: Whole):
        self.kinds, self._draw, self._whole = list(kinds), draw, whole
        self.start_up, self.pace = whole.start_up, whole.pace
        self._saved, self._stretch = -1, 1.0

    def begin(self) -> None:
        """A new trial begins."""
        self._saved, self._stretch = -1, 1.0

    def moment(self, workdir: Path, started: bool = False) -> float | None:
        """Seconds from now, as a process starts (or goes on), to the next fault, if one is left."""
        if not self.kinds:
            return None
        total = self._whole.steps
        left = self.pace * max(total - progress.steps(workdir), 0.05 * total)
        window = 2.0 * left / (len(self.kinds) + 1) + (0.0 if started else self.start_up)
        return self._draw.uniform(0.0, self._stretch * window)

    def learn(self, workdir: Path, first_step: float | None, pace: float | None) -> None:
        """What a process that ended told of the run's speed, and of its progress."""
        # Programs come out of the cache by now, and the machine may be less busy.
        self.start_up = first_step or self.start_up
        self.pace = min(self.pace, pace or self.pace)
        now = progress.saved(workdir)
        self._stretch = 1.0 if now > self._saved else min(self._stretch * 1.15, 8.0)
        self._saved = max(self._saved, now)


@dataclasses.dataclass(frozen=True)
class Options:
    """How a trial is run. hosts: processes; hang_s: seconds without a sign of progress after which
    a launcher takes a run for hung; patience: the same before we take it for hung by itself."""

    hosts: int = 1
    hang_s: float = 30.0
    patience: float | None = None


class Trial:
    """One workdir and the processes that ran in it."""

    def __init__(
        self,
        command: list[str],
        workdir: Path,
        environment: dict[str, str],
        options: Options = Options(),
        victims: random.Random | None = None,
    ):
        self.command = [*command, f"--workdir={workdir}"]
        self.workdir, self.environment, self.options = workdir, environment, options
        self._victims = victims or random.Random(0)
        self.faults: list[Fault] = []
        self.starts: list[Start] = []
        self.failed = ""
        self._after = ""
        # Of the process that ran last: seconds to its first step, and a step after that.
        self.first_step: float | None = None
        self.pace: float | None = None

    def run(self, schedule: Schedule | None = None, steps: int = 0) -> bool:
        """Starts the run, which gets the faults of `schedule` until one ends it or it is through
        (`steps` are done); whether it is.

        Raises RuntimeError where it ends badly by itself, or hangs, or does not survive a fault.
        """
        self.workdir.mkdir(parents=True, exist_ok=True)
        known = len(goodput.read(self.workdir))
        log = self.workdir / "chaos.log"
        processes = Processes(self.command, self.environment, log, self.options.hosts)
        try:
            ended = self._watch(processes, schedule, steps)
        finally:
            processes.close()
            self._note(processes.started, known)
        if ended:
            self._after = self.faults[-1].kind
            return False
        codes = processes.codes()
        if any(codes):
            lost = self.faults and self.faults[-1].kind == "pool"
            if lost and set(codes) <= {0, faults.EXIT_AGAIN}:
                self._after = "pool"
                return False
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            code = next(code for code in codes if code)
            raise RuntimeError(f"{' '.join(self.command)}: exit code {code}\n{tail}")
        return True

    def _watch(self, processes: Processes, schedule: Schedule | None, steps: int) -> bool:
        """Whether a fault ended the processes; False where they ended by themselves."""
        before, self.first_step, self.pace = progress.steps(self.workdir), None, None
        start = since = time.monotonic()
        moment = schedule.moment(self.workdir) if schedule else None
        first, last = before, ()
        while None in processes.codes():
            passed, now = time.monotonic() - start, progress.steps(self.workdir)
            if self.first_step is None and now > before:
                self.first_step, first = passed, now
            elif self.first_step is not None and now > first:
                self.pace = (passed - self.first_step) / (now - first)
            due = moment is not None and passed >= moment
            ready = (self.workdir, processes, now != before)
            if due and faults.possible(schedule.kinds[0], *ready):
                if self._inject(processes, schedule, passed, before, steps):
                    return True
                moment = schedule.moment(self.workdir, started=True)  # it goes on
                moment = moment and time.monotonic() - start + moment
            if (signs := progress.signs(self.workdir)) != last:
                last, since = signs, time.monotonic()
            elif time.monotonic() - since > (self.options.patience or float("inf")):
                raise RuntimeError(f"{self.workdir}: hung for {self.options.patience:.0f} s")
            left = 0.05 if moment is None else min(0.05, moment - (time.monotonic() - start))
            time.sleep(left if left > 0 else 0.0 if not due else 0.02)
            if any(code not in (0, None) for code in processes.codes()):
                processes.wait(faults.PEER_S)
        return False

    def _inject(self, processes: Processes, schedule: Schedule, passed, before: int, steps: int):
        """Whether the fault ended the processes."""
        kind = schedule.kinds.pop(0)
        fault = Fault(kind, round(passed, 3), 0, "")
        self.faults.append(fault)
        look = lambda: (progress.amid(self.workdir, before, steps), progress.steps(self.workdir))
        goes_on = kind in ("disk", "pool")
        if goes_on:
            fault.amid, fault.steps = look()
        options = (self._victims, self.options.hang_s)
        try:
            ended = faults.inject(fault, self.workdir, processes, *options)
        except faults.NotPut:
            self.faults.pop()
            schedule.kinds.insert(0, kind)
            return False
        if not goes_on:  # the files tell what it was about when it was stopped
            fault.amid, fault.steps = look()
        return ended

    def _note(self, started: float, known: int) -> None:
        """What the ledger of time says of the process that ended."""
        rows = [row for row in goodput.read(self.workdir)[known:] if "step" in row]
        first = round(rows[0]["time"] - started, 3) if rows else None
        again = sum(bool(row.get("again")) for row in rows)
        self.starts.append(Start(self._after, first, len(rows), again))


def torment(
    command: list[str],
    workdir: Path,
    kinds: list[str],
    draw: random.Random,
    environment: dict[str, str],
    say: Callable[[str], None] = print,
    *,
    options: Options = Options(),
    victims: random.Random | None = None,
) -> tuple[Whole, list[Trial]]:
    """Runs the command in WORKDIR/whole and left alone, then in WORKDIR/killed_N with a fault of
    each of `kinds` in order. `draw` gives moments, `victims` (of its own) files and processes.

    A trial that does not survive says so in its `failed`; the next one takes the rest.
    Raises RuntimeError where the run that is left alone fails.
    """
    trial = Trial(command, workdir / "whole", environment, options)
    start = time.monotonic()
    trial.run()
    total = time.monotonic() - start
    whole = Whole(progress.steps(trial.workdir), total, trial.first_step or total)
    say(f"left alone: {whole.steps} steps in {total:.0f} s, the first after {whole.start_up:.1f} s")
    patience = options.patience or 4.0 * whole.start_up + options.hang_s + 60.0
    options = dataclasses.replace(options, patience=patience)
    schedule, trials, idle = Schedule(kinds, draw, whole), [], 0
    while schedule.kinds:
        number = len(trials) + 1
        trial = Trial(command, workdir / f"killed_{number}", environment, options, victims)
        trials.append(trial)
        schedule.begin()
        try:
            _go_on(trial, schedule, whole.steps, number, say)
            idle = 0 if trial.faults else idle + 1
            if idle == _IDLE:
                kind = schedule.kinds[0]
                raise RuntimeError(f"{kind}: {idle} runs never came to where it is possible")
        except RuntimeError as error:
            trial.failed = str(error)
            say(f"trial {number}: NOT SURVIVED: {error}")
            if not trial.faults:
                break  # it fails without any: so would the next
    return whole, trials


def _go_on(trial: Trial, schedule: Schedule, steps: int, number: int, say) -> None:
    """Starts a trial's run until it is through."""
    through = False
    while not through:
        told = len(trial.faults)
        through = trial.run(schedule, steps)
        schedule.learn(trial.workdir, trial.first_step, trial.pace)
        for count, fault in enumerate(trial.faults[told:], told + 1):
            what = f": {fault.detail}" if fault.detail else ""
            say(
                f"{fault.kind} {count} of trial {number} after {fault.seconds:.1f} s, "
                f"{fault.amid} ({fault.steps} of {steps} steps){what}"
            )
    left = len(schedule.kinds)
    say(f"trial {number}: through after {len(trial.faults)} faults; {left} left")
