"""Mode `eval`: checkpoints x suites, each cell sampled once, and the report that compares them."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pr2jax.core import rng
from pr2jax.core.checkpoint import read_checkpoint
from pr2jax.core.config import ConfigError
from pr2jax.core.device import versions
from pr2jax.core.metrics import Progress, write_summary
from pr2jax.core.params import Tree, count_params
from pr2jax.data.tokenizer import encode_prompt
from pr2jax.evaluation import compare, report
from pr2jax.evaluation.cells import Cell, CellFiles, digest, rollout_rows
from pr2jax.evaluation.cells import row as cell_row
from pr2jax.evaluation.runner import score_rollout
from pr2jax.evaluation.suites import (
    Plan,
    SuiteConfig,
    build_problems,
    plan_suites,
    uses_chat,
)
from pr2jax.models.importers import hf
from pr2jax.tasks.base import Problem, Verdict
from pr2jax.train.config import Config
from pr2jax.train.init_from import checkpoint_folder
from pr2jax.train.session import Session, open_session

log = logging.getLogger("pr2jax")

_CELLS = "cells"
_RANDOM = "random:"
_FAILURES = ("timeouts", "crashes", "memory", "errors")  # of VerifierPool.stats

Problems = tuple[list[Problem], dict[str, int]]


def run_eval(cfg: Config, workdir: str, profile_steps: int = 0) -> None:
    """Evaluates every checkpoint on every suite whose data is there.

    Writes WORKDIR/cells/CHECKPOINT/SUITE.jsonl (a line a sample, `evaluation.cells`),
    WORKDIR/summary.json (checkpoints, suites, missing, figures, differences, config) and
    WORKDIR/report.html. The same command again samples only what is not there yet.
    Raises ConfigError, CheckpointError, CheckpointFormatError, RowError.
    """
    if profile_steps:
        raise ConfigError("--profile: only for modes that train")
    if jax.process_count() > 1:
        raise ConfigError("mode: 'eval' runs in one process; give each host checkpoints of its own")
    if cfg.init_from or cfg.upcycle.experts:
        raise ConfigError("init_from, upcycle: mode 'eval' takes evaluation.checkpoints")
    started = time.monotonic()
    run = _Evaluation(cfg, Path(workdir))
    for name, why in run.plan.missing.items():
        log.warning("suite %s does not run: %s", name, why)
    grid, about = {}, {}
    try:
        for label, source in labels(cfg.evaluation.checkpoints).items():
            grid[label], about[label] = run.checkpoint(label, source)
    finally:
        run.progress.close()
    _finish(run, grid, about, time.monotonic() - started)


def labels(checkpoints: tuple[str, ...]) -> dict[str, str]:
    """{short name: checkpoint}: as few of a path's last parts as tell them apart."""
    parts = [re.split(r"/+", source.rstrip("/")) for source in checkpoints]
    count = 1
    while len({tuple(p[-count:]) for p in parts}) < len(parts):
        count += 1
    names = ["_".join(p[-count:]) for p in parts]
    slugs = [re.sub(r"[^\w.-]+", "_", name).strip("._") or "checkpoint" for name in names]
    slugs = [s if slugs.count(s) == 1 else f"{s}_{i}" for i, s in enumerate(slugs)]
    return dict(zip(slugs, checkpoints, strict=True))


def identity(source: str) -> dict[str, Any]:
    """What tells a checkpoint from a later one in its place: its step, or its files' state."""
    if source.startswith(_RANDOM):
        return {"source": source}
    path = hf.resolve(source)
    folder = checkpoint_folder(path)
    if folder == path and hf.is_published(path):
        files = [p.stat() for p in sorted(Path(path).rglob("*")) if p.is_file()]
        newest = max(f.st_mtime_ns for f in files)
        return {"source": source, "bytes": sum(f.st_size for f in files), "newest": newest}
    return {"source": source, "step": read_checkpoint(folder)[0]}


