"""What a sweep of the sampling budget says: R(C) for each n, their envelope, n*(C), and ScaleRL.

One law for each B_p that has enough values of n. law.json is the law of the B_p with most of them
(what `configs/plan.py` reads); runs.csv has every evaluation. Where nothing can be fitted the
report says why, and there is no law.json.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pr2jax.core.config import ConfigError
from pr2jax.core.metrics import write_json
from pr2jax.core.plots import Line, histogram, lines
from pr2jax.evaluation import report as page
from pr2jax.evaluation.passk import PASS_SCORE
from pr2jax.evaluation.report import Section
from pr2jax.scaling import sampling_fit
from pr2jax.scaling.sampling_fit import Fit, Intervals, bootstrap, fit_sweep, scale_rl
from pr2jax.train.budget_runs import Course, budgets, gather, recipe
from pr2jax.train.config import Config
from pr2jax.train.study_config import REGIMES
from pr2jax.train.study_report import interval, markdown, show

if TYPE_CHECKING:
    from pr2jax.train.study import Job

log = logging.getLogger("pr2jax")

LAW = "law.json"

Table = tuple[str, list[str], list[list[str]]]


@dataclasses.dataclass(frozen=True)
class Found:
    """What there is to say about one B_p: its runs, and the fit or why there is none."""

    prompts: int
    courses: list[Course]
    fit: Fit | None
    intervals: Intervals | None
    note: str

    @property
    def ns(self) -> list[int]:
        """The values of n, rising."""
        return sorted({c.run.n for c in self.courses})


def analyse(cfg: Config, prompts: int, courses: list[Course]) -> Found:
    """Fits the law of one B_p."""
    runs = [c.run for c in courses]
    try:
        fit = fit_sweep(runs)
    except ConfigError as error:
        return Found(prompts, courses, None, None, f"No law: {error}.")
    intervals, why = None, ""
    try:
        intervals = bootstrap(runs, fit, samples=cfg.study.resamples, seed=cfg.seed)
    except ConfigError as error:
        why = f" No intervals: {error}."
    low, high = fit.envelope.edge
    for share, which in ((low, min(fit.curves)), (high, max(fit.curves))):
        if share:
            why += f" Over {share:.0%} of it the best is n = {which}, at the edge of what was run."
    return Found(prompts, courses, fit, intervals, sampling_fit.verdict(fit, intervals) + why)


def law_json(cfg: Config, found: Found, jobs: Sequence[Job]) -> dict[str, Any]:
    """What `train/plan.py` plans with."""
    tokens = [float(c.tokens[0]) for c in found.courses if np.isfinite(c.tokens).any()]
    regime = next((name for name, r in REGIMES.items() if r == cfg.regime), "custom")
    return {
        "law": dataclasses.asdict(found.fit.law),
        "compute_range": [10.0**x for x in found.fit.log10_range],
        "n_range": [found.ns[0], found.ns[-1]],
        "prompts": found.prompts,
        "regime": regime if not cfg.study.runs_csv else "custom",
        "recipe": recipe(jobs),
        "tokens_per_rollout": float(np.mean(tokens)) if tokens else None,
        "growth": 2.0**found.fit.growth,
        "growth_interval": found.intervals and [2.0**g for g in found.intervals.growth],
        "verdict": found.note,
    }


def tables(found: Found) -> list[Table]:
    """avg@4, best@4, worst@4 by n at nested budgets; the law, and ScaleRL's curves."""
    at = budgets(found.courses)
    head = ["n", "seeds", *(f"C = {c:,.0f}" for c in at)]
    out = []
    for name in ("avg@4", "best@4", "worst@4"):
        rows = []
        for n in found.ns:
            own = [c for c in found.courses if c.run.n == n]
            pick = {"avg@4": lambda c: c.run.score, "best@4": lambda c: c.best}
            values = pick.get(name, lambda c: c.worst)
            cells = [[c.at(values(c), budget) for c in own] for budget in at]
            shown = [show(interval(v)) if np.isfinite(v).all() else "" for v in cells]
            rows.append([str(n), str(len(own)), *shown])
        if any(any(row[2:]) for row in rows):
            out.append((f"Validation {name} (mean of a budget's last quarter)", head, rows))
    if found.fit is not None:
        out += [_law_table(found, at), _curve_table(found)]
    return out


def _between(ends: Sequence[float] | None, form: str) -> str:
    return "" if ends is None else f" [{ends[0]:{form}}, {ends[1]:{form}}]"


