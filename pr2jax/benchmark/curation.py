"""What curation finds of what was planted, and its cost: `python -m pr2jax.benchmark curate`."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pr2jax.benchmark import table
from pr2jax.benchmark.commands import Options
from pr2jax.benchmark.planted import SIMILARITY, Planted
from pr2jax.benchmark.sides import BenchmarkError, our_side

_NEAR_FOUND = 0.95


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def curate(options: Options) -> tuple[dict[str, Any], str]:
    """Curation of rows with planted repeats and leaks; the report and its text.

    Raises BenchmarkError where an exact repeat, one inside another or a leak is missed, fewer than
    95% of the near ones are found, or a row is called a leak that is none.
    """
    planted = Planted(options.sizes.rows)
    with tempfile.TemporaryDirectory(prefix="pr2jax_curate_") as scratch:
        start = time.monotonic()
        inputs, sets = planted.write(Path(scratch) / "data")
        made = time.monotonic() - start
        size = sum(Path(path).stat().st_size for path in inputs)
        print(f"[pr2jax] {planted.rows:,} rows made in {made:.0f} s", file=sys.stderr, flush=True)
        message = {
            "inputs": inputs,
            "against": list(sets.values()),
            "workdir": str(Path(scratch) / "work"),
            "settings": {"near": SIMILARITY},
        }
        rounds = []
        with our_side("pr2jax", "curate") as side:
            ready = side.ask(message)
            for number in range(options.repeats):
                answer = side.ask({"round": number})
                folder = Path(answer["workdir"])
                found = planted.compare(
                    _lines(folder / "dropped.jsonl"), _lines(folder / "contamination.jsonl")
                )
                rounds.append(answer | {"found": found})
    found, summary = rounds[0]["found"], rounds[0]["summary"]
    seconds = [sum(r["summary"]["seconds"].values()) for r in rounds]
    report = {
        "rows": [],
        "curation": {
            "rows": planted.rows,
            "input_bytes": size,
            **found,
            "dropped": summary["rows"],
            "near": summary["near"],
            "seconds": table.spread(seconds),
            "cpu_seconds": table.spread([r["cpu_seconds"] for r in rounds]),
            "stages": {
                name: table.spread([r["summary"]["seconds"][name] for r in rounds])
                for name in summary["seconds"]
            },
            "rows_per_second": table.spread([planted.rows / s for s in seconds]),
            "peak_rss_bytes": max(r["peak_rss_bytes"] for r in rounds),
            "prepare_peak_rss_bytes": ready["peak_rss_bytes"],
        },
        "machine": ready["versions"],
    }
    for answer in rounds:
        _check(answer["found"])
    return report, _text(report["curation"])


def _check(found: dict[str, Any]) -> None:
    for kind, figures in found["planted"].items():
        least = _NEAR_FOUND * figures["planted"] if kind == "near" else figures["planted"]
        if figures["found"] + figures["dropped_otherwise"] < least:
            raise BenchmarkError(f"{kind}: {figures['found']} of {figures['planted']} found")
    if any(found["false_hits"].values()):
        raise BenchmarkError(f"called a leak, and none: {found['false_hits']}")


def _text(figures: dict[str, Any]) -> str:
    lines = [
        [kind, *(f"{found[key]:,}" for key in ("planted", "found", "dropped_otherwise"))]
        for kind, found in figures["planted"].items()
    ]
    header = ["planted", "rows", "found", "gone for another reason"]
    stages = ", ".join(f"{name} {s['median']:.1f}" for name, s in figures["stages"].items())
    return "\n".join(
        [
            f"curation of {figures['rows']:,} rows, {figures['input_bytes'] / 1e6:,.0f} MB",
            table.render(header, lines),
            f"fresh rows dropped: {figures['fresh_dropped']:,}; hits in the clean set: "
            f"{figures['false_hits']['clean']:,}",
            f"{figures['rows_per_second']['median']:,.0f} rows/s "
            f"({figures['seconds']['median']:.1f} s; {stages}); "
            f"{figures['cpu_seconds']['median']:.1f} s of CPU time",
            f"peak memory {figures['peak_rss_bytes'] / 1e6:,.0f} MB, "
            f"{figures['prepare_peak_rss_bytes'] / 1e6:,.0f} MB of it before the first row",
        ]
    )
