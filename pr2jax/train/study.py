"""A study: the same run in many settings and seeds, each a process of its own, and what it shows.

Every cell is the study's own configuration with a few overrides, run once a seed, as mode `rl` or
`pretrain` by the study's kind (`python -m pr2jax.main --config=.../saved.py:CONFIG.json`). With
`study.warmup` all cells of a seed start from the same SFT run of that seed. Kind `budget` has one
base model for all, and one run more, which chooses the problems by how hard they are for it; cells
learn from those alone. Runs that have finished
are never made again, so the same command goes on after any interruption; a failed run is reported,
hides no other, and is tried again by the next start. The workdir:

  warmup/seed_S/, problems/, cells/GROUP/NAME/seed_S/    a run each: config.in.json, log.txt, ...
  study.json, study.md, report.html, figures/   all runs so far (the kind's report)
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.core.metrics import SUMMARY, Progress, write_json
from pr2jax.train import budget_report, growth_report, law_report, study_report
from pr2jax.train.config import CellConfig, Config
from pr2jax.train.loop import Interrupted, StopRequest
from pr2jax.train.regimes import PROBLEMS

log = logging.getLogger("pr2jax")

_INPUT, _LOG = "config.in.json", "log.txt"
_MODES = {"replay": "rl", "growth": "pretrain", "law": "pretrain", "budget": "rl"}
_REPORTS = {
    "replay": study_report.write,
    "growth": growth_report.write,
    "law": law_report.write,
    "budget": budget_report.write,
}


class StudyError(RuntimeError):
    """Some runs of a study failed; the others are done and reported."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: a cell (None: one that cells wait for) with a seed, its folder and its whole
    configuration. Runs of a lower `stage` come first: 0 warm-ups, 1 problems, 2 cells."""

    cell: CellConfig | None
    seed: int
    folder: Path
    config: dict[str, Any]
    stage: int = 2

    @property
    def name(self) -> str:
        """For people."""
        what = ("warm-up", "choosing problems", "")[self.stage]
        what = f"{self.cell.group} {self.cell.name}" if self.cell else what
        return f"{what}, seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether it has finished, in this process or another."""
        return (self.folder / SUMMARY).is_file()


def slug(text: str) -> str:
    """`text` as a folder's name."""
    return re.sub(r"[^a-z0-9.+]+", "_", text.lower()).strip("_.") or "all"


def with_overrides(config: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    """A copy of a nested configuration with "dotted.key=value" set; values are JSON, else text.

    Raises ConfigError for one without "=", or a key whose parent is not there.
    """
    out = json.loads(json.dumps(config))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not KEY=VALUE")
        *parents, last = key.split(".")
        at = out
        for name in parents:
            at = at.get(name) if isinstance(at, dict) else None
        if not isinstance(at, dict):
            raise ConfigError(f"{key}: there is no such key")
        try:
            at[last] = json.loads(text)
        except ValueError:
            at[last] = text
    return out


def plan_jobs(cfg: Config, workdir: Path) -> list[Job]:
    """All runs in their order: warm-ups; for kind `budget` the choice of problems; then by
    priority, seed by seed, cells as they are listed.

    Raises ConfigError, naming the cell, for settings that no run could use.
    """
    base = dataclasses.asdict(cfg) | {"mode": _MODES[cfg.study.kind]}
    base["study"] = dataclasses.asdict(type(cfg.study)())
    study, jobs = cfg.study, []
    seeds = range(cfg.seed, cfg.seed + max((cell.seeds for cell in study.cells), default=0))
    budget = study.kind == "budget"
    warm = lambda seed: workdir / "warmup" / f"seed_{cfg.seed if budget else seed}"
    if study.warmup:
        for seed in seeds[:1] if budget else seeds:
            config = _checked(base | {"mode": "sft", "seed": seed}, "study.warmup")
            jobs.append(Job(None, seed, warm(seed), config, stage=0))
    if budget and study.cells:
        start = {"init_from": str(warm(cfg.seed))} if study.warmup else {}
        config = _checked(base | {"mode": "difficulty"} | start, "regime")
        jobs.append(Job(None, cfg.seed, workdir / "problems", config, stage=1))
        base |= {"rl_problems": str(workdir / "problems" / PROBLEMS)}
    for priority in sorted({cell.priority for cell in study.cells}):
        for seed in seeds:
            for i, cell in enumerate(study.cells):
                if cell.priority != priority or seed >= cfg.seed + cell.seeds:
                    continue
                where = f"study.cells[{i}] ({cell.group} {cell.name})"
                own = {"seed": seed} | ({"init_from": str(warm(seed))} if study.warmup else {})
                try:
                    config = with_overrides(base, cell.overrides) | own
                except ConfigError as error:
                    raise ConfigError(f"{where}: {error}") from None
                folder = workdir / "cells" / slug(cell.group) / slug(cell.name) / f"seed_{seed}"
                jobs.append(Job(cell, seed, folder, _checked(config, where)))
    if len({job.folder for job in jobs}) < len(jobs):
        raise ConfigError("study.cells: two of them have the same group and name")
    return jobs


def _checked(config: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dataclasses.asdict(from_config_dict(Config, config))))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _write_inputs(jobs: list[Job]) -> None:
    """Raises ConfigError where a folder holds a run of another configuration."""
    for job in jobs:
        path = job.folder / _INPUT
        if not path.exists():
            write_json(path, job.config)
        elif json.loads(path.read_text(encoding="utf-8")) != job.config:
            raise ConfigError(
                f"study: {path} is of another configuration; give another --workdir, or remove "
                f"{job.folder}"
            )


