"""What a sweep of small runs says: the joint MoE law that fits it, and how well it foretells.

Runs with most compute (active parameters times tokens) are held out; the law is fitted on the
others, chosen among its starts by both (arXiv 2502.05172), and its prediction is set against
what the held-out runs reached. law.json holds the coefficients.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.core.metrics import SUMMARY, write_json
from pr2jax.core.plots import scatter
from pr2jax.emo.schedule import law_params
from pr2jax.evaluation import report as page
from pr2jax.evaluation.report import Section
from pr2jax.models.config import ModelConfig
from pr2jax.scaling.fitting import COLUMNS, MIN_RUNS, Bootstrap, Fit, Runs, bootstrap, fit_joint_law
from pr2jax.scaling.laws import JointMoELaw, stage_shares
from pr2jax.train.config import Config
from pr2jax.train.study_report import markdown

if TYPE_CHECKING:
    from pr2jax.train.study import Job

log = logging.getLogger("pr2jax")
RUNS_CSV = "runs.csv"


def run_row(config: dict[str, Any], summary: dict[str, Any]) -> list[float]:
    """active_params (no embeddings), tokens, experts, top_k, loss of a run."""
    model = from_config_dict(ModelConfig, summary["config"]["model"])
    pretrain = config["pretrain"]
    tokens = pretrain["steps"] * pretrain["batch"] * pretrain["row_length"]
    moe = model.moe
    return [law_params(model), tokens, moe.num_experts, moe.top_k, summary["end"]["loss"]["value"]]


def gather(cfg: Config, root: Path, jobs: Sequence[Job]) -> Runs | None:
    """The runs so far, of `study.runs_csv` or of the sweep (written to runs.csv); None: too few.

    Raises ConfigError("study.runs_csv: ...").
    """
    if cfg.study.runs_csv:
        try:
            return Runs.from_csv(cfg.study.runs_csv)
        except ConfigError as error:
            raise ConfigError(f"study.runs_csv: {error}") from None
    path = root / RUNS_CSV
    rows = []
    for job in jobs:
        if job.done:
            summary = json.loads((job.folder / SUMMARY).read_text(encoding="utf-8"))
            rows.append([job.name, *run_row(job.config, summary)])
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["run", *COLUMNS], *rows])
    return Runs.from_csv(path, at_least=1) if rows else None


def halves(runs: Runs, share: float) -> tuple[Runs, Runs]:
    """(to fit, held out): held out is the `share` of the runs with most compute."""
    count = max(round(share * len(runs)), 1)
    order = np.argsort(runs.n * runs.d, kind="stable")
    return runs.take(order[:-count]), runs.take(order[-count:])


def rows_of(law: JointMoELaw, intervals: Bootstrap, runs: Runs) -> list[list[str]]:
    """A line for each run: its size, its loss, the law's and its interval, the error."""
    low, high = intervals.loss_interval(runs.n, runs.d, runs.e)
    found = law.loss(runs.n, runs.d, runs.e)
    return [
        [
            *(f"{runs.n[i]:,.0f}", f"{runs.d[i]:,.0f}", f"{runs.e[i]:g}", f"{runs.loss[i]:.4f}"),
            f"{found[i]:.4f} [{low[i]:.4f}, {high[i]:.4f}]",
            f"{found[i] / runs.loss[i] - 1:+.2%}",
        ]
        for i in range(len(runs))
    ]


def _error(fit: Fit, runs: Runs) -> float:
    """Mean absolute relative error of the loss."""
    return float(np.mean(np.abs(fit.law.loss(runs.n, runs.d, runs.e) / runs.loss - 1.0)))


def _planning(law: JointMoELaw, runs: Runs) -> str:
    """The flags that plan a run's stages with `law`, or why it cannot."""
    try:
        stage_shares(law, float(np.median(runs.n)), np.unique(runs.e))
    except ConfigError as error:
        return f"It cannot plan the stages of a growing pool. {error}"
    flags = (f"--config.emo.law.{k}={v:.6g}" for k, v in dataclasses.asdict(law).items())
    return "To plan a run with it: " + " ".join(flags)


def write(cfg: Config, root: Path, jobs: Sequence[Job], failed: Sequence[str]) -> None:
    """runs.csv, law.json, study.json, study.md, report.html and figures/law.svg.

    With too few runs to fit, runs.csv alone. Raises ConfigError where the fit has no end.
    """
    runs = gather(cfg, root, jobs)
    count = 0 if runs is None else len(runs)
    if runs is None or len(halves(runs, cfg.study.held_out)[0]) < MIN_RUNS:
        log.info("study: %d runs so far; the law needs %d to fit", count, MIN_RUNS)
        return
    train, held = halves(runs, cfg.study.held_out)
    fit = fit_joint_law(train, held_out=held, seed=cfg.seed)
    intervals = bootstrap(train, fit, samples=cfg.study.resamples, seed=cfg.seed)
    errors = {"fitted": _error(fit, train), "held_out": _error(fit, held)}
    write_json(root / "law.json", dataclasses.asdict(fit.law))
    low, high = intervals.loss_interval(held.n, held.d, held.e)
    covered = float(np.mean((low <= held.loss) & (held.loss <= high)))
    write_json(
        root / "study.json",
        {
            "fit": dataclasses.asdict(fit),
            "intervals": intervals.coefficients,
            "failed_refits": intervals.failed,
            "mean_error": errors,
            "held_out_covered": covered,
            "runs": {"fitted": len(train), "held_out": len(held)},
            "failed": list(failed),
        },
    )
    predict = lambda r: fit.law.loss(r.n, r.d, r.e)
    picture = scatter(
        {
            "fitted": (
                train.loss,
                predict(train),
                *intervals.loss_interval(train.n, train.d, train.e),
            ),
            "held out": (held.loss, predict(held), low, high),
        },
        title="loss, nats a token",
        xlabel="measured",
        ylabel="the law's, with 95% interval",
    )
    (root / "figures").mkdir(exist_ok=True)
    (root / "figures" / "law.svg").write_text(picture, encoding="utf-8")
    notes = [
        f"{len(train)} runs fitted, {len(held)} with most compute held out; {len(failed)} runs "
        f"failed. Mean error of the loss: fitted {errors['fitted']:.2%}, held out "
        f"{errors['held_out']:.2%}; {covered:.0%} of the held-out losses inside the law's 95% "
        "interval (which leaves out a run's own noise).",
        _planning(fit.law, train),
    ]
    head = ["active parameters", "tokens", "experts / k", "loss", "law", "error"]
    tables = [
        ("Held out", head, rows_of(fit.law, intervals, held)),
        ("Fitted", head, rows_of(fit.law, intervals, train)),
        (
            "Coefficients (they trade off against each other: judge by the losses)",
            ["", "value", "95%"],
            [
                [key, f"{value:.4g}", "[{:.4g}, {:.4g}]".format(*intervals.coefficients[key])]
                for key, value in dataclasses.asdict(fit.law).items()
            ],
        ),
    ]
    text = ["# Law\n", *(f"{note}\n" for note in notes), *(markdown(*t) for t in tables)]
    (root / "study.md").write_text("\n".join(text), encoding="utf-8")
    blocks = [*notes, page.figures([(picture, "Each point is a run.")])]
    blocks += [page.table(head, rows, caption) for caption, head, rows in tables]
    page.write_report(root / "report.html", "Law", [Section("The law", blocks)], subtitle=root.name)