class _Evaluation:
    """What all cells share."""

    def __init__(self, cfg: Config, workdir: Path):
        self.cfg, self.workdir, self.plan = cfg, workdir, plan_suites(cfg.evaluation)
        self.stats: dict[str, dict[str, int]] = {}
        for name, suite in self.plan.suites.items():
            if suite.sampling.max_tokens > cfg.sampler.max_tokens:
                raise ConfigError(
                    f"sampler.max_tokens: {cfg.sampler.max_tokens}, but suite {name} samples "
                    f"{suite.sampling.max_tokens} tokens (or lower evaluation.max_tokens)"
                )
        self._problems: dict[tuple[str, bool], Problems] = {}
        # Built once before anything is sampled, so that bad data is known at once.
        each = [len(self.problems(name, False)) * s.samples for name, s in self.suites.items()]
        self.total = sum(each) * len(cfg.evaluation.checkpoints)
        self.sampled = 0

    @property
    def suites(self) -> Mapping[str, SuiteConfig]:
        """Those that run."""
        return self.plan.suites

    @functools.cached_property
    def progress(self) -> Progress:
        """Counts responses over all cells."""
        return Progress("evaluation", self.total)

    def problems(self, name: str, chat: bool) -> list[Problem]:
        """A suite's problems for tokenizers with or without a chat template."""
        suite = self.suites[name]
        key = (name, chat and uses_chat(suite.task))
        if key not in self._problems:
            built = build_problems(suite, chat=chat, limit=self.cfg.evaluation.limit)
            self._problems[key], self.stats[name] = built, built[1]
        return self._problems[key][0]

    def checkpoint(self, label: str, source: str) -> tuple[dict[str, Cell], dict[str, Any]]:
        """(cells by suite, what the checkpoint is) of one checkpoint, sampling what is missing."""
        cfg, seed = dataclasses.replace(self.cfg, init_from=source), self.cfg.seed
        if source.startswith(_RANDOM):
            seed = int(source.removeprefix(_RANDOM))
            cfg = dataclasses.replace(self.cfg, init_from="", seed=seed)
        found = identity(source)
        folder = self.workdir / _CELLS / label
        log.info("checkpoint %s: %s", label, source)
        with open_session(cfg, self.workdir / "models" / label) as session:
            chat = session.tokenizer.chat is not None
            files, prompts = {}, {}
            for name, suite in self.suites.items():
                problems = self.problems(name, chat)
                # All of them before anything is sampled: a prompt that is too long is known now.
                prompts[name] = [self._encode(session, p) for p in problems]
                session.check_verifiers(problems)
                too_long = sum(isinstance(p, int) for p in prompts[name])
                if too_long:
                    log.warning(
                        "%s on %s: %d prompts of more than sampler.max_prompt=%d tokens score 0",
                        *(name, label, too_long, cfg.sampler.max_prompt),
                    )
                made_of = {
                    "checkpoint": found,
                    "suite": dataclasses.asdict(suite),
                    "problems": digest(problems),
                    "seed": self.cfg.seed,
                    "dtype": np.dtype(session.dtype).name,
                    "verifier": dataclasses.asdict(dataclasses.replace(cfg.verifier, workers=1)),
                    "max_prompt": cfg.sampler.max_prompt,
                }
                files[name] = CellFiles(folder, label, name, suite.samples, made_of)
                if uses_chat(suite.task) and not chat:
                    log.info("%s on %s: no chat template; prompts are plain text", name, label)
            params = None
            for name, own in files.items():
                self._advance(own.done * own.n, label, name)
                if not own.complete:
                    params = session.initial_params() if params is None else params
                    self._fill(own, session, params, self.problems(name, chat), prompts[name])
            about = found | {
                "parameters": count_params(session.specs),
                "prompts": "chat" if chat else "text",
                "seconds": session.wall_seconds(),
            }
        return {name: own.read(self.suites[name].ks) for name, own in files.items()}, about

    def _encode(self, session: Session, problem: Problem) -> list[int] | int:
        """Token ids of a prompt; only their number where it is too long and that is allowed."""
        if self.cfg.evaluation.long_prompts == "error":
            return session.encode(problem)
        try:
            ids = encode_prompt(session.tokenizer, problem.input)
        except ValueError as error:
            raise ConfigError(f"tokenizer: problem {problem.id}: {error}") from None
        return ids if len(ids) <= session.cfg.sampler.max_prompt else len(ids)

    def _fill(
        self,
        files: CellFiles,
        session: Session,
        params: Tree,
        problems: list[Problem],
        prompts: list[list[int] | int],
    ) -> None:
        """Samples what a cell has not yet, batch by batch.

        Response i of a suite is drawn with the same key whatever the batches and the checkpoint.
        """
        n, suite = files.n, self.suites[files.suite]
        key = rng.named(rng.root(self.cfg.seed), "suite", files.suite)
        step = max(1, self.cfg.evaluation.batch // n)
        for first in range(files.done, len(problems), step):
            start, end = time.monotonic(), min(first + step, len(problems))
            before = dict(session.pool.stats)
            fitting = [i for i in range(first, end) if not isinstance(prompts[i], int)]
            rows = {}
            if fitting:
                rollout, _ = session.sampler.rollout(
                    [prompts[i] for i in fitting],
                    n,
                    suite.sampling,
                    params=params,
                    key=key,
                    request_offset=n * sum(not isinstance(p, int) for p in prompts[:first]),
                )
                chosen = [problems[i] for i in fitting]
                rollout, texts = score_rollout(rollout, chosen, n, session.tokenizer, session.pool)
                made = rollout_rows(chosen, rollout, texts, n)
                rows = {i: made[at * n : at * n + n] for at, i in enumerate(fitting)}
            for i in set(range(first, end)) - rows.keys():
                rows[i] = _unread(problems[i], prompts[i], session.cfg.sampler.max_prompt, n)
            ordered = [row for i in range(first, end) for row in rows[i]]
            failures = {k: session.pool.stats[k] - before.get(k, 0) for k in _FAILURES}
            failures["long prompts"] = n * (end - first - len(fitting))
            seconds = time.monotonic() - start
            files.append(ordered, failures, seconds, last=end == len(problems))
            score = sum(row["score"] for row in ordered) / len(ordered)
            self._advance(len(ordered), files.checkpoint, files.suite, score)

    def _advance(self, count: int, label: str, name: str, score: float | None = None) -> None:
        self.sampled += count
        shown = {} if score is None else {"score": score}
        self.progress.update(self.sampled, {"at": f"{label}/{name}"} | shown)


def _unread(problem: Problem, tokens: int, most: int, n: int) -> list[dict[str, Any]]:
    """The rows of a problem whose prompt is too long."""
    reason = f"prompt of {tokens} tokens, more than sampler.max_prompt={most}"
    return [cell_row(problem, i, "", Verdict(0.0, reason), 0, False) for i in range(n)]


def _finish(run: _Evaluation, grid: compare.Grid, about: Mapping[str, Any], seconds: float) -> None:
    """summary.json and report.html."""
    cfg = run.cfg
    config = json.loads(json.dumps(dataclasses.asdict(cfg)))
    blocks = [
        report.table(
            ["checkpoint", "source", "step", "parameters", "prompts"],
            [
                [label, a["source"], a.get("step", "-"), a["parameters"], a["prompts"]]
                for label, a in about.items()
            ],
        ),
        report.settings({k: dataclasses.asdict(v) for k, v in run.suites.items()}, "Suites"),
        report.settings(config),
    ]
    found, gaps = compare.write_page(
        run.workdir / "report.html",
        grid,
        run.plan.missing,
        report.Section("How it was made", blocks),
        transcripts=cfg.evaluation.transcripts,
    )
    base = next(iter(grid))
    write_summary(
        run.workdir,
        {
            "base": base,
            "checkpoints": about,
            "suites": _about_suites(run.plan, grid[base], run.stats),
            "missing": run.plan.missing,
            "figures": compare.to_json(found),
            "differences": compare.differences_json(gaps),
            "failures": {
                label: {name: cell.failures for name, cell in cells.items()}
                for label, cells in grid.items()
            },
            "seconds": seconds,
            "versions": versions(),
            "config": config,
        },
    )
    for label, own in found.items():
        log.info("%s: %s", label, own[compare.OVERALL]["avg"])
    log.info("report in %s", run.workdir / "report.html")


def _about_suites(
    plan: Plan, cells: Mapping[str, Cell], stats: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """Of each suite: its settings, problems, domains, and what building it counted."""
    return {
        name: dataclasses.asdict(plan.suites[name])
        | {
            "problems": len(cell.samples),
            "domains": {d: cell.domains.count(d) for d in sorted(set(cell.domains))},
            "stats": dict(stats[name]),
        }
        for name, cell in cells.items()
    }
