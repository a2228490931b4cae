"""Curation's report: what came in, what went and why, and what hit what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pr2jax.core import plots
from pr2jax.evaluation import report as page
from pr2jax.train.config import Config
from pr2jax.train.curate_work import Index

SHOWN = 50  # near repeats and leaks of the page; the files have all
_LETTERS = 600
_NAMES = {
    "exact": "the same",
    "contained": "inside another",
    "near": "nearly the same",
    "contaminated": "in an evaluation set",
    "too_long": "too long",
    "too_hard": "too hard",
    "too_easy": "too easy",
}


def write_curate_report(
    root: Path,
    cfg: Config,
    summary: dict[str, Any],
    index: Index,
    examples: dict[str, list[dict[str, Any]]],
) -> None:
    """Writes WORKDIR/report.html. `examples`: the first of near.jsonl and contamination.jsonl."""
    rows = summary["rows"]
    tiles = [
        page.Tile("Read", f"{rows['read']:,}", f"{rows['malformed']:,} malformed"),
        page.Tile("Kept", f"{rows['kept']:,}", f"{rows['kept'] / rows['read']:.1%}"),
        page.Tile("Repeats", f"{sum(rows[r] for r in ('exact', 'contained', 'near')):,}"),
        page.Tile("In an evaluation set", f"{rows['contaminated']:,}"),
    ]
    sections = [_counts(summary), _figures(cfg, index), _near(summary, examples["near"])]
    sections += [_leaks(cfg, summary, examples["contaminated"]), _work(summary)]
    inputs = ", ".join(Path(path).name for path in cfg.curate.inputs)
    page.write_report(
        root / "report.html", "Curation", sections, subtitle=f"of {inputs}", tiles=tiles
    )


def _counts(summary: dict[str, Any]) -> page.Section:
    header = ["read", "malformed", *_NAMES.values(), "kept"]
    keys = ["read", "malformed", *_NAMES, "kept"]
    found = summary["by_source"]
    lines = [[row["domain"], row["source"] or "(none)", *(row[k] for k in keys)] for row in found]
    total = ["all", "", *(sum(row[k] for row in found) for k in keys)]
    files = [[row["file"], *(row[k] for k in keys)] for row in summary["by_file"]]
    return page.Section(
        "What stayed, and why the rest did not",
        [
            "A row goes by the first reason that holds, from left to right. Of two that are the "
            "same, the earlier stays, so the files' order is their priority.",
            page.table(["domain", "source", *header], [*lines, total], "By data source"),
            page.table(["file", *header], files, "By file"),
            "Each row that went, with its reason and its partner: dropped.jsonl; what could not "
            "be read: malformed.jsonl.",
        ],
    )


def _figures(cfg: Config, index: Index) -> page.Section:
    kept = index.reason == 0
    chars = index.chars.astype(np.float64)
    edges = np.geomspace(max(chars.min(), 1.0), chars.max() + 1.0, 41)
    shown = [
        (
            plots.histogram(
                {"read": chars, "kept": chars[kept]},
                edges,
                title="Length of the question",
                xlabel="characters",
                log_x=True,
            ),
            "As compared: single spaces, without boilerplate.",
        )
    ]
    if cfg.curate.difficulty != "none":
        rates = dict(zip(cfg.curate.columns(), index.rates.T, strict=True))
        edges = np.linspace(0.0, 1.0, 18)  # 16 samples: a bin for each rate
        for name, values in (("all that were rated", slice(None)), ("kept", kept)):
            picked = {column: rate[values] for column, rate in rates.items()}
            figure = plots.histogram(picked, edges, title="Pass rates", xlabel="pass rate")
            shown.append((figure, f"Of {name}."))
    return page.Section("Lengths and difficulty", [page.figures(shown)])


def _near(summary: dict[str, Any], examples: list[dict[str, Any]]) -> page.Section:
    count = summary["rows"]["near"]
    left_out = summary["near"]["not_compared"]
    blocks = [
        f"{summary['near']['compared']:,} pairs that share a MinHash band were compared by their "
        f"shingles; {left_out:,} were not, as more than near_bucket questions shared the band.",
        f"{min(count, SHOWN):,} of {count:,} shown; near.jsonl has all.",
    ]
    lines = [
        [e["row"], e["of"], e["similarity"], _cut(e["text"]), _cut(e["of_text"])] for e in examples
    ]
    header = ["row", "kept in its place", "similarity", "its text", "the other's"]
    return page.Section(
        "Nearly the same", [*blocks, page.table(header, lines)] if lines else blocks
    )


def _leaks(cfg: Config, summary: dict[str, Any], examples: list[dict[str, Any]]) -> page.Section:
    looked = summary["contamination"]
    if not looked["sets"]:
        return page.Section("Evaluation sets", ["None was given: curate.against is empty."])
    curate = cfg.curate
    sets = page.table(["set", "items"], list(looked["sets"].items()))
    blocks: list[str] = [
        f"A row that has {curate.ngram} words in a run in common with an item; all words of an "
        f"item of {curate.short_words} to {curate.ngram - 1}; or exactly the words of one.",
        sets,
        f"Not counted: {looked['common_sequences']:,} sequences that are mostly wording, of "
        f"their set or of many rows, and {looked['cell_sequences']:,} that are mostly single "
        f"digits; {looked['unspecific_items']:,} items have nothing else: they are found only "
        "whole.",
        f"{len(examples):,} of {looked['hits']:,} shown; contamination.jsonl has all.",
    ]
    lines = [
        [
            *(e["row"], e["set"], e["item"], e["rule"], f"{e['shared']} of {e['of']}"),
            *(e["words"], _cut(e["text"]), _cut(e["item_text"])),
        ]
        for e in examples
    ]
    header = ["row", "set", "item", "rule", "shared", "words", "the row", "the item"]
    return page.Section(
        "Evaluation sets", [*blocks, page.table(header, lines)] if lines else blocks
    )


def _work(summary: dict[str, Any]) -> page.Section:
    seconds = [[name, value] for name, value in summary["seconds"].items()]
    return page.Section(
        "How it was run",
        [
            page.table(["stage", "seconds"], seconds),
            f"{summary['rows_per_second']:,.0f} rows a second; at most "
            f"{summary['peak_memory_bytes'] / 1e6:,.0f} MB of memory.",
            page.settings(summary["config"]["curate"]),
            page.settings(summary["versions"], "Versions"),
        ],
    )


def _cut(text: str) -> str:
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]} ... ({len(text)} characters)"
