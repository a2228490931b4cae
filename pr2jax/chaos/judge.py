"""What became of the trials: against the run left alone, by kind of fault, and what it costs."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from pr2jax.chaos import progress
from pr2jax.chaos.faults import UNSEALED
from pr2jax.chaos.trial import Trial
from pr2jax.core.checkpoint import Checkpointer, read_arrays, read_checkpoint
from pr2jax.train import audit

COUNTS = ("updates", "items", "skipped", "twice", "replayed")
_STEP_S, _SHARE = 30.0, 0.1


def judge(whole: Path, trial: Trial) -> dict[str, Any]:
    """A trial's row: faults, differences, and the counts of its ledger and its last checkpoint."""
    row = {
        "workdir": trial.workdir.name,
        "failed": trial.failed,
        "faults": [dataclasses.asdict(fault) for fault in trial.faults],
        "starts": [dataclasses.asdict(start) for start in trial.starts],
        "orphans": sum(fault.orphans for fault in trial.faults),
    }
    row["kills"] = [fault for fault in row["faults"] if fault["kind"] == "kill"]
    if trial.failed:
        return {**row, "differences": [], **dict.fromkeys(COUNTS, 0)}
    differences, counts = audit.compare_files(whole, trial.workdir), collections.Counter()
    for stage in progress.stages(whole):
        if stage.name == audit.BY_THE_CLOCK:
            continue
        own = trial.workdir / stage.relative_to(whole)
        name = "" if own == trial.workdir else f"{own.name}: "
        differences += [name + line for line in audit.compare_stage(stage, own)]
        if (own / "ledger.jsonl").exists():
            counts.update(audit.account(trial.workdir, own, stage))
        counts["updates"] += audit.updates(own)
        found = audit.rows(own / "metrics.jsonl")
        counts["replayed"] += sum(int(row.get("journal/replayed", 0)) for row in found)
    differences += _untold(trial)
    return {**row, "differences": differences, **{key: counts[key] for key in COUNTS}}


def _untold(trial: Trial) -> list[str]:
    """Damaged checkpoints that no process told of, those without a manifest aside: what they
    came to is in the arrays, which are compared."""
    said = (trial.workdir / "chaos.log").read_text(errors="replace")
    found = []
    for fault in trial.faults:
        if fault.kind in ("torn", "flip") and not fault.detail.endswith(UNSEALED):
            step = re.search(r".*/checkpoints/\d+", fault.detail)[0]
            if not re.search(rf"{re.escape(step)}(/\S*)?: (damaged|cannot be read)", said):
                found.append(f"{fault.detail}: its damage was not told")
    return found


def passed(row: dict[str, Any]) -> bool:
    """Whether a trial is what it must be."""
    bad = ("failed", "differences", "skipped", "twice", "orphans")
    return not any(row[name] for name in bad)


