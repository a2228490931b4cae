"""Figures as aligned plain text, and the statistics in them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def spread(values: Sequence[float]) -> dict[str, Any]:
    """{median, min, max, all}."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": list(values),
    }


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, in full; a dash for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def compared(report: dict[str, Any], unit: str) -> str:
    """The table of `rows` and `ratios`."""
    rows = report["rows"]
    parts = list(dict.fromkeys(name for row in rows for name in row["parts"]))
    header = ["", f"{unit}/s", "s/step", "min", "max", *(f"{p} s" for p in parts)]
    header += ["GFLOP/s", "of peak", "RSS GB", "compile s", "faster than"]
    lines = []
    for row in rows:
        ratios = [
            f"{r['median']:.2f}x {r['to']} ({r['min']:.2f}-{r['max']:.2f})"
            for r in report["ratios"]
            if r["row"] == row["name"]
        ]
        seconds, rate = row["seconds"], row["flops_per_second"]
        share = row["share_of_peak"]
        lines.append(
            [
                row["name"],
                number(row["per_second"]["median"], 4),
                *(number(seconds[k]) for k in ("median", "min", "max")),
                *(number(row["parts"].get(p, {}).get("median")) for p in parts),
                number(None if rate is None else rate / 1e9),
                "-" if share is None else f"{share:.0%}",
                f"{row['peak_rss_bytes'] / 1e9:.2f}",
                number(row["compile_seconds"]),
                ", ".join(ratios),
            ]
        )
    return render(header, lines)


def peaks_line(rows: Sequence[dict[str, Any]]) -> str:
    """What "of peak" refers to."""
    found = {}
    for row in rows:
        library = "jax" if row["side"] == "ours" else "torch"
        found.setdefault(f"{library} {row['dtype']}", row["peak_flops"])
    told = ", ".join(f"{key} {value / 1e9:,.0f} GFLOP/s" for key, value in found.items())
    return f"peak, a 2048 x 2048 x 2048 product: {told}"
