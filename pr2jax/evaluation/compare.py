"""Several checkpoints on the same suites: figures, paired differences, and the report of them.

A suite's figures are means over its problems. Those of a domain, and of all, are means over
suites of the suites' means (of their problems of the domain), so that a suite of 30 problems
counts as much as one of 800; their intervals resample problems within suites. A figure is given
over several suites where all of them have it. The first checkpoint is the base: differences from
it are taken problem by problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pr2jax.evaluation import report
from pr2jax.evaluation.cells import Cell
from pr2jax.evaluation.passk import Interval, macro_interval, paired_interval
from pr2jax.evaluation.report import Section, Tile
from pr2jax.tasks.base import DOMAINS

# checkpoint -> suite -> cell; every checkpoint has every suite, in the same order.
Grid = Mapping[str, Mapping[str, Cell]]

OVERALL = "overall"


def domains(cells: Mapping[str, Cell]) -> list[str]:
    """The domains that the suites' problems are of, in the order of DOMAINS, others last."""
    found = {d for cell in cells.values() for d in cell.domains}
    return [d for d in DOMAINS if d in found] + sorted(found - set(DOMAINS))


def macro_names(cells: Sequence[Cell]) -> list[str]:
    """Figures that all of the cells have: "avg" and those of the k that they share."""
    ks = [k for k in cells[0].ks if all(k in cell.ks for cell in cells)]
    named = ["avg", *(f"pass@{k}" for k in ks)]
    for kind in ("best", "worst", "maj"):
        named += [f"{kind}@{k}" for k in ks if k > 1]
    return [*named, "length", "truncated"]


def macro(cells: Mapping[str, Cell], domain: str = "") -> dict[str, Interval]:
    """Means over suites of a domain's figures (empty: of all problems)."""
    found = [c for c in cells.values() if c.of_domain("avg", domain) is not None]
    return {
        name: macro_interval([c.of_domain(name, domain) for c in found])
        for name in macro_names(found)
    }


def figures(cells: Mapping[str, Cell]) -> dict[str, dict[str, dict[str, Interval]]]:
    """{"suites": {NAME: {metric: Interval}}, "domains": the same, "overall": {metric: Interval}}"""
    return {
        "suites": {name: cell.metrics for name, cell in cells.items()},
        "domains": {domain: macro(cells, domain) for domain in domains(cells)},
        OVERALL: macro(cells),
    }


def differences(base: Mapping[str, Cell], other: Mapping[str, Cell]) -> dict[str, Any]:
    """other - base in the shape of `figures`, problem by problem.

    Raises ValueError where they are not of the same suites, samples and problems.
    """
    if list(base) != list(other):
        raise ValueError(f"suites {list(base)} of the base, {list(other)} of the other")
    for name, cell in base.items():
        ids = [[s.problem.id for s in c.samples] for c in (cell, other[name])]
        if ids[0] != ids[1] or cell.n != other[name].n:
            raise ValueError(f"{name}: not the same problems and samples in both checkpoints")

    def over_suites(domain: str = "") -> dict[str, Interval]:
        found = [n for n, c in base.items() if c.of_domain("avg", domain) is not None]
        out = {}
        for metric in macro_names([base[n] for n in found]):
            pairs = [(base[n].of_domain(metric, domain), other[n]) for n in found]
            out[metric] = macro_interval([c.of_domain(metric, domain) - b for b, c in pairs])
        return out

    suites = {
        name: {m: paired_interval(v, other[name].per_problem[m]) for m, v in own.items()}
        for name, own in ((name, cell.per_problem) for name, cell in base.items())
    }
    by_domain = {domain: over_suites(domain) for domain in domains(base)}
    return {"suites": suites, "domains": by_domain, OVERALL: over_suites()}


def to_json(found: Any) -> Any:
    """Intervals as {value, low, high}."""
    if isinstance(found, Interval):
        return {"value": found.mean, "low": found.low, "high": found.high}
    return {key: to_json(value) for key, value in found.items()}


def differences_json(found: Any) -> Any:
    """As `to_json`, each with `excludes_zero`."""
    if isinstance(found, Interval):
        return to_json(found) | {"excludes_zero": found.excludes_zero}
    return {key: differences_json(value) for key, value in found.items()}


def show_difference(value: Interval) -> str:
    """ "+0.120 [0.050, 0.190] *", the star where the interval excludes 0."""
    star = " *" if value.excludes_zero else ""
    return f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]{star}"


