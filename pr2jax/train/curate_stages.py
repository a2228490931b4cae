"""The stages of curation: each looks at the rows that stay so far, part by part."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pr2jax.core.files import replacing
from pr2jax.core.metrics import write_json
from pr2jax.tasks import columns, dedup, filters
from pr2jax.tasks.base import TaskConfig, domain_of
from pr2jax.tasks.filters import Comparable, CurateConfig, TokenCodes, question_of
from pr2jax.tasks.rows import RowError, parse_row
from pr2jax.train.curate_work import Index, Inputs, Stage, Texts

log = logging.getLogger("pr2jax")

_REPORTED = 20
_FORMAT = 1  # of what the stages keep; another one begins anew


def guru(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its prompt as messages, whatever it was; none where it is empty."""
    prompt = row.get("prompt") or []
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return row | {"prompt": prompt}


def _rate(row: dict[str, Any], column: str) -> float:
    """A pass rate the row brings; NaN where it has none. Raises ValueError for another value."""
    value = row.get(column)
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{column} is {value!r}, not a share")
    return float(value)


# --- Reading


@dataclasses.dataclass
class _Part:
    """What one part of the reading finds."""

    rows: list[tuple[int, int, int, int, float, float]] = dataclasses.field(default_factory=list)
    texts: list[bytes] = dataclasses.field(default_factory=list)
    chars: list[int] = dataclasses.field(default_factory=list)
    codes: list[np.ndarray] = dataclasses.field(default_factory=list)
    shingles: list[np.ndarray] = dataclasses.field(default_factory=list)
    salts: list[int] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    categories: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    kind: columns.Kind = dataclasses.field(default_factory=lambda: {"kind": "null"})
    malformed: list[list[Any]] = dataclasses.field(default_factory=list)


