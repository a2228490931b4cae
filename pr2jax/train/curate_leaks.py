"""The stage of curation that drops rows which share text with an evaluation set."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pr2jax.core.config import ConfigError
from pr2jax.core.files import replacing
from pr2jax.core.metrics import Progress, write_json
from pr2jax.tasks.base import TaskConfig
from pr2jax.tasks.contamination import Item, Leaks
from pr2jax.tasks.filters import Comparable, CurateConfig, question_of
from pr2jax.tasks.registry import build_task
from pr2jax.tasks.rows import RowError, read_rows
from pr2jax.train.curate_work import Index, Stage, Texts, file_stamp

log = logging.getLogger("pr2jax")


def evaluation_items(cfg: CurateConfig) -> list[Item]:
    """The items of all sets of `against`. Raises ConfigError naming one that cannot be read."""
    compare = Comparable(cfg.boilerplate)
    items = []
    for i, name in enumerate(cfg.against):
        found = list(_items(name, f"curate.against[{i}]", compare))
        if not found:
            raise ConfigError(f"curate.against[{i}]: {name} has no items")
        log.info("%s: %d items", name, len(found))
        items += found
    return items


def _is_file(name: str) -> bool:
    return name.endswith((".parquet", ".jsonl")) and not name.startswith(("parquet:", "jsonl:"))


def check_sets(cfg: CurateConfig) -> None:
    """Raises ConfigError naming an evaluation set that is no file and no task."""
    for i, name in enumerate(cfg.against):
        if _is_file(name):
            if not os.path.isfile(name):
                raise ConfigError(f"curate.against[{i}]: no file {name}")
            continue
        try:
            _task(name).validate()
        except ConfigError as error:
            raise ConfigError(f"curate.against[{i}]: {name}: {error}") from None


def _task(name: str) -> TaskConfig:
    return TaskConfig(name=name, size=-1, held_out=0)


def _items(name: str, key: str, compare: Comparable) -> Iterator[Item]:
    if _is_file(name):
        for line, row in read_rows(name):
            # An item that is not read is one that nothing is checked against.
            try:
                if isinstance(row, Exception):
                    raise row
                question = question_of(row)
            except ValueError as error:
                raise RowError(f"{key}: {name}:{line}: {error}") from None
            yield Item(name, str(line), question, compare(question))
        return
    try:
        task = build_task(_task(name))
    except ConfigError as error:
        raise ConfigError(f"{key}: {name}: {error}") from None
    for problem in sorted(task.train, key=lambda p: p.id):
        question = problem.meta.get("question", problem.prompt)
        yield Item(name, problem.id, question, compare(question))


def _codes(read: Stage, part: int) -> list[np.ndarray]:
    """The token codes of all rows of a part."""
    counts = read.array(f"codes-{part:05d}", "counts")
    flat = np.fromfile(read.path(part, "codes"), np.uint32).astype(np.uint64)
    return np.split(flat, np.cumsum(counts)[:-1])


def _rows_left(index: Index, read: Stage) -> Iterator[np.ndarray]:
    """The token codes of every row that is left, with a line of progress."""
    progress = Progress("wording", index.parts)
    for k in range(index.parts):
        codes = _codes(read, k)
        for row in (index.alive(k) - index.part_starts[k]).tolist():
            yield codes[row]
        progress.update(k + 1, {})
    progress.close()


def drop_leaks(
    cfg: CurateConfig, index: Index, texts: Texts, read: Stage, root: Path, before: Stage
) -> tuple[Stage, dict[str, Any]]:
    """Rows that share text with an evaluation item go; what was looked for."""
    keys = ("against", "ngram", "short_words", "common_items", "common_rows", "leak_share")
    settings = {key: getattr(cfg, key) for key in keys}
    settings["files"] = [file_stamp(name) for name in cfg.against if os.path.isfile(name)]
    stage = Stage(root, "contamination", settings, before.key)
    figures: dict[str, Any] = {"sets": {}}
    if not cfg.against:
        return stage, figures
    if not stage.has("looked_for", "json") or not all(
        stage.has(k, "jsonl") for k in range(index.parts)
    ):
        leaks = Leaks(evaluation_items(cfg), cfg, _rows_left(index, read))
        sets = dict.fromkeys(cfg.against, 0)
        for item in leaks.items:
            sets[item.source] += 1
        figures = {"sets": sets, "common_sequences": leaks.common}
        figures |= {"cell_sequences": leaks.cells, "unspecific_items": leaks.unspecific}
        write_json(stage.path("looked_for", "json"), figures)
        for k in stage.todo(range(index.parts), "contamination", "jsonl"):
            lines = []
            low, data, codes = int(index.part_starts[k]), texts.part(k), _codes(read, k)
            for row in index.alive(k).tolist():
                for leak in leaks.find(data[row - low].decode(), codes[row - low]):
                    lines.append(json.dumps({"row": row} | leak.to_json(), ensure_ascii=False))
            with replacing(stage.path(k, "jsonl")) as file:
                file.write("".join(line + "\n" for line in lines).encode())
    figures = json.loads(stage.path("looked_for", "json").read_text())
    rows = {hit["row"] for hit in leaks_of(stage, index)}
    index.drop(np.array(sorted(rows), np.int64), "contaminated")
    return stage, figures


def leaks_of(stage: Stage, index: Index) -> Iterator[dict[str, Any]]:
    """What was found, in the rows' order: {"row": number} and `Leak.to_json`."""
    for k in range(index.parts):
        if stage.has(k, "jsonl"):
            for line in stage.path(k, "jsonl").read_text(encoding="utf-8").split("\n"):
                if line:
                    yield json.loads(line)
