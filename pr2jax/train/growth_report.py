"""What a study of growing pools shows: final losses, what growth saved, what each growth did.

A run's figures, flat by name:

  loss, bits_per_byte    held out, at the end
  gini, dead             of expert usage, mean of the last fifth of the steps
  step_seconds/E         median step of the stage with E experts
  seconds                sum over stages of steps times that median: without compiling or pauses
  predicted_saving       the plan's, from step times measured before the run
  growth_I/jump, /spike, /recovery_steps    at the I-th change of the pool: jump of the held-out
                         loss; most that the training loss (mean of RECOVERY_WINDOW steps) rose
                         above what it was; steps until it was back there (none: never)

and against other cells, seed by seed (`against` names the fixed pool of the last stage's size):

  excess          (L - L_full) / L_full
  gap_recovered   (L_half - L) / (L_half - L_full), with the fixed pool of half the size
  saving          1 - seconds / seconds_full
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pr2jax.core.metrics import SUMMARY, read_jsonl
from pr2jax.core.plots import curve
from pr2jax.evaluation.report import Section
from pr2jax.train.config import Config
from pr2jax.train.emo import RECOVERY_WINDOW, seconds_per_token
from pr2jax.train.study_report import (
    Figures,
    group_page,
    paired,
    show,
    summarise,
    write_pages,
)

if TYPE_CHECKING:
    from pr2jax.train.study import Job

Rows = list[dict[str, Any]]
_POINTS = 200  # of a curve in a figure


def run_rows(folder: Path) -> list[Rows]:
    """metrics.jsonl of a run, a list for each of its stages (one for a run that grows nothing)."""
    stages = sorted(folder.glob("stage_*"), key=lambda p: int(p.name.partition("_")[2]))
    stages = [read_jsonl(stage) for stage in stages or [folder]]
    return [[row for row in stage if "loss" in row] for stage in stages]  # not those of step 0


def stages_of(config: Mapping[str, Any], summary: Mapping[str, Any]) -> list[int]:
    """Experts that take part in each stage."""
    if "stages" in summary:
        return [stage["experts"] - stage["masked"] for stage in summary["stages"]]
    moe = config["model"]["moe"]
    return [moe["num_experts"]] if moe else [0]


def run_figures(stages: list[Rows], pools: list[int], summary: Mapping[str, Any]) -> Figures:
    """A run's figures (see the module)."""
    pretrain = summary["config"]["pretrain"]
    tokens = pretrain["batch"] * pretrain["row_length"]
    rows = [row for stage in stages for row in stage]
    out = {name: figure["value"] for name, figure in summary["end"].items() if "/" not in name}
    tail = rows[-max(len(rows) // 5, 1) :]
    for name, key in (("gini", "load_gini"), ("dead", "load_dead")):
        if key in tail[-1]:
            out[name] = float(np.mean([row[key] for row in tail]))
    out["seconds"] = 0.0
    for pool, stage in zip(pools, stages, strict=True):
        seconds = tokens * seconds_per_token(stage)
        out[f"step_seconds/{pool}"] = seconds
        out["seconds"] += seconds * len(stage)
    if summary.get("predicted_saving") is not None:
        out["predicted_saving"] = summary["predicted_saving"]
    losses = np.array([row["loss"] for row in rows])
    means = np.convolve(losses, np.ones(RECOVERY_WINDOW) / RECOVERY_WINDOW, "valid")
    lengths = np.cumsum([len(stage) for stage in stages]).tolist()
    for i, event in enumerate(summary.get("growth", ()), start=1):
        out[f"growth_{i}/jump"] = event["jump"]
        if event["recovery_steps"] is not None:
            out[f"growth_{i}/recovery_steps"] = float(event["recovery_steps"])
        # means[j] is over the RECOVERY_WINDOW steps that end with step j + RECOVERY_WINDOW.
        at, last = event["step"] - RECOVERY_WINDOW, lengths[event["phase"]] - RECOVERY_WINDOW
        if 0 <= at < last:
            out[f"growth_{i}/spike"] = float(np.max(means[at + 1 : last + 1]) - means[at])
    return out


def run_curve(stages: list[Rows], summary: Mapping[str, Any]) -> Rows:
    """{tokens, seconds, loss, gini} of a run by step: the held-out loss where it was measured."""
    pretrain = summary["config"]["pretrain"]
    tokens = pretrain["batch"] * pretrain["row_length"]
    out, elapsed, done = [], 0.0, 0
    for stage in stages:
        each = tokens * seconds_per_token(stage)
        for row in stage:
            elapsed, done = elapsed + each, done + 1
            found = {"tokens": float(done * tokens), "seconds": elapsed}
            found |= {"loss": row["eval/loss"]} if "eval/loss" in row else {}
            found |= {"gini": row["load_gini"]} if "load_gini" in row else {}
            out.append(found)
    return out


def mean_curve(curves: Sequence[Rows]) -> Rows:
    """Mean over seeds, step by step, of what all of them have."""
    out = []
    for rows in zip(*curves, strict=False):
        keys = set.intersection(*(set(row) for row in rows))
        out.append({key: float(np.mean([row[key] for row in rows])) for key in keys})
    return out


def relative(runs: Mapping[int, Figures], full: Mapping[int, Figures], half: Mapping[int, Figures]):
    """{seed: excess, gap_recovered, saving} of a growing pool; `half` may be empty."""
    out: dict[int, Figures] = {}
    for seed in sorted(runs.keys() & full.keys()):
        own, other = runs[seed], full[seed]
        out[seed] = {
            "excess": own["loss"] / other["loss"] - 1.0,
            "saving": 1.0 - own["seconds"] / other["seconds"],
        }
        if seed in half and half[seed]["loss"] != other["loss"]:
            gap = half[seed]["loss"] - other["loss"]
            out[seed]["gap"] = gap
            out[seed]["gap_recovered"] = (half[seed]["loss"] - own["loss"]) / gap
    return out


def collect(cfg: Config, jobs: Sequence[Job]) -> dict[str, Any]:
    """study.json: {groups: {group: {cell: {runs, mean, versus, relative, pools, curve}}}}."""
    runs: dict[tuple[str, str], dict[int, Figures]] = {}
    curves: dict[tuple[str, str], list[Rows]] = {}
    pools: dict[tuple[str, str], list[int]] = {}
    for job in jobs:
        if not job.done:
            continue
        summary = json.loads((job.folder / SUMMARY).read_text(encoding="utf-8"))
        key, stages = (job.cell.group, job.cell.name), run_rows(job.folder)
        pools[key] = stages_of(job.config, summary)
        runs.setdefault(key, {})[job.seed] = run_figures(stages, pools[key], summary)
        curves.setdefault(key, []).append(run_curve(stages, summary))
    groups: dict[str, dict[str, Any]] = {}
    for cell in cfg.study.cells:
        key = (cell.group, cell.name)
        found, own = runs.get(key, {}), pools.get(key, [])
        full = runs.get((cell.group, cell.against), {}) if cell.against else {}
        entry = {
            "overrides": list(cell.overrides),
            "against": cell.against,
            "pools": own,
            "runs": {str(seed): figures for seed, figures in found.items()},
            "mean": summarise(found),
            "versus": paired(found, full),
            "relative": {},
            "curve": mean_curve(curves.get(key, [])),
        }
        if len(own) > 1 and pools.get((cell.group, cell.against)) == own[-1:]:
            entry["relative"] = summarise(
                relative(found, full, _half(cfg, cell.group, pools, runs, own))
            )
        groups.setdefault(cell.group, {})[cell.name] = entry
    return {
        "groups": groups,
        "done": sum(job.done for job in jobs),
        "total": len(jobs),
        "tokens_per_step": cfg.pretrain.batch * cfg.pretrain.row_length,
    }


def _half(cfg: Config, group: str, pools, runs, own: list[int]) -> dict[int, Figures]:
    """Runs of the group's first fixed pool that is half as large as `own`'s last."""
    for cell in cfg.study.cells:
        key = (group, cell.name)
        if cell.group == group and pools.get(key) == [own[-1] // 2]:
            return runs[key]
    return {}


def _steps(cell: Mapping[str, Any], last: bool) -> Mapping[str, Any] | None:
    """The interval of a step's seconds in the first or last stage."""
    pools = cell["pools"]
    return cell["mean"].get(f"step_seconds/{pools[-1 if last else 0]}") if pools else None


def tables(cells: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(caption, header, rows) of one group of cells, each with a run; none without a row."""
    ends = []
    for name, cell in cells.items():
        mean, versus = cell["mean"], cell["versus"]
        ends.append(
            [
                *(name, " → ".join(map(str, cell["pools"])), str(len(cell["runs"]))),
                show(mean.get("loss")),
                show(versus.get("loss"), signed=True),
                *(show(mean.get(key)) for key in ("bits_per_byte", "gini", "dead")),
                *(show(_steps(cell, last)) for last in (False, True)),
                show(mean.get("seconds"), digits=0),
            ]
        )
    head = ["", "experts", "seeds", "loss", "against", "bits per byte", "Gini", "dead"]
    head += ["s/step, first", "s/step, last", "seconds"]
    found = [
        (
            "At the end, held out (nats a token), and seconds a step in the first and last stage",
            head,
            ends,
        )
    ]
    grown = [
        [
            *(name, cell["against"]),
            *(show(cell["relative"].get(k), True, 4) for k in ("excess", "gap", "gap_recovered")),
            *(show(cell["relative"].get("saving"), True),),
            *(show(cell["mean"].get("predicted_saving"), True),),
        ]
        for name, cell in cells.items()
        if cell["relative"]
    ]
    head = ["", "against", "(L - L_full) / L_full", "L_half - L_full", "gap recovered"]
    head += ["saving, measured", "saving, predicted"]
    found.append(("What growing costs and saves, paired by seed", head, grown))
    events = []
    for name, cell in cells.items():
        count = max(
            (int(m[1]) for k in cell["mean"] if (m := re.match(r"growth_(\d+)/", k))), default=0
        )
        for i in range(1, count + 1):
            figure = lambda key, i=i, cell=cell: cell["mean"].get(f"growth_{i}/{key}")
            back = figure("recovery_steps")
            short = (
                f" ({back['n']} of {len(cell['runs'])})"
                if back and back["n"] < len(cell["runs"])
                else ""
            )
            events.append(
                [
                    *(name, f"{cell['pools'][i - 1]} → {cell['pools'][i]}"),
                    *(show(figure("jump"), True), show(figure("spike"), True)),
                    show(back, digits=0) + short if back else "never",
                    show(cell["mean"].get("loss")),
                    show(cell["versus"].get("loss"), signed=True),
                ]
            )
    head = ["", "experts", "jump, held out", "spike, training loss", "steps to recover"]
    found.append(("Growth and what came of it", [*head, "final loss", "against"], events))
    return [table for table in found if table[2]]


def _figure(cells: Mapping[str, Any], x: str, y: str, title: str, smooth: float = 0.0) -> str:
    """A metric of every cell over tokens or seconds (mean over seeds)."""
    rows = []
    for name, cell in cells.items():
        points = [point for point in cell["curve"] if y in point]
        shown = points[:: max(len(points) // _POINTS, 1)]
        rows += [{x: point[x], name: point[y]} for point in shown]
    named = {name: name for name in cells}
    return curve(rows, named, title=title, x=x, smooth=smooth, size=(5.6, 3.6))


def _late(cells: Mapping[str, Any]) -> dict[str, Any]:
    """The cells with the second half of their curves: ends are told apart there."""
    half = lambda rows: rows[len(rows) // 2 :]
    return {name: cell | {"curve": half(cell["curve"])} for name, cell in cells.items()}


def _group_section(group: str, cells: Mapping[str, Any], root: Path) -> tuple[Section, str]:
    title = group or "Cells"
    pictures = {
        "tokens": (_figure(cells, "tokens", "loss", "held-out loss"), "Nats a token, by tokens."),
        "tokens_late": (
            _figure(_late(cells), "tokens", "loss", "held-out loss, second half"),
            "The same, second half.",
        ),
        "seconds": (
            _figure(_late(cells), "seconds", "loss", "held-out loss, second half"),
            "By step time: without compiling and pauses.",
        ),
        "gini": (
            _figure(cells, "tokens", "gini", "expert-usage Gini", smooth=0.8),
            "Of assignments over experts, mean of layers: 0 is balance.",
        ),
    }
    return group_page(title, pictures, tables(cells), root)


def write(cfg: Config, root: Path, jobs: Sequence[Job], failed: Sequence[str]) -> None:
    """study.json, study.md, report.html and figures/*.svg of all runs that are done."""
    found = collect(cfg, jobs) | {"failed": list(failed)}
    notes = [
        f"{found['done']} of {found['total']} runs are done; {len(failed)} failed. "
        f"{cfg.pretrain.batch} rows of {cfg.pretrain.row_length} tokens a step "
        f"({found['tokens_per_step']:,} tokens); means over seeds, intervals 95% by Student's t.",
    ]
    write_pages(found, notes, [], _group_section, root)
