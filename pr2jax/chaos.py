"""Kills a run again and again, and compares where it ends with a run that was left alone.

  python -m pr2jax.chaos --config=configs/NAME.py[:arg] --workdir=DIR --kills=20 --seed=0
      [--config.key=value ...] [--json=FILE]

Runs `pr2jax.main` with these settings once in DIR/whole, then in DIR/killed, ending it with SIGKILL
at random moments (start-up included) and starting it again until it is through. Where it is through
before all kills were used, the next trial takes the rest. Then, for each trial: parameters,
optimizer state, counters and what the trainer remembers must be equal bit for bit; every step must
stand once in metrics.jsonl and ledger.jsonl, with equal figures (times aside); the ledger must name
the items in the order that the seed defines; no process and no half-written file may be left.

A moment is uniform over a window from the process's start to twice the run's remaining time over
the remaining kills after start-up, so that kills spread over the whole run; a window in which a
process cannot reach its first checkpoint grows until it can. Exits with 1 where anything differs.
Stages that end by the clock (`sft_continued`) are not compared.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_ORPHAN_S = 30.0
_COUNTS = ("updates", "items", "skipped", "twice", "replayed")


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill: seconds after its process started, steps in the ledger, and amid what."""

    seconds: float
    steps: int
    amid: str
    orphans: int


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


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _stages(workdir: Path) -> list[Path]:
    """Folders of the stages that have begun, in the order they began."""
    found = [path.parent for path in workdir.rglob("checkpoints") if path.is_dir()]
    return sorted(found, key=lambda path: (path / "checkpoints").stat().st_ctime)


def _steps(workdir: Path) -> int:
    """Rows of all ledgers: steps done."""
    return sum(_lines(stage / "ledger.jsonl") for stage in _stages(workdir))


def _amid(workdir: Path, before: int, steps: int) -> str:
    """What a killed process was about, as the files tell."""
    for stage in _stages(workdir):
        if list((stage / "checkpoints").glob("*orbax-checkpoint-tmp*")):
            return "writing a checkpoint"
        if list((stage / "journal").glob(".*")):
            return "writing the journal"
        for name in ("metrics.jsonl", "ledger.jsonl"):
            path = stage / name
            if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                return f"writing {name}"
    now = _steps(workdir)
    if now >= steps:
        return "after the last step"
    return "stepping" if now != before else "start-up"


