"""Mode `curate`: rows of the Guru schema in, those worth training on out, and why the others not.

A row's life: read once (its text to disk, a digest and the codes of its MinHash bands to the
index); dropped if its question is the same as, inside, around, or nearly an earlier one's; dropped
if it shares text with an evaluation item; dropped if the models always or never solve it; else
written. Work is kept stage by stage and part by part (`curate_work`): a killed run goes on, and
writes the same bytes.

WORKDIR afterwards: data/part-*.parquet, dropped.jsonl, malformed.jsonl, near.jsonl,
contamination.jsonl, summary.json, report.html; stages/ may be removed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pr2jax.core.config import ConfigError
from pr2jax.core.device import versions
from pr2jax.core.fetch import fetched
from pr2jax.core.files import remove_leftovers, replacing
from pr2jax.core.metrics import write_json, write_summary
from pr2jax.tasks import columns
from pr2jax.tasks.base import DOMAINS, Problem, domain_of
from pr2jax.train import curate_leaks as leakage
from pr2jax.train import curate_stages as stages
from pr2jax.train.config import Config
from pr2jax.train.curate_report import SHOWN, write_curate_report
from pr2jax.train.curate_work import (
    REASONS,
    Index,
    Inputs,
    Stage,
    Texts,
    open_inputs,
    peak_memory,
    selected,
)

log = logging.getLogger("pr2jax")

DATA = "data"


def run_curate(cfg: Config, workdir: str, profile_steps: int = 0) -> None:
    """Curates `cfg.curate.inputs` into WORKDIR. Raises ConfigError, RowError, CheckpointError."""
    if profile_steps:
        raise ConfigError("--profile: only for modes that train")
    started = time.monotonic()
    if cfg.init_from:
        raise ConfigError("init_from: mode 'curate' takes its models from curate.weak and .strong")
    root = Path(workdir)
    root.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root)
    curate = dataclasses.replace(
        cfg.curate,
        inputs=tuple(map(fetched, cfg.curate.inputs)),
        against=tuple(map(fetched, cfg.curate.against)),
    )
    inputs = open_inputs(curate.inputs)
    if curate.against:
        leakage.check_sets(curate)  # before the hours that come first
    log.info("%d rows in %d files", inputs.total, len(inputs.paths))
    config = json.loads(json.dumps(dataclasses.asdict(cfg)))
    write_json(root / "config.json", config)

    seconds: dict[str, float] = {}
    read = stages.read_inputs(curate, inputs, root)
    seconds[read.name] = read.finish()
    index, kind = stages.load_index(read, inputs, curate)
    texts = Texts(read, index)
    stages.drop_same(index)
    contained = stages.drop_contained(curate, index, texts, root, read)
    seconds[contained.name] = contained.finish()
    near, compared = stages.drop_near(curate, index, texts, read, root, contained)
    seconds[near.name] = near.finish()
    leaks, looked_for = leakage.drop_leaks(curate, index, texts, read, root, near)
    seconds[leaks.name] = leaks.finish()
    last = _difficulty(cfg, inputs, index, root, leaks)
    seconds[last.name] = last.finish()
    written = _write_data(cfg, inputs, index, kind, root, last)
    seconds[written.name] = written.finish()
    malformed = list(stages.malformed_of(read, -(-inputs.total // curate.shard_rows)))
    examples = _write_reasons(inputs, index, texts, leaks, malformed, root)
    looked_for["hits"] = sum(1 for _ in leakage.leaks_of(leaks, index))
    texts.close()

    summary = {
        "mode": cfg.mode,
        "rows": {"read": inputs.total, "malformed": len(malformed)} | _counts(index.reason),
        "by_source": _by_source(index, malformed),
        "by_file": _by_file(index, inputs, malformed),
        "near": compared,
        "contamination": looked_for,
        "difficulty": _difficulty_figures(cfg, index),
        "seconds": seconds,
        "rows_per_second": inputs.total / max(sum(seconds.values()), 1e-9),
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "config": config,
        "wall_seconds": round(time.monotonic() - started, 1),
    }
    write_summary(root, summary)
    write_curate_report(root, cfg, summary, index, examples)
    kept = summary["rows"]["kept"]
    log.info("%d of %d rows kept, in %s", kept, inputs.total, root / DATA)


def _difficulty(cfg: Config, inputs: Inputs, index: Index, root: Path, before: Stage) -> Stage:
    """Drops what is too easy or too hard; the stage that the data builds on."""
    if cfg.curate.difficulty == "models":
        from pr2jax.train.curate_difficulty import measure

        stage, rates, long = measure(cfg, inputs, index, root, before)
        index.drop(long, "too_long")
        stages.apply_rates(cfg.curate, index, rates)
        return stage
    if cfg.curate.difficulty == "columns":
        stages.apply_rates(cfg.curate, index, index.rates)
    return Stage(root, "difficulty", {"difficulty": cfg.curate.difficulty}, before.key)


# --- Writing


def _write_data(
    cfg: Config, inputs: Inputs, index: Index, kind: columns.Kind, root: Path, before: Stage
) -> Stage:
    """The rows that stay, in order, `shard_rows` a file, all of one schema."""
    import pyarrow.parquet

    curate = cfg.curate
    settings = {"easy": curate.too_easy, "hard": curate.too_hard, "columns": curate.columns()}
    stage = Stage(root, "data", settings, before.key)
    folder = root / DATA
    if not stage.has("begun", "json"):
        shutil.rmtree(folder, ignore_errors=True)  # another run's, of other settings
        write_json(stage.path("begun", "json"), {})
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    added: dict[str, int] = {}
    if curate.difficulty == "models":
        models = (curate.weak, curate.strong)
        named = zip(curate.columns(), models, strict=True)
        added = {name: i for i, (name, model) in enumerate(named) if model}
        kind = kind | {"fields": kind["fields"] | {name: {"kind": "float"} for name in added}}
    kept = np.flatnonzero(index.reason == 0)
    size = curate.shard_rows
    parts = max(-(-len(kept) // size), 1)
    stream = None
    for k in stage.todo([f"part-{k:05d}" for k in range(parts)], "writing", "json"):
        stream = stream or selected(inputs, index, kept[k * size :])
        rows = []
        for number, row in itertools.islice(stream, size):
            rates = {name: _known(index.rates[number, i]) for name, i in added.items()}
            rows.append(stages.guru(row) | rates)
        path = folder / f"part-{k:05d}.parquet"
        with replacing(path) as file:
            pyarrow.parquet.write_table(columns.table(rows, kind), file, compression="zstd")
        write_json(stage.path(k, "json"), {"rows": len(rows)})
    return stage


def _known(rate: float) -> float | None:
    return None if np.isnan(rate) else float(rate)


def _write_reasons(
    inputs: Inputs, index: Index, texts: Texts, leaks: Stage, malformed: list, root: Path
) -> dict[str, list[dict[str, Any]]]:
    """Writes the reasons' files; the first of the near repeats and of the leaks, for the report."""

    def where(row: int) -> str:
        return f"{inputs.paths[index.file[row]]}:{index.line[row]}"

    def dropped() -> Iterator[dict[str, Any]]:
        for row in np.flatnonzero(index.reason != 0).tolist():
            partner = int(index.partner[row])
            found = {"row": where(row), "reason": REASONS[index.reason[row]]}
            if partner >= 0:
                found["of"] = where(partner)
            if not np.isnan(index.similarity[row]):
                found["similarity"] = round(float(index.similarity[row]), 4)
            for name, rate in zip(("weak", "strong"), index.rates[row].tolist(), strict=True):
                if not np.isnan(rate):
                    found[f"{name}_pass_rate"] = rate
            yield found

    def near() -> Iterator[dict[str, Any]]:
        for row in np.flatnonzero(index.reason == REASONS.index("near")).tolist():
            partner = int(index.partner[row])
            yield {
                "row": where(row),
                "of": where(partner),
                "similarity": round(float(index.similarity[row]), 4),
                "text": texts[row].decode(),
                "of_text": texts[partner].decode(),
            }

    def found() -> Iterator[dict[str, Any]]:
        for hit in leakage.leaks_of(leaks, index):
            text = texts[hit["row"]].decode()
            yield hit | {"row": where(hit["row"]), "text": text}

    names = ("path", "line", "error", "data_source")
    _write_lines(root / "malformed.jsonl", (dict(zip(names, m, strict=True)) for m in malformed))
    _write_lines(root / "dropped.jsonl", dropped())
    return {
        "near": _write_lines(root / "near.jsonl", near()),
        "contaminated": _write_lines(root / "contamination.jsonl", found()),
    }


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes a row a line; the first of them."""
    first = []
    with replacing(path) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            if len(first) < SHOWN:
                first.append(row)
    return first


# --- Figures


def _counts(reason: np.ndarray) -> dict[str, int]:
    counts = np.bincount(reason, minlength=len(REASONS)).tolist()
    return dict(zip(REASONS, counts, strict=True))


def _by_source(index: Index, malformed: list) -> list[dict[str, Any]]:
    """A row of counts for each domain and data source, by domain; malformed ones as they say."""
    bad: dict[tuple[str, str], int] = {}
    for *_, source in malformed:
        key = (domain_of(Problem("", "", "", source)), source)
        bad[key] = bad.get(key, 0) + 1
    order = {name: i for i, name in enumerate(DOMAINS)}
    found = []
    known = {category: i for i, category in enumerate(index.categories)}
    for category in sorted({*known, *bad}, key=lambda c: (order.get(c[0], len(order)), c[1])):
        reason = index.reason[index.category == known[category]] if category in known else []
        counts = _counts(np.array(reason, np.int8))
        read = len(reason) + bad.get(category, 0)
        row = {"domain": category[0], "source": category[1], "read": read}
        found.append(row | {"malformed": bad.get(category, 0)} | counts)
    return found


def _by_file(index: Index, inputs: Inputs, malformed: list) -> list[dict[str, Any]]:
    bad = Counter(path for path, *_ in malformed)
    return [
        {"file": path, "read": inputs.rows[i], "malformed": bad[path]}
        | _counts(index.reason[index.file == i])
        for i, path in enumerate(inputs.paths)
    ]


def _difficulty_figures(cfg: Config, index: Index) -> dict[str, Any]:
    """Of each model: rows with a pass rate, and its mean over them."""
    if cfg.curate.difficulty == "none":
        return {}
    found = {}
    for i, column in enumerate(cfg.curate.columns()):
        known = index.rates[~np.isnan(index.rates[:, i]), i]
        found[column] = {"rows": len(known), "mean": float(known.mean()) if len(known) else None}
    return found