def run_study(cfg: Config, workdir: str, profile_steps: int = 0) -> None:
    """Runs what is not yet done of a study, `study.workers` runs at a time, and reports.

    Raises ConfigError before anything runs, Interrupted after SIGINT or SIGTERM (running
    processes are stopped), StudyError at the end where runs failed.
    """
    if profile_steps:
        raise ConfigError("--profile: a study traces nothing; profile one of its runs")
    root = Path(workdir).resolve()
    root.mkdir(parents=True, exist_ok=True)
    jobs = plan_jobs(cfg, root)
    _write_inputs(jobs)
    with StopRequest() as stop, _only_one(root):
        failed = _Workers(cfg, jobs, stop, root).run()
        _REPORTS[cfg.study.kind](cfg, root, jobs, failed)
        if stop.requested:
            raise Interrupted("study: stopped; the same command goes on")
    if failed:
        raise StudyError(f"{len(failed)} of {len(jobs)} runs failed: " + "; ".join(failed))


@contextlib.contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Two studies in one workdir would run the same cells. Raises ConfigError for the second."""
    with open(root / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"--workdir: a study is already running in {root}") from None
        yield


class _Workers:
    """Threads that each start one process at a time, in the order of the jobs."""

    def __init__(self, cfg: Config, jobs: list[Job], stop: StopRequest, root: Path):
        self.cfg, self.jobs, self.stop, self.root = cfg, jobs, stop, root
        self.finished: queue.Queue[tuple[Job, str | None]] = queue.Queue()
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        each = cfg.study.cores_per_worker
        if each and cores and cfg.study.workers * each > len(cores):
            raise ConfigError(
                f"study.workers: {cfg.study.workers} workers of {each} cores each, and this "
                f"machine has {len(cores)} (study.cores_per_worker=0 pins nothing)"
            )
        self.cores = [cores[i * each : (i + 1) * each] for i in range(cfg.study.workers)]

    def run(self) -> list[str]:
        """Runs all that is not done; returns what failed. A stage waits for all of the last."""
        failed: list[str] = []
        progress = Progress("study", len(self.jobs), start=sum(job.done for job in self.jobs))
        for stage in range(3):
            todo = [job for job in self.jobs if job.stage == stage and not job.done]
            failed += self._all(todo, progress)
            if failed and stage < 2:
                break  # cells cannot start without what they start from
        progress.close()
        return failed

    def _all(self, todo: list[Job], progress: Progress) -> list[str]:
        waiting: queue.Queue[Job] = queue.Queue()
        for job in todo:
            waiting.put(job)
        threads = [
            threading.Thread(target=self._work, args=(waiting, cores), daemon=True)
            for cores in self.cores
        ]
        for thread in threads:
            thread.start()
        failed = []
        while any(thread.is_alive() for thread in threads) or not self.finished.empty():
            try:
                job, error = self.finished.get(timeout=0.5)
            except queue.Empty:
                continue
            if error is not None and not self.stop.requested:
                log.error("%s failed: %s (%s)", job.name, error, job.folder / _LOG)
                failed.append(job.name)
            done = sum(j.done for j in self.jobs)
            progress.update(done, {"last": job.name, "failed": len(failed)})
            if job.cell is not None and done % self.cfg.study.report_every == 0:
                _REPORTS[self.cfg.study.kind](self.cfg, self.root, self.jobs, failed)
        return failed

    def _work(self, waiting: queue.Queue[Job], cores: list[int]) -> None:
        while not self.stop.requested:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                error = self._one(job, cores)
            except Exception as failure:  # told like any other; the other runs go on
                error = repr(failure)
            self.finished.put((job, error))

    def _one(self, job: Job, cores: list[int]) -> str | None:
        """Runs one process to its end; returns what went wrong."""
        with open(job.folder / ".lock", "w") as lock, open(job.folder / _LOG, "a") as output:
            # The process inherits the lock: one that outlived a killed study is waited for.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if job.done:
                return None
            process = subprocess.Popen(
                _command(job),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(len(cores)),
                pass_fds=(lock.fileno(),),
                start_new_session=True,
            )
            if cores:
                with contextlib.suppress(ProcessLookupError):  # it is gone already
                    os.sched_setaffinity(process.pid, cores)
            while process.poll() is None:
                if self.stop.requested:
                    process.send_signal(signal.SIGTERM)
                    process.wait()
                time.sleep(0.1)
        if process.returncode == 0 and job.done:
            return None
        lines = (job.folder / _LOG).read_text(errors="replace").splitlines() or [""]
        return f"exit status {process.returncode}: {lines[-1]}"


def _command(job: Job) -> list[str]:
    cache = jax.config.jax_compilation_cache_dir or "off"
    saved = Path(__file__).with_name("saved.py")
    return [
        *(sys.executable, "-m", "pr2jax.main"),
        f"--config={saved}:{job.folder / _INPUT}",
        f"--workdir={job.folder}",
        f"--compilation_cache={cache}",
    ]


def _environment(cores: int) -> dict[str, str]:
    """The child's: with one core, XLA's own threads would only take turns."""
    environment = dict(os.environ)
    package = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([package, environment.get("PYTHONPATH", "")])
    if cores == 1:
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    return environment