def _rows(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Interval]]]:
    """(label, figures) of the suites, the domains and all."""
    rows = list(found["suites"].items())
    rows += [(f"domain {name}", own) for name, own in found["domains"].items()]
    return [*rows, (OVERALL, found[OVERALL])]


def _mean_score(own: Mapping[str, Interval]) -> tuple[str, Interval]:
    name = next(m for m in own if m.partition("@")[0] == "avg")
    return name, own[name]


def _scores_section(grid: Grid, found: Mapping[str, Any], gaps: Mapping[str, Any]) -> Section:
    """Mean scores of all checkpoints, and what each gains over the base."""
    base = next(iter(grid))
    others = [name for name in grid if name != base]
    rows, bars = [], []
    for i, (label, own) in enumerate(_rows(found[base])):
        metric, _ = _mean_score(own)
        row = [label, metric]
        for name in grid:
            value = _mean_score(_rows(found[name])[i][1])[1]
            row.append(value)
            bars.append((f"{label}, {name}" if len(grid) > 1 else label, value))
        row += [show_difference(_mean_score(_rows(gaps[name])[i][1])[1]) for name in others]
        rows.append(row)
    text = (
        "Mean scores with 95% bootstrap intervals over problems. Domains and the last row are "
        "means over suites, each counting the same."
    )
    if others:
        text += (
            f" Differences are from {base}, problem by problem; a star marks an interval that "
            "excludes 0 (one comparison each: with many, some do by chance)."
        )
    header = ["", "", *grid, *(f"{name} - {base}" for name in others)]
    return Section("Scores", [text, report.table(header, rows), report.intervals(bars)])


def _suite_section(name: str, grid: Grid, found: Any, gaps: Any, transcripts: int) -> Section:
    """All figures of a suite, and responses side by side."""
    base = next(iter(grid))
    others = [label for label in grid if label != base]
    rows = [
        [metric, *(found[label]["suites"][name][metric] for label in grid)]
        + [show_difference(gaps[label]["suites"][name][metric]) for label in others]
        for metric in found[base]["suites"][name]
    ]
    cell = grid[base][name]
    blocks: list[str] = [
        f"{len(cell.samples)} problems, {cell.n} samples each.",
        report.table(["", *grid, *(f"{label} - {base}" for label in others)], rows),
    ]
    if transcripts:
        columns = [(label, cells[name].samples) for label, cells in grid.items()]
        blocks.append(report.side_by_side(columns, limit=transcripts, responses=2))
    return Section(name, blocks)


def _checks_section(grid: Grid, missing: Mapping[str, str]) -> Section:
    """What could not be judged, and what did not run."""
    rows = [
        [label, name, sum(cell.failures.values()), _kinds(cell.failures), round(cell.seconds, 1)]
        for label, cells in grid.items()
        for name, cell in cells.items()
    ]
    blocks = [
        "Responses that a verifier could not judge within its limits score 0.",
        report.table(["checkpoint", "suite", "not judged", "why", "seconds"], rows),
    ]
    if missing:
        blocks.append(
            report.table(["suite", "why it did not run"], list(missing.items()), "Missing suites")
        )
    return Section("What was not judged, and what did not run", blocks)


def _kinds(failures: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in failures.items() if count)


def write_page(
    path: Any,
    grid: Grid,
    missing: Mapping[str, str],
    about: Section,
    *,
    transcripts: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes the report; (figures, differences from the base) of each checkpoint."""
    found = {label: figures(cells) for label, cells in grid.items()}
    base = next(iter(grid))
    gaps = {label: differences(grid[base], cells) for label, cells in grid.items() if label != base}
    tiles = []
    for label in grid:
        note = (
            f"{show_difference(gaps[label][OVERALL]['avg'])} over {base}" if gaps.get(label) else ""
        )
        tiles.append(Tile(label, str(found[label][OVERALL]["avg"]), note or "mean over suites"))
    count = len(grid[base])
    report.write_report(
        path,
        "Evaluation",
        [
            _scores_section(grid, found, gaps),
            *(_suite_section(name, grid, found, gaps, transcripts) for name in grid[base]),
            _checks_section(grid, missing),
            about,
        ],
        subtitle=f"{len(grid)} checkpoints on {count} suites; {len(missing)} suites missing",
        tiles=tiles,
    )
    return found, gaps