class Trial:
    """One workdir and the processes that ran in it."""

    def __init__(self, command: list[str], workdir: Path, environment: dict[str, str]):
        self.command = [*command, f"--workdir={workdir}"]
        self.workdir, self.environment = workdir, environment
        self.kills: list[Kill] = []
        # Of the process that ran last: seconds to its first step, and a step after that.
        self.first_step: float | None = None
        self.pace: float | None = None

    def run(self, seconds: float | None = None, steps: int = 0) -> bool:
        """One process, killed after `seconds` unless it is through; whether it is.

        Raises RuntimeError where it ends badly by itself.
        """
        self.workdir.mkdir(parents=True, exist_ok=True)
        before, self.first_step, self.pace = _steps(self.workdir), None, None
        log = self.workdir / "chaos.log"
        with open(log, "ab") as out:
            # A session of its own: the signal is for all of its group, and for no one else.
            process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        start = time.monotonic()
        try:
            while process.poll() is None:
                passed, now = time.monotonic() - start, _steps(self.workdir)
                if self.first_step is None and now > before:
                    self.first_step, first = passed, now
                elif self.first_step is not None and now > first:
                    self.pace = (passed - self.first_step) / (now - first)
                if seconds is not None and passed >= seconds:
                    self._kill(process, passed, before, steps)
                    return False
                left = 0.05 if seconds is None else max(0.0, min(0.05, seconds - passed))
                time.sleep(left)
        finally:
            if process.poll() is None:  # we are being stopped
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{' '.join(self.command)}: exit code {process.returncode}\n{tail}")
        return True

    def _kill(self, process: subprocess.Popen, passed: float, before: int, steps: int) -> None:
        below = processes_below(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        amid = _amid(self.workdir, before, steps)
        orphans = len(wait_for_orphans(below))
        self.kills.append(Kill(round(passed, 3), _steps(self.workdir), amid, orphans))


def torment(
    command: list[str],
    workdir: Path,
    kills: int,
    draw: random.Random,
    environment: dict[str, str],
    say=print,
) -> dict[str, Any]:
    """The runs: {"whole": Trial, "trials": [Trial], "seconds", "start_up"}."""
    whole = Trial(command, workdir / "whole", environment)
    start = time.monotonic()
    whole.run()
    total, steps = time.monotonic() - start, _steps(whole.workdir)
    start_up = whole.first_step or total
    pace = (total - start_up) / max(steps, 1)  # what comes after the steps counts as theirs
    say(f"left alone: {steps} steps in {total:.0f} s, the first after {start_up:.1f} s")
    trials: list[Trial] = []
    while kills > 0:
        number = len(trials) + 1
        trial = Trial(command, workdir / f"killed_{number}", environment)
        trials.append(trial)
        saved, stretch, through = -1, 1.0, False
        while kills > 0 and not through:
            left = pace * max(steps - _steps(trial.workdir), 0.05 * steps)
            share = 2.0 * left / (kills + 1)
            through = trial.run(draw.uniform(0.0, stretch * (start_up + share)), steps)
            # Programs come out of the cache by now, and the machine may be less busy.
            start_up = trial.first_step or start_up
            pace = min(pace, trial.pace or pace)
            if through:
                say(f"trial {number}: through after {len(trial.kills)} kills; {kills} left")
                break
            kills -= 1
            now = _saved(trial.workdir)
            stretch = 1.0 if now > saved else min(stretch * 1.15, 8.0)
            saved, kill = max(saved, now), trial.kills[-1]
            say(
                f"kill {len(trial.kills)} of trial {number} after {kill.seconds:.1f} s, "
                f"{kill.amid} ({kill.steps} of {steps} steps)"
            )
        if not through:
            trial.run()
    return {"whole": whole, "trials": trials, "seconds": total, "start_up": start_up}


def _saved(workdir: Path) -> int:
    """Steps of the latest checkpoints, summed over stages."""
    total = 0
    for stage in _stages(workdir):
        names = [p.name for p in (stage / "checkpoints").iterdir()]
        total += max((int(n) for n in names if n.isdigit()), default=0)
    return total


def judge(whole: Path, trial: Trial) -> dict[str, Any]:
    """A trial's row: kills, differences, and the counts of its ledger and its last checkpoint."""
    from pr2jax.train import audit  # imports JAX and its friends

    differences, counts = audit.compare_files(whole, trial.workdir), collections.Counter()
    for stage in _stages(whole):
        if stage.name == audit.BY_THE_CLOCK:
            continue
        own = trial.workdir / stage.relative_to(whole)
        name = "" if own == trial.workdir else f"{own.name}: "
        differences += [name + line for line in audit.compare_stage(stage, own)]
        if (own / "ledger.jsonl").exists():
            counts.update(audit.account(trial.workdir, own, stage))
        counts["updates"] += audit.updates(own)
        found = audit.rows(own / "metrics.jsonl")
        counts["replayed"] += sum(int(row.get("journal/replayed", 0)) for row in found)
    return {
        "workdir": trial.workdir.name,
        "kills": [dataclasses.asdict(k) for k in trial.kills],
        "orphans": sum(k.orphans for k in trial.kills),
        "differences": differences,
        **{key: counts[key] for key in _COUNTS},
    }


def passed(row: dict[str, Any]) -> bool:
    """Whether a trial is what it must be."""
    return not (row["differences"] or row["skipped"] or row["twice"] or row["orphans"])


def _table(rows: list[dict[str, Any]], say) -> None:
    amid = collections.Counter(k["amid"] for row in rows for k in row["kills"])
    say("kills by what they hit: " + ", ".join(f"{n} {k}" for k, n in amid.most_common()))
    heads = ("workdir", "kills", "state and files", *_COUNTS)
    say(" | ".join(f"{head:>15}" for head in heads))
    for row in rows:
        equal = "equal" if not row["differences"] else f"{len(row['differences'])} differ"
        values = (row["workdir"], len(row["kills"]), equal)
        values += tuple(row[k] for k in _COUNTS)
        say(" | ".join(f"{value!s:>15}" for value in values))
        for line in row["differences"][:10]:
            say(f"  {line}")


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m pr2jax.chaos`; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="as of pr2jax.main")
    parser.add_argument("--workdir", required=True, type=Path, help="new folder for all runs")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options, settings = parser.parse_known_args(argv)
    if options.kills < 1:
        parser.error(f"--kills={options.kills}: at least 1")
    if options.workdir.exists() and any(options.workdir.iterdir()):
        parser.error(f"--workdir={options.workdir}: is not empty")
    command = [sys.executable, "-m", "pr2jax.main", f"--config={options.config}", *settings]
    environment, draw = dict(os.environ), random.Random(options.seed)
    say = lambda line: print(line, flush=True)
    try:
        runs = torment(command, options.workdir, options.kills, draw, environment, say)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    import jax
    from absl import logging as absl_logging

    from pr2jax.core.metrics import write_json

    jax.config.update("jax_platforms", "cpu")  # comparing needs no accelerator
    absl_logging.set_verbosity(absl_logging.ERROR)  # orbax tells of every folder it opens
    whole = runs["whole"].workdir
    rows = [judge(whole, trial) for trial in runs["trials"]]
    _table(rows, say)
    good = all(map(passed, rows))
    say("every trial ended as the run left alone" if good else "NOT EQUAL")
    if options.json:
        figures = {
            "config": options.config,
            "settings": settings,
            "seed": options.seed,
            "kills": options.kills,
            "seconds_left_alone": round(runs["seconds"], 1),
            "start_up_seconds": round(runs["start_up"], 1),
            "equal": good,
            "trials": rows,
        }
        write_json(options.json, figures)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