def read_inputs(cfg: CurateConfig, inputs: Inputs, root: Path) -> Stage:
    """Reads every row once: its text to disk, and its digest, bands, numbers and type.

    Raises RowError where a file has more malformed rows than `max_bad_share`.
    """
    settings = {"format": _FORMAT, "inputs": inputs.stamp(), "columns": cfg.columns()} | {
        key: getattr(cfg, key)
        for key in (
            *("boilerplate", "near", "near_shingle", "near_numbers", "near_permutations"),
            *("near_recall", "shard_rows"),
        )
    }
    stage = Stage(root, "read", settings)
    parts = -(-inputs.total // cfg.shard_rows)
    first = next((k for k in range(parts) if not stage.has(k)), parts)
    stream = inputs.read(first * cfg.shard_rows)
    compare, code = Comparable(cfg.boilerplate), TokenCodes()
    tasks = [TaskConfig(name=f"jsonl:{path}") for path in inputs.paths]  # no templates of its own
    for k in stage.todo(range(parts), "reading"):
        part = _Part()
        for position, file, line, row in stream:
            _take(
                part,
                cfg,
                tasks[file],
                inputs.paths[file],
                (position, file, line),
                row,
                compare,
                code,
            )
            if position + 1 == min((k + 1) * cfg.shard_rows, inputs.total):
                break
        _write(stage, k, part, cfg)
    _check_malformed(stage, inputs, cfg)
    return stage


def _take(
    part: _Part,
    cfg: CurateConfig,
    task: TaskConfig,
    path: str,
    where: tuple[int, int, int],
    row: dict[str, Any] | Exception,
    compare: Comparable,
    code: TokenCodes,
) -> None:
    """Adds a row to a part, or to what is malformed in it."""
    try:
        if isinstance(row, Exception):
            raise row
        problem = parse_row(task, f"{path}:{where[2]}", row)
        text = compare(question_of(row))
        rates = [_rate(row, column) for column in cfg.columns()]
    except ValueError as error:
        part.malformed.append([path, where[2], str(error), _source(row)])
        return
    category = (domain_of(problem), problem.data_source)
    number = part.categories.setdefault(category, len(part.categories))
    part.rows.append((*where, number, *rates))
    data = text.encode()
    part.texts.append(data)
    part.chars.append(len(text))
    part.digests.append(filters.digest(data))
    part.kind = columns.merge(part.kind, columns.kind_of(guru(row)))
    codes = code(filters.tokens(text))
    part.codes.append(codes.astype(np.uint32))
    if cfg.near:
        part.shingles.append(filters.shingles(codes, cfg.near_shingle))
        part.salts.append(filters.numbers_key(text) if cfg.near_numbers else 0)


def _source(row: dict[str, Any] | Exception) -> str:
    found = row.get("data_source") if isinstance(row, dict) else None
    return found if isinstance(found, str) else ""


def _write(stage: Stage, k: int, part: _Part, cfg: CurateConfig) -> None:
    with replacing(stage.path(k, "txt")) as file:
        file.writelines(text + b"\n" for text in part.texts)
    with replacing(stage.path(k, "codes")) as file:
        file.writelines(codes.tobytes() for codes in part.codes)
    write_json(
        stage.path(k, "json"),
        {"categories": list(part.categories), "kind": part.kind, "malformed": part.malformed},
    )
    sizes = np.array([len(text) for text in part.texts], np.int32)
    places = np.array([row[:4] for row in part.rows], np.int64).reshape(-1, 4)
    if cfg.near:
        shape = dedup.choose_bands(cfg.near, cfg.near_permutations, cfg.near_recall)
        codes = dedup.band_codes(part.shingles, np.array(part.salts, np.uint64), *shape)
        # A column each, so that they can be read one at a time.
        stage.save(f"bands-{k:05d}", **{f"band_{b}": codes[:, b] for b in range(shape[0])})
    stage.save(f"codes-{k:05d}", counts=np.array([len(codes) for codes in part.codes], np.int64))
    stage.save(
        k,
        places=places,
        rates=np.array([row[4:] for row in part.rows], np.float64).reshape(-1, 2),
        size=sizes,
        start=np.concatenate([[0], np.cumsum(sizes + 1)])[:-1].astype(np.int64),
        chars=np.array(part.chars, np.int32),
        digest=np.frombuffer(b"".join(part.digests), np.uint64).reshape(-1, 2),
    )


def malformed_of(stage: Stage, parts: int) -> Iterator[list[Any]]:
    """[path, line, error, data source or ""] of every malformed row."""
    for k in range(parts):
        yield from json.loads(stage.path(k, "json").read_text())["malformed"]


def _check_malformed(stage: Stage, inputs: Inputs, cfg: CurateConfig) -> None:
    parts = -(-inputs.total // cfg.shard_rows)
    bad: dict[str, list[str]] = {}
    for path, line, error, _ in malformed_of(stage, parts):
        bad.setdefault(path, []).append(f"{path}:{line}: {error}")
    for path, total in zip(inputs.paths, inputs.rows, strict=True):
        found = bad.get(path, [])
        for told in found[:_REPORTED]:
            log.warning("malformed row %s", told)
        if len(found) > _REPORTED:
            log.warning("%s: %d malformed rows in all", path, len(found))
        if len(found) > cfg.max_bad_share * total:
            raise RowError(
                f"{path}: {len(found)} of {total} rows are malformed, more than "
                f"curate.max_bad_share={cfg.max_bad_share}; first: {found[0]}"
            )


def load_index(stage: Stage, inputs: Inputs, cfg: CurateConfig) -> tuple[Index, columns.Kind]:
    """The index of all rows, and the kind (schema) that holds them all."""
    parts = -(-inputs.total // cfg.shard_rows)
    found: dict[str, list[np.ndarray]] = {}
    categories: dict[tuple[str, str], int] = {}
    kind: columns.Kind = {"kind": "null"}
    for k in range(parts):
        told = json.loads(stage.path(k, "json").read_text())
        numbers = [categories.setdefault((d, s), len(categories)) for d, s in told["categories"]]
        kind = columns.merge(kind, told["kind"])
        arrays = stage.load(k)
        places = arrays.pop("places")
        arrays |= {"position": places[:, 0], "file": places[:, 1].astype(np.int16)}
        arrays |= {"line": places[:, 2]}
        arrays["category"] = np.array(numbers, np.int32)[places[:, 3]] if numbers else places[:, 3]
        for name, array in arrays.items():
            found.setdefault(name, []).append(array)
    sizes = [len(a) for a in found["position"]]
    count = sum(sizes)
    if not count:
        raise RowError("curate.inputs: no row is well-formed")
    return Index(
        part_starts=np.concatenate([[0], np.cumsum(sizes)]),
        categories=list(categories),
        reason=np.zeros(count, np.int8),
        partner=np.full(count, -1, np.int64),
        similarity=np.full(count, np.nan, np.float32),
        **{name: np.concatenate(arrays) for name, arrays in found.items()},
    ), kind


# --- Repeats


def drop_same(index: Index) -> None:
    """Exact repeats go; the first stays."""
    first = dedup.first_of_same(index.digest)
    gone = np.flatnonzero(first != np.arange(len(index)))
    index.drop(gone, "exact", first[gone], 1.0)


def drop_contained(
    cfg: CurateConfig, index: Index, texts: Texts, root: Path, before: Stage
) -> Stage:
    """Rows inside an earlier row, or around one, go."""
    settings = {"contain": cfg.contain, "min_chars": cfg.contain_min_chars}
    stage = Stage(root, "contained", settings, before.key)
    if not cfg.contain:
        return stage
    todo = [k for k in range(index.parts) if not stage.has(k)]
    if todo:
        anchors = _anchors(cfg, index, texts)
        for k in stage.todo(range(index.parts), "containment"):
            pairs = anchors.pairs(int(index.part_starts[k]), texts.part(k), texts.__getitem__)
            kept = index.reason[pairs].sum(axis=1) == 0
            stage.save(k, pairs=pairs[kept])
    found = [stage.load(k)["pairs"] for k in range(index.parts)]
    partner = dedup.keep_earlier(np.concatenate(found), len(index))
    gone = np.flatnonzero(partner >= 0)
    index.drop(gone, "contained", partner[gone])
    return stage


def _anchors(cfg: CurateConfig, index: Index, texts: Texts) -> dedup.Anchors:
    """The anchors of all rows that are left and long enough to be looked for."""
    wanted = (index.reason == 0) & (index.chars >= cfg.contain_min_chars)
    bits = np.unique(np.floor(np.log2(np.maximum(index.size[wanted], 1))).astype(int))
    sizes = {dedup.anchor_size(1 << b) for b in bits.tolist()}
    anchors = dedup.Anchors(sorted(sizes))
    for k in range(index.parts):
        anchors.count(texts.part(k))
    for k in range(index.parts):
        low, high = index.part_starts[k : k + 2]
        anchors.choose(int(low), texts.part(k), wanted[low:high])
    anchors.freeze()
    return anchors


def drop_near(
    cfg: CurateConfig, index: Index, texts: Texts, read: Stage, root: Path, before: Stage
) -> tuple[Stage, dict[str, int]]:
    """Rows nearly the same as an earlier one go; how many comparisons were made and left out."""
    settings = {"near": cfg.near, "bucket": cfg.near_bucket}
    stage = Stage(root, "near", settings, before.key)
    counts = {"compared": 0, "not_compared": 0}
    if not cfg.near:
        return stage, counts
    near = None
    if not all(stage.has(k) for k in range(index.parts)):
        near = _near(cfg, index, texts, read)
        # What earlier processes decided makes the state to go on from.
        for k in range(index.parts):
            if not stage.has(k):
                break
            gone = set(stage.load(k)["rows"].tolist())
            for row in index.alive(k).tolist():
                if row not in gone:
                    near.add(row)
        for k in stage.todo(range(index.parts), "near repeats"):
            found, compared, skipped = [], near.compared, near.skipped
            for row in index.alive(k).tolist():
                partner, similarity = near.find(row)
                if partner < 0:
                    near.add(row)
                else:
                    found.append((row, partner, similarity))
            stage.save(
                k,
                rows=np.array([f[0] for f in found], np.int64),
                partner=np.array([f[1] for f in found], np.int64),
                similarity=np.array([f[2] for f in found], np.float32),
                counts=np.array([near.compared - compared, near.skipped - skipped]),
            )
    for k in range(index.parts):
        found = stage.load(k)
        index.drop(found["rows"], "near", found["partner"], found["similarity"])
        counts["compared"] += int(found["counts"][0])
        counts["not_compared"] += int(found["counts"][1])
    return stage, counts


def _near(cfg: CurateConfig, index: Index, texts: Texts, read: Stage) -> dedup.Near:
    """The bands' groups, one band in memory at a time."""
    bands, _ = dedup.choose_bands(cfg.near, cfg.near_permutations, cfg.near_recall)
    groups = np.empty((bands, len(index)), np.int32)
    for band in range(bands):
        codes = [read.array(f"bands-{k:05d}", f"band_{band}") for k in range(index.parts)]
        groups[band] = dedup.shared_groups(np.concatenate(codes))
    code = TokenCodes()

    def shingles_of(row: int) -> frozenset:
        tokens = code(filters.tokens(texts[row].decode()))
        return frozenset(filters.shingles(tokens, cfg.near_shingle).tolist())

    return dedup.Near(groups, shingles_of, cfg.near, cfg.near_bucket)


def apply_rates(cfg: CurateConfig, index: Index, rates: np.ndarray) -> None:
    """Rows too hard or too easy go (too hard first, where both hold)."""
    index.rates = rates
    stays = index.reason == 0
    hard = stays & filters.too_hard(rates, cfg)
    index.drop(np.flatnonzero(hard), "too_hard")
    index.drop(np.flatnonzero(stays & ~hard & filters.too_easy(rates, cfg)), "too_easy")