def _law_table(found: Found, at: Sequence[float]) -> Table:
    fit, intervals = found.fit, found.intervals
    rows = []
    for budget in at:
        x = np.log10(budget)
        if not fit.log10_range[0] <= x <= fit.log10_range[1] + 1e-9:
            rows.append([f"n*({budget:,.0f})", "outside the fitted range"])
            continue
        ends = None
        if intervals is not None:
            grid = fit.envelope.log10_compute
            ends = [2.0 ** np.interp(x, grid, row) for row in intervals.log2_n]
        rows.append(
            [f"n*({budget:,.0f})", f"{fit.law.optimal_n(budget):.1f}{_between(ends, '.1f')}"]
        )
    for name, value in dataclasses.asdict(fit.law).items():
        ends = intervals and intervals.coefficients[name]
        rows.append([name, f"{value:.3g}{_between(ends, '.3g')}"])
    return ("n*(C), and the coefficients of its sigmoid", ["", "value, 95%"], rows)


def _curve_table(found: Found) -> Table:
    rows = []
    for n in found.ns:
        curve = scale_rl([c.run for c in found.courses if c.run.n == n])
        cells = [f"{curve.start:.3f}"]
        for key, form in (("asymptote", ".3f"), ("mid", ".3g"), ("efficiency", ".2f")):
            ends = found.intervals and found.intervals.curves[n][key]
            cells.append(f"{getattr(curve, key):{form}}{_between(ends, form)}")
        rows.append([str(n), *cells])
    head = ["n", "R0", "asymptote A", "C_mid", "efficiency B"]
    return ("ScaleRL: R(C) - R0 = (A - R0) / (1 + (C_mid / C)^B), all evaluations", head, rows)


def pictures(found: Found, solved: Mapping[int, np.ndarray]) -> dict[str, tuple[str, str]]:
    """{name: (svg, caption)}."""
    out = {}
    if found.fit is not None:
        out |= _law_pictures(found)
    at = budgets(found.courses)
    for name, values in (("best@4", lambda c: c.best), ("worst@4", lambda c: c.worst)):
        named = {}
        for budget in at:
            by_n = [
                [c.at(values(c), budget) for c in found.courses if c.run.n == n] for n in found.ns
            ]
            y = np.array([np.mean(v) for v in by_n])
            if np.isfinite(y).all():
                named[f"C = {budget:,.0f}"] = Line(np.array(found.ns, np.float64), y)
        svg = lines(named, title=f"validation {name}", xlabel="n", ylabel=name, log_x=2)
        out[name.replace("@", "_at_")] = (
            svg,
            f"{name} against n at nested budgets, mean of seeds.",
        )
    if solved:
        svg = histogram(
            {f"n = {n}": values for n, values in solved.items()},
            np.linspace(0.0, 1.0, 9),
            title="pass rate of a validation problem, at the end",
            xlabel="pass rate",
            ylabel="problems, all seeds",
            size=(5.6, 3.6),
        )
        out["pass_rates"] = (svg, "Problems by pass rate: what a mean hides.")
    return out


def _law_pictures(found: Found) -> dict[str, tuple[str, str]]:
    fit, intervals = found.fit, found.intervals
    named = {}
    for n, curve in fit.curves.items():
        parts = [c.run.bucketed() for c in found.courses if c.run.n == n]
        x, y = (np.concatenate(values) for values in zip(*parts, strict=True))
        there = np.isfinite(x)
        points = (10.0 ** x[there], y[there])
        grid = np.geomspace(points[0].min(), points[0].max(), 100)
        named[f"n = {n}"] = Line(grid, curve.reward(grid), points=points)
    grid = 10.0**fit.envelope.log10_compute
    curves = lines(named, title="validation avg@4", xlabel="C, rollouts", ylabel="R(C)", log_x=10)
    top = {
        f"n = {n}": Line(grid, curve.reward(grid) - fit.envelope.reward)
        for n, curve in fit.curves.items()
    }
    gaps = lines(top, title="below the envelope", xlabel="C, rollouts", ylabel="avg@4", log_x=10)
    ends = (None, None) if intervals is None else tuple(2.0**intervals.log2_n)
    law = {
        "law": Line(grid, fit.law.optimal_n(grid), *ends),
        "envelope": Line(grid, 2.0**fit.envelope.log2_n),
    }
    rise = lines(law, title="n*(C)", xlabel="C, rollouts", ylabel="n*", log_x=10, log_y=2)
    return {
        "curves": (curves, "Points: buckets of each run. Lines: the monotone sigmoid of each n."),
        "envelope": (gaps, "Each n's curve less the upper envelope: the best is at 0."),
        "n_star": (rise, "The sigmoid fitted to the envelope, with its 95% interval over runs."),
    }


