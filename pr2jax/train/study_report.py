"""What a study's runs show together: figures of each run, means over seeds, tables and pictures.

A run's figures are means over its steady rollout batches (`study.steady_from` on), flat by name:

  mini_I/NAME    at mini-step I; also as window/NAME (mean over mini-steps) and last/NAME
  reward, entropy, ...    of the batch; reward_end: over the last fifth of the run
  probe/MOMENT/NAME       of train/probe.py
  seconds                 wall time of a batch (median)

Derived NAMEs: `zero_deviation_gain`, `agreement_gain`: the used route minus the un-shifted old one
on the same tokens, batch by batch; `kl_gain`: KL of the old logits minus that of the shifted ones;
`log_ratio_std`. Over seeds: mean and 95% interval by Student's t (none for a single seed);
`against`: differences to another cell, seed by seed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from pr2jax.core.metrics import read_jsonl, write_json
from pr2jax.core.plots import curve
from pr2jax.evaluation import report as page
from pr2jax.evaluation.report import Section
from pr2jax.train.config import Config

if TYPE_CHECKING:
    from pr2jax.train.study import Job

Figures = dict[str, float]
Summary = dict[str, dict[str, Any]]

_MINI = re.compile(r"mini_(\d+)/(.+)")
# Of every mini-step; others stay in the runs' own metrics.jsonl.
_KEPT = (
    "zero_deviation",
    "agreement",
    "paired_zero_deviation",
    "old_route_zero_deviation",
    "zero_deviation_gain",
    "paired_agreement",
    "old_route_agreement",
    "agreement_gain",
    "predictor_loss",
    "old_logits_kl",
    "shifted_logits_kl",
    "kl_gain",
    "log_ratio_std",
    "ratio_max",
    "clip_low",
    "clip_high",
    "shift_ratio",
)
_BATCH = ("reward", "entropy", "response_length", "kept_groups", "mismatch/abs", "grad_norm")


def derived(row: Mapping[str, Any]) -> dict[str, float]:
    """The kept numbers of one mini-step (names without `mini_I/`), with those derived from them."""
    out = {k: v for k, v in row.items() if isinstance(v, int | float)}
    for name in ("zero_deviation", "agreement"):
        used, old = out.get(f"paired_{name}"), out.get(f"old_route_{name}")
        if used is not None and old is not None:
            out[f"{name}_gain"] = used - old
    if "old_logits_kl" in out:
        shifted = out.get("shifted_logits_kl", out["old_logits_kl"])
        out["kl_gain"] = out["old_logits_kl"] - shifted
    if "log_ratio_square" in out and "old/k1" in out:
        out["log_ratio_std"] = math.sqrt(max(out["log_ratio_square"] - out["old/k1"] ** 2, 0.0))
    return {k: v for k, v in out.items() if k in _KEPT}


def run_figures(rows: Sequence[Mapping[str, Any]], steady_from: int) -> Figures:
    """A run's figures (see the module) from its rows of metrics; empty where none is steady."""
    steady = [row for row in rows if row["step"] > steady_from]
    gathered: dict[str, list[float]] = {}
    add = lambda key, value: gathered.setdefault(key, []).append(float(value))
    for row in steady:
        by_mini: dict[int, dict[str, Any]] = {}
        for key, value in row.items():
            if found := _MINI.fullmatch(key):
                by_mini.setdefault(int(found[1]), {})[found[2]] = value
            elif (key in _BATCH or key.startswith("probe/")) and isinstance(value, int | float):
                add(key, value)
        for i, mini in by_mini.items():
            for key, value in derived(mini).items():
                add(f"mini_{i}/{key}", value)
    out = {key: float(np.mean(values)) for key, values in gathered.items()}
    count = max((int(m[1]) for key in out if (m := _MINI.fullmatch(key))), default=0)
    for name in _KEPT:
        found = [out[key] for i in range(count) if (key := f"mini_{i + 1}/{name}") in out]
        if found:
            out[f"window/{name}"] = float(np.mean(found))
        if (key := f"mini_{count}/{name}") in out:
            out[f"last/{name}"] = out[key]
    tail = steady[-max(len(steady) // 5, 1) :]
    if steady:
        out["reward_end"] = float(np.mean([row["reward"] for row in tail]))
        took = np.diff([row["time"] for row in steady])
        out["seconds"] = float(np.median(took)) if len(took) else 0.0
    return out


def interval(values: Sequence[float]) -> dict[str, float]:
    """{value: mean, low, high: its 95% interval by Student's t, n}; no low and high for n = 1."""
    values = np.asarray(values, np.float64)
    out = {"value": float(values.mean()), "n": len(values)}
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
        out |= {"low": out["value"] - float(half), "high": out["value"] + float(half)}
    return out


def summarise(runs: Mapping[int, Figures]) -> Summary:
    """{name: interval over the seeds that have it}; `runs`: seed -> figures."""
    names = sorted({name for figures in runs.values() for name in figures})
    return {name: interval([f[name] for f in runs.values() if name in f]) for name in names}


def paired(runs: Mapping[int, Figures], other: Mapping[int, Figures]) -> Summary:
    """Differences runs - other in the seeds that both have, figure by figure."""
    differences = {
        seed: {
            name: runs[seed][name] - other[seed][name] for name in runs[seed].keys() & other[seed]
        }
        for seed in sorted(runs.keys() & other.keys())
    }
    return summarise(differences)


def collect(cfg: Config, jobs: Sequence[Job]) -> dict[str, Any]:
    """study.json: {groups: {group: {cell: {runs, mean, against, versus}}}, done, total}."""
    runs: dict[tuple[str, str], dict[int, Figures]] = {}
    curves: dict[tuple[str, str], list[list[float]]] = {}
    for job in jobs:
        if job.cell is None or not job.done:
            continue
        rows = read_jsonl(job.folder)
        key = (job.cell.group, job.cell.name)
        runs.setdefault(key, {})[job.seed] = run_figures(rows, cfg.study.steady_from)
        curves.setdefault(key, []).append([row["reward"] for row in rows])
    groups: dict[str, dict[str, Any]] = {}
    for cell in cfg.study.cells:
        found = runs.get((cell.group, cell.name), {})
        entry = {
            "overrides": list(cell.overrides),
            "against": cell.against,
            "runs": {str(seed): figures for seed, figures in found.items()},
            "mean": summarise(found),
            "versus": paired(found, runs.get((cell.group, cell.against), {})),
            "reward": _mean_curve(curves.get((cell.group, cell.name), [])),
        }
        groups.setdefault(cell.group, {})[cell.name] = entry
    total = [job for job in jobs if job.cell is not None]
    return {"groups": groups, "done": sum(job.done for job in total), "total": len(total)}


def _mean_curve(curves: list[list[float]]) -> list[float]:
    length = min(map(len, curves), default=0)
    return np.mean([c[:length] for c in curves], axis=0).tolist() if length else []


def show(found: Mapping[str, Any] | None, signed: bool = False, digits: int = 3) -> str:
    """Mean and interval of a figure, where there is one."""
    if not found:
        return ""
    sign = "+" if signed else ""
    text = f"{found['value']:{sign}.{digits}f}"
    if "low" in found:
        text += f" [{found['low']:{sign}.{digits}f}, {found['high']:{sign}.{digits}f}]"
    return text


# Columns: (title, figure, whether it is a difference and so signed, mean or versus).
_Columns = Sequence[tuple[str, str, bool, str]]
_AT_LAST: _Columns = (
    ("used route", "last/paired_zero_deviation", False, "mean"),
    ("old route", "last/old_route_zero_deviation", False, "mean"),
    ("used - old", "last/zero_deviation_gain", True, "mean"),
    ("agreement, used - old", "last/agreement_gain", True, "mean"),
    ("KL of old logits", "last/old_logits_kl", False, "mean"),
    ("KL won by the shift", "last/kl_gain", True, "mean"),
    ("std of log ratio", "last/log_ratio_std", False, "mean"),
)
_LEARNING: _Columns = (
    ("reward", "reward", False, "mean"),
    ("reward, last fifth", "reward_end", False, "mean"),
    ("against the reference", "reward_end", True, "versus"),
    ("std of log ratio, window", "window/log_ratio_std", False, "mean"),
    ("against the reference", "window/log_ratio_std", True, "versus"),
    ("KL of old logits, window", "window/old_logits_kl", False, "mean"),
)
_AT = "probe/last/"
_FORETOLD: _Columns = (
    ("drift / logits", f"{_AT}size", False, "mean"),
    ("oracle R2", f"{_AT}oracle_r2", False, "mean"),
    ("router's own R2", f"{_AT}router_r2", False, "mean"),
    ("momentum R2", f"{_AT}momentum_r2", False, "mean"),
    ("used shift R2", f"{_AT}used_shift_r2", False, "mean"),
    ("window before, R2", f"{_AT}previous_r2", False, "mean"),
    ("cosine to the window before", f"{_AT}cosine", False, "mean"),
    ("cosine of halves", f"{_AT}split_cosine", False, "mean"),
    ("cosine of momentum and dW_r", f"{_AT}momentum_cosine", False, "mean"),
)
_PROBED: _Columns = tuple(
    (kind.replace("_", " "), f"{_AT}{kind}_zero_deviation", False, "mean")
    for kind in ("old", "used", "oracle", "router", "momentum", "used_shift", "previous")
)


def _mini_steps(cells: Mapping[str, Mapping[str, Any]]) -> int:
    """The most mini-steps that a cell has figures of."""
    found = (_MINI.fullmatch(key) for cell in cells.values() for key in cell["mean"])
    return max((int(match[1]) for match in found if match), default=0)


def _rows(cells: Mapping[str, Mapping[str, Any]], columns: _Columns) -> list[list[str]]:
    """A line for each cell that has any of the figures."""
    rows = []
    for name, cell in cells.items():
        shown = [
            show(cell[where].get(key), signed, 5 if "kl" in key else 3)
            for _, key, signed, where in columns
        ]
        if any(shown):
            rows.append([name, str(len(cell["runs"])), *shown])
    return rows


def tables(cells: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(caption, header, rows) of one group of cells; a cell without a run is left out."""
    count = _mini_steps(cells)

    def by_mini(key: str, signed: bool = False, where: str = "mean") -> _Columns:
        places = [(str(i), f"mini_{i}/{key}") for i in range(1, count + 1)]
        places.append(("whole window", f"window/{key}"))
        return [(title, figure, signed, where) for title, figure in places]

    wanted = {
        "Zero deviation of the used route, response tokens, by mini-step (where routes are live: "
        "of the route that was logged)": by_mini("zero_deviation"),
        "Used minus un-shifted old route, zero deviation on the same tokens, by mini-step": by_mini(
            "zero_deviation_gain", True
        ),
        "Agreement of the used route, by mini-step": by_mini("agreement"),
        "Zero deviation minus that of the reference cell, paired by seed": by_mini(
            "zero_deviation", True, "versus"
        ),
        "At the last mini-step": _AT_LAST,
        "Learning": _LEARNING,
        "Probes: what foretells the drift that the last mini-step meets": _FORETOLD,
        "Probes: zero deviation of the routes that each would choose, last mini-step": _PROBED,
    }
    head = lambda columns: ["", "seeds", *(title for title, *_ in columns)]
    return [(caption, head(columns), _rows(cells, columns)) for caption, columns in wanted.items()]


def markdown(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its caption above."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return f"{title}\n\n" + "\n".join(lines) + "\n"


def _by_mini_figure(cells: Mapping[str, Any], key: str, title: str) -> str:
    """A curve over mini-steps for each cell, with its interval."""
    count = _mini_steps(cells)
    rows = [{"mini-step": float(i)} for i in range(1, count + 1)]
    for name, cell in cells.items():
        for i, row in enumerate(rows, start=1):
            found = cell["mean"].get(f"mini_{i}/{key}")
            if found:
                row[name] = found["value"]
                row |= {f"{name}/{end}": found[end] for end in ("low", "high") if end in found}
    bands = {name: (f"{name}/low", f"{name}/high") for name in cells}
    named = {name: name for name in cells}
    return curve(rows, named, interval=bands, title=title, x="mini-step", size=(5.6, 3.6))


def _reward_figure(cells: Mapping[str, Any]) -> str:
    longest = max((len(c["reward"]) for c in cells.values()), default=0)
    rows = [{"batch": float(i + 1)} for i in range(longest)]
    for name, cell in cells.items():
        for row, value in zip(rows, cell["reward"], strict=False):
            row[name] = value
    named = {name: name for name in cells}
    return curve(rows, named, title="reward", x="batch", smooth=0.9, size=(5.6, 3.6))


def _group_section(group: str, cells: Mapping[str, Any], root: Path) -> tuple[Section, str]:
    """A group's part of the page and of study.md; its pictures are written to figures/."""
    title = group or "Cells"
    shown = [table for table in tables(cells) if table[2]]
    pictures = {
        "zero_deviation": (
            _by_mini_figure(cells, "zero_deviation", "zero deviation"),
            "Share of response tokens whose used experts are the live ones in all layers.",
        ),
        "gain": (
            _by_mini_figure(cells, "zero_deviation_gain", "used - old, zero deviation"),
            "What the shift of the selection won (or lost), on the same tokens.",
        ),
        "reward": (_reward_figure(cells), "Mean over seeds, smoothed."),
    }
    return group_page(title, pictures, shown, root)


def group_page(
    title: str,
    pictures: Mapping[str, tuple[str, str]],
    shown: Sequence[tuple[str, list[str], list[list[str]]]],
    root: Path,
) -> tuple[Section, str]:
    """A group's part of the page and of study.md, of {name: (svg, caption)} and of tables
    (caption, header, rows); the pictures are also written to figures/."""
    (root / "figures").mkdir(exist_ok=True)
    for name, (svg, _) in pictures.items():
        path = root / "figures" / f"{re.sub(r'[^a-z0-9.]+', '_', title.lower())}_{name}.svg"
        path.write_text(svg, encoding="utf-8")
    blocks = [page.table(head, rows, caption) for caption, head, rows in shown]
    text = "\n".join([f"## {title}\n", *(markdown(*table) for table in shown)])
    return Section(title, [page.figures(list(pictures.values())), *blocks]), text


def write(cfg: Config, root: Path, jobs: Sequence[Job], failed: Sequence[str]) -> None:
    """study.json, study.md, report.html and figures/*.svg of all runs that are done."""
    found = collect(cfg, jobs) | {"failed": list(failed)}
    found["settings"] = {
        "steps": cfg.rl.steps,
        "steady_from": cfg.study.steady_from,
        "learning_rate": cfg.rl.optim.learning_rate,
    }
    notes = [
        f"{found['done']} of {found['total']} runs are done; {len(failed)} failed. Means over the "
        f"rollout batches after the first {cfg.study.steady_from} of {cfg.rl.steps}; intervals: "
        "95%, Student's t over seeds.",
    ]
    settings = [page.settings(found["settings"], "Settings")]
    write_pages(found, notes, settings, _group_section, root)


def write_pages(
    found: Mapping[str, Any],
    notes: Sequence[str],
    settings: Sequence[page.Html],
    group_section: Callable[[str, Mapping[str, Any], Path], tuple[Section, str]],
    root: Path,
) -> None:
    """study.json, study.md and report.html of `found` ({groups: {group: {cell: {mean, overrides,
    ...}}}, failed}): notes, then a part for each group that has a run."""
    write_json(root / "study.json", found)
    notes = [*notes, *(["Failed: " + "; ".join(found["failed"])] if found["failed"] else [])]
    text, sections = ["# Study\n", *(f"{note}\n" for note in notes)], []
    for group, cells in found["groups"].items():
        there = {name: cell for name, cell in cells.items() if cell["mean"]}
        if there:
            section, part = group_section(group, there, root)
            sections.append(section)
            text.append(part)
    overrides = {
        f"{group} {name}": " ".join(cell["overrides"])
        for group, cells in found["groups"].items()
        for name, cell in cells.items()
    }
    blocks = [*notes, *settings, page.settings(overrides, "Cells")]
    sections.insert(0, Section("The study", blocks))
    (root / "study.md").write_text("\n".join(text), encoding="utf-8")
    page.write_report(root / "report.html", "Study", sections, subtitle=root.name)
