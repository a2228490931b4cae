"""Pass rates of problems under a weak and a strong model, batch by batch on disk."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from pr2jax.core.config import ConfigError
from pr2jax.core.store import as_path, files_below, is_store
from pr2jax.data.tokenizer import encode_prompt
from pr2jax.evaluation.passk import PASS_SCORE
from pr2jax.evaluation.runner import evaluate
from pr2jax.tasks.base import Problem
from pr2jax.tasks.registry import verifier_for
from pr2jax.tasks.rows import RowError, parse_row
from pr2jax.train.config import Config
from pr2jax.train.curate_work import Index, Inputs, Stage, file_stamp, selected
from pr2jax.train.session import Session, open_session

log = logging.getLogger("pr2jax")


def measure(
    cfg: Config, inputs: Inputs, index: Index, root: Path, before: Stage
) -> tuple[Stage, Float[np.ndarray, "N 2"], Int[np.ndarray, " R"]]:
    """(the stage, pass rates of the rows that stay, those whose prompt is too long to measure).

    A pass is a score of at least 1, as in arXiv 2506.14965. The rows a batch holds are given by
    their order, and its key by its number, so that a run that goes on samples what it would have.
    Raises RowError where nobody verifies a data source.
    """
    rows = np.flatnonzero(index.reason == 0)
    _check_sources(index, rows)
    models = {"weak": cfg.curate.weak, "strong": cfg.curate.strong}
    settings = {
        "models": {name: _stamp(source) for name, source in models.items() if source},
        "samples": cfg.curate.samples,
        "batch": cfg.curate.batch,
        "sampling": dataclasses.asdict(cfg.eval.sampling),
        "sampler": dataclasses.asdict(cfg.sampler),
        "task": dataclasses.asdict(cfg.rl_task),
        "dtype": cfg.compute_dtype,
        "seed": cfg.seed,
    }
    stage = Stage(root, "difficulty", settings, before.key)
    rates = np.full((len(index), 2), np.nan)
    long = np.zeros(len(index), bool)
    batches = -(-len(rows) // cfg.curate.batch)
    for column, (name, source) in enumerate(models.items()):
        if not source:
            continue
        parts = [f"{name}-{k:06d}" for k in range(batches)]
        if not all(stage.has(part) for part in parts):
            part_cfg = dataclasses.replace(cfg, init_from=source)
            with open_session(part_cfg, stage.folder / name) as session:
                _measure(session, inputs, index, rows, stage, name, parts)
        for part in parts:
            found = stage.load(part)
            rates[found["rows"], column] = found["rates"]
            long[found["rows"][np.isnan(found["rates"])]] = True
    return stage, rates, np.flatnonzero(long)


def _stamp(source: str) -> list[Any]:
    """What tells a model's folder from another: its files, or its name (a package's)."""
    if is_store(source):
        found = files_below(as_path(source)).items()
        return [[f"{source}/{name}", p.stat().length, p.stat().mtime] for name, p in found]
    path = Path(source)
    if not path.exists():
        return [source]
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [file_stamp(str(p)) for p in files]


def _check_sources(index: Index, rows: Int[np.ndarray, " R"]) -> None:
    for number in np.unique(index.category[rows]).tolist():
        try:
            verifier_for(index.categories[number][1])
        except ValueError as error:
            raise RowError(f"curate.difficulty: {error}") from None


def _measure(
    session: Session,
    inputs: Inputs,
    index: Index,
    rows: Int[np.ndarray, " R"],
    stage: Stage,
    name: str,
    parts: list[str],
) -> None:
    """Samples and scores the batches that are not there; the rate of a long prompt is NaN."""
    cfg = session.cfg
    size, n = cfg.curate.batch, cfg.curate.samples
    params = session.initial_params()
    stream = None
    for k in stage.todo(parts, f"pass rates, {name}"):
        stream = stream or _problems(cfg, inputs, index, rows[k * size :])
        batch = list(itertools.islice(stream, size))
        short = [encode_length(session, problem) <= cfg.sampler.max_prompt for _, problem in batch]
        asked = [problem for (_, problem), fits in zip(batch, short, strict=True) if fits]
        rates = np.full(len(batch), np.nan)
        if asked:
            result = evaluate(
                session.sampler,
                params,
                session.tokenizer,
                asked,
                session.pool,
                cfg.eval.sampling,
                n,
                (1,),
                session.key("curate", name, k),
            )
            passed = [np.mean(np.array(s.scores) >= PASS_SCORE) for s in result.samples]
            rates[np.array(short)] = passed
        stage.save(parts[k], rows=np.array([row for row, _ in batch], np.int64), rates=rates)


def encode_length(session: Session, problem: Problem) -> int:
    """Tokens of a problem's prompt. Raises ConfigError naming the problem."""
    try:
        return len(encode_prompt(session.tokenizer, problem.input))
    except ValueError as error:
        raise ConfigError(f"tokenizer: problem {problem.id}: {error}") from None


def _problems(
    cfg: Config, inputs: Inputs, index: Index, rows: Int[np.ndarray, " R"]
) -> Iterator[tuple[int, Problem]]:
    for number, row in selected(inputs, index, rows):
        where = f"{inputs.paths[index.file[number]]}:{index.line[number]}"
        yield number, parse_row(cfg.rl_task, where, row)