def pass_rates(jobs: Sequence[Job], prompts: int) -> dict[int, np.ndarray]:
    """{n: share of right answers of each validation problem at the end, all seeds}."""
    out: dict[int, list[float]] = {}
    for job in jobs:
        path = job.folder / "eval_end.json"
        if job.cell is None or not job.done or not path.exists():
            continue
        rl = job.config["rl"]
        if rl["prompts_per_batch"] == prompts:
            samples = json.loads(path.read_text(encoding="utf-8"))["samples"]
            rates = [float(np.mean(np.array(s["scores"]) >= PASS_SCORE)) for s in samples]
            out.setdefault(rl["samples_per_prompt"], []).extend(rates)
    return {n: np.array(out[n]) for n in sorted(out)}


def write(cfg: Config, root: Path, jobs: Sequence[Job], failed: Sequence[str]) -> None:
    """runs.csv, law.json, study.json, study.md, report.html and figures/ of the runs so far."""
    courses = gather(cfg, root, jobs)
    cells = [job for job in jobs if job.cell is not None]
    if not courses:
        log.info("study: no run is done; nothing to report")
        return
    by_prompts: dict[int, list[Course]] = {}
    for c in courses:
        by_prompts.setdefault(c.run.prompts, []).append(c)
    several = lambda p: len({c.run.n for c in by_prompts[p]})
    order = sorted(by_prompts, key=lambda p: (-several(p), p))
    parts = [analyse(cfg, p, by_prompts[p]) for p in order]
    (root / LAW).unlink(missing_ok=True)
    if parts[0].fit is not None:
        write_json(root / LAW, law_json(cfg, parts[0], jobs))
    write_json(
        root / "study.json",
        {
            "done": len(courses),
            "total": len(cells) or len(courses),
            "failed": list(failed),
            "by_prompts": {str(part.prompts): _figures(part) for part in parts},
        },
    )
    notes = [
        f"{len(courses)} of {len(cells) or len(courses)} runs are done; {len(failed)} failed. "
        "C = B_p n M rollouts. Intervals: over seeds by Student's t in the first tables; by refits "
        "on resampled runs for the law.",
        *(["Failed: " + "; ".join(failed)] if failed else []),
        *_regime_note(jobs),
    ]
    text, sections = ["# Sampling budget\n", *(f"{n}\n" for n in notes)], []
    (root / "figures").mkdir(exist_ok=True)
    for part in parts:
        title = f"B_p = {part.prompts}"
        made = pictures(part, pass_rates(jobs, part.prompts))
        for name, (svg, _) in made.items():
            path = root / "figures" / f"b{part.prompts}_{name}.svg"
            path.write_text(svg, encoding="utf-8")
        shown = tables(part)
        text += [f"## {title}\n", f"{part.note}\n", *(markdown(*t) for t in shown)]
        blocks = [part.note, page.figures(list(made.values()))]
        blocks += [page.table(head, rows, caption) for caption, head, rows in shown]
        sections.append(Section(title, blocks))
    (root / "study.md").write_text("\n".join(text), encoding="utf-8")
    first = Section("The study", [*notes, parts[0].note])
    page.write_report(
        root / "report.html", "Sampling budget", [first, *sections], subtitle=root.name
    )


def _regime_note(jobs: Sequence[Job]) -> list[str]:
    path = next((job.folder / "summary.json" for job in jobs if job.stage == 1 and job.done), None)
    if path is None:
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    regime, average = found["regime"], found["average"]
    return [
        f"Problems with {regime['low']} <= avg@{regime['samples']} <= {regime['high']} of the base "
        f"model: {found['chosen']['train']} of {found['pool']['train']} to train on, "
        f"{found['chosen']['held_out']} of {found['pool']['held_out']} to validate; avg@"
        f"{regime['samples']} of the whole pool is {average['value']:.3f}."
    ]


def _figures(found: Found) -> dict[str, Any]:
    """One B_p's part of study.json."""
    out: dict[str, Any] = {"note": found.note, "n": found.ns, "budgets": budgets(found.courses)}
    for name, values in (
        ("avg", lambda c: c.run.score),
        ("best", lambda c: c.best),
        ("worst", lambda c: c.worst),
    ):
        out[name] = {
            str(n): [
                interval([c.at(values(c), b) for c in found.courses if c.run.n == n])
                for b in out["budgets"]
            ]
            for n in found.ns
        }
    if found.fit is not None:
        out["law"] = dataclasses.asdict(found.fit.law)
        out["compute_range"] = [10.0**x for x in found.fit.log10_range]
        out["curves"] = {str(n): dataclasses.asdict(c) for n, c in found.fit.curves.items()}
        out["growth"] = 2.0**found.fit.growth
        out["edge"] = found.fit.envelope.edge
    if found.intervals is not None:
        out["intervals"] = found.intervals.coefficients
        out["growth_interval"] = [2.0**g for g in found.intervals.growth]
        out["failed_refits"] = found.intervals.failed
    return out