def by_kind(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each kind: `faults`; `survived` (in trials that came through); medians and maxima of
    `restart_s` (start of the next process to its first step), `redone` (steps done again in it)
    and `wait_s` (fault to the end of all processes)."""
    found: Any = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        for i, fault in enumerate(row["faults"]):
            last = row["failed"] and i == len(row["faults"]) - 1
            found[fault["kind"]]["survived"].append(not last)
            found[fault["kind"]]["wait_s"].append(fault["wait_s"])
        for start in row["starts"]:
            if start["after"] and start["restart_s"] is not None:
                found[start["after"]]["restart_s"].append(start["restart_s"])
                found[start["after"]]["redone"].append(start["redone"])
    return {
        kind: {
            "faults": len(lists["survived"]),
            "survived": sum(lists["survived"]),
            **{
                name: [round(float(np.median(lists[name])), 2), max(lists[name])]
                for name in ("restart_s", "redone", "wait_s")
                if lists[name]
            },
        }
        for kind, lists in found.items()
    }


def too_much_again(rows: list[dict[str, Any]], every: int) -> list[str]:
    """Starts that did more steps again than lie between two checkpoints, without a reason: each
    checkpoint that was damaged, or being written as the run ended, costs as many more."""
    found = []
    for row in rows:
        spoilt = 0
        ends = [fault for fault in row["faults"] if fault["kind"] != "pool"]
        for start, fault in zip(row["starts"][1:], ends, strict=False):
            spoilt += fault["kind"] in ("torn", "flip") or fault["amid"] == "writing a checkpoint"
            if start["redone"] > every * (1 + spoilt):
                found.append(f"{row['workdir']}: {start['redone']} steps after {start['after']}")
            if start["steps"] - start["redone"] >= every:  # it has saved one of its own
                spoilt = 0
    return found


def effective_time(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The share of wall time that steps of 30 s would keep with faults at a tenth of the steps:

        T / (T + f (R + W + (r + 1/2) T)),   T = 30 s, f = 0.1,

    with means over all restarts: R seconds from a process's start to its first step, W seconds
    from a fault to the end of all processes, r steps done again; half a step is lost under way.
    """
    starts = [s for row in rows for s in row["starts"] if s["after"] and s["restart_s"] is not None]
    waits = [fault["wait_s"] for row in rows for fault in row["faults"]]
    if not starts:
        return {}
    restart = float(np.mean([start["restart_s"] for start in starts]))
    again = float(np.mean([start["redone"] for start in starts]))
    wait = float(np.mean(waits))
    lost = _SHARE * (restart + wait + (again + 0.5) * _STEP_S)
    return {
        "restart_s": round(restart, 2),
        "wait_s": round(wait, 2),
        "redone": round(again, 3),
        "effective": round(_STEP_S / (_STEP_S + lost), 4),
    }


def plant(whole: Path, good: Path, folder: Path) -> dict[str, list[str]]:
    """What the comparison says of copies of a good run into which a difference was put: one bit of
    one parameter in the last checkpoint, itself saved in order; one item of the ledger."""
    stage = next(s for s in reversed(progress.stages(whole)) if s.name != audit.BY_THE_CLOCK)
    name = stage.relative_to(whole)
    said = {}
    for kind in ("parameter", "ledger"):
        own = Path(shutil.copytree(good, folder / kind)) / name
        (_flip_parameter if kind == "parameter" else _change_ledger)(own)
        said[kind] = audit.compare_stage(stage, own)
    return said


def _flip_parameter(stage: Path) -> None:
    folder = stage / "checkpoints"
    step, arrays = read_arrays(folder)
    _, extra, metrics = read_checkpoint(folder, "latest")
    name = next(name for name in sorted(arrays) if name.startswith("params/"))
    flat = arrays[name].copy().reshape(-1)
    flat.view(np.uint8)[0] ^= 1
    arrays[name] = flat.reshape(arrays[name].shape)
    shutil.rmtree(folder / str(step))
    with Checkpointer(folder) as checkpoints:
        checkpoints.save(step, arrays, extra, metrics)


def _change_ledger(stage: Path) -> None:
    path = stage / "ledger.jsonl"
    rows = audit.rows(path)
    rows[len(rows) // 2]["items"] = rows[len(rows) // 2]["items"][1:]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(rows: list[dict[str, Any]], say) -> None:
    """Says what became of every trial, and of every kind of fault."""
    amid = collections.Counter(fault["amid"] for row in rows for fault in row["faults"])
    say("faults by what they hit: " + ", ".join(f"{n} {k}" for k, n in amid.most_common()))
    heads = ("workdir", "faults", "state and files", *COUNTS)
    say(" | ".join(f"{head:>15}" for head in heads))
    for row in rows:
        equal = "equal" if not row["differences"] else f"{len(row['differences'])} differ"
        equal = "NOT SURVIVED" if row["failed"] else equal
        values = (row["workdir"], len(row["faults"]), equal, *(row[key] for key in COUNTS))
        say(" | ".join(f"{value!s:>15}" for value in values))
        for line in row["differences"][:10]:
            say(f"  {line}")
    for kind, found in by_kind(rows).items():
        figures = [
            f"{label} {found[name][0]:g} (at most {found[name][1]:g})"
            for name, label in (
                ("restart_s", "seconds to the first step"),
                ("redone", "steps again"),
                ("wait_s", "seconds to the end"),
            )
            if name in found
        ]
        say(f"{kind}: {found['survived']} of {found['faults']} survived; " + ", ".join(figures))
