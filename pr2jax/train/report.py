"""report.html of a run: what it reached, what routing replay did, and how it was made."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from pr2jax.core.metrics import read_jsonl
from pr2jax.core.plots import curve, heatmap
from pr2jax.evaluation import report as page
from pr2jax.evaluation.passk import PASS_SCORE, Interval, bootstrap_interval
from pr2jax.evaluation.report import Section, Tile
from pr2jax.evaluation.runner import Sample
from pr2jax.tasks.base import Problem
from pr2jax.train import goodput_report
from pr2jax.train.session import Session

log = logging.getLogger("pr2jax")

Rows = Sequence[Mapping[str, Any]]
Evaluation = Mapping[str, Any]

_REPORT = "report.html"


def training_rows(folder: epath.Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a stage; empty where there is none."""
    return read_jsonl(folder) if (folder / "metrics.jsonl").exists() else []


def _interval(figure: Mapping[str, float]) -> Interval:
    return Interval(figure["value"], figure["low"], figure["high"])


def _samples(evaluation: Evaluation) -> list[Sample]:
    return [
        Sample(
            Problem(row["id"], row["prompt"], row["answer"], ""),
            tuple(row["responses"]),
            tuple(row["scores"]),
            tuple(row["reasons"]),
        )
        for row in evaluation["samples"]
    ]


def _outcome_section(evaluations: Mapping[str, Evaluation]) -> Section:
    """Held-out figures of every stage, on one scale and as a table."""
    metrics = {name: e["metrics"] for name, e in evaluations.items()}
    names = list(next(iter(metrics.values())))
    passes = [n for n in names if n.startswith("pass@")]
    bars = [(f"{n}, {stage}", _interval(m[n])) for n in passes for stage, m in metrics.items()]
    rows = [[n, *(_interval(m[n]) for m in metrics.values())] for n in names]
    domains = by_domain(evaluations)
    tables = [page.table(["pass@1 in", *metrics], domains)] if len(domains) > 1 else []
    return Section(
        "What it reached",
        [
            "Held-out problems, none of whose questions was trained on. Intervals are 95% "
            "bootstrap intervals over problems.",
            page.intervals(bars),
            page.table(["", *metrics], rows),
            *tables,
        ],
    )


def by_domain(evaluations: Mapping[str, Evaluation]) -> list[list[Any]]:
    """A row for each domain: its name, and pass@1 in every evaluation."""
    names = sorted({r.get("domain", "other") for e in evaluations.values() for r in e["samples"]})
    return [[name, *(_pass_1(e, name) for e in evaluations.values())] for name in names]


def _pass_1(evaluation: Evaluation, domain: str) -> Interval:
    own = [r["scores"] for r in evaluation["samples"] if r.get("domain", "other") == domain]
    return bootstrap_interval((np.array(own) >= PASS_SCORE).mean(axis=1))


def _learning_section(rl: Rows, sft: Rows, mini_steps: int) -> Section:
    band = {"eval/pass@1": ("eval/pass@1/low", "eval/pass@1/high")}
    items = [
        (curve(rl, "reward", smooth=0.8, title="reward"), "Mean score of the rollouts."),
        (
            curve(rl, "eval/pass@1", interval=band, title="held-out pass@1"),
            "A part of the held-out problems, with intervals.",
        ),
        (
            curve(rl, "response_length", title="response length", ylabel="tokens"),
            "Tokens a response.",
        ),
        (curve(rl, "entropy", smooth=0.5, title="entropy", ylabel="nats"), "Of the policy."),
        (
            curve(rl, "kept_groups", smooth=0.5, title="groups with a signal"),
            "Share of prompts whose samples did not all score the same.",
        ),
    ]
    domains = sorted({k for row in rl for k in row if k.startswith("reward/")})
    if domains:
        series = {key.removeprefix("reward/"): key for key in domains}
        picture = curve(rl, series, smooth=0.9, title="reward by domain")
        items.insert(1, (picture, "Mean score of each domain's rollouts."))
    if sft:
        items.append((curve(sft, "loss", smooth=0.8, title="SFT loss", ylabel="nats"), "Warm-up."))
    return Section("How it learned", [f"{mini_steps} mini-steps a batch.", page.figures(items)])


def _replay_section(rl: Rows, mode: str, mini_steps: int) -> Section:
    by_mini = lambda key: {f"mini-step {i}": f"mini_{i}/{key}" for i in range(1, mini_steps + 1)}
    paired = {
        "used (shifted) route": f"mini_{mini_steps}/paired_zero_deviation",
        "un-shifted old route": f"mini_{mini_steps}/old_route_zero_deviation",
    }
    items = [
        (
            curve(rl, by_mini("zero_deviation"), smooth=0.9, title="zero deviation"),
            "Share of response tokens whose used experts are the live router's top-k in all "
            "layers.",
        ),
        (
            curve(rl, paired, smooth=0.9, title="last mini-step, paired"),
            "The predicted route against the route the router would have logged without "
            "prediction, on the same tokens: the gap is what the prediction won or cost.",
        ),
        (
            heatmap(rl, "agreement/layer_", title="top-k agreement by layer"),
            "Share of the used experts that the live router would choose.",
        ),
        (
            curve(rl, by_mini("predictor_loss"), smooth=0.8, title="predictor loss"),
            "KL from the live router to the predicted one, nats, summed over layers.",
        ),
        (
            heatmap(rl, "flips/layer_", title="flips by layer"),
            "Share of tokens whose un-shifted experts changed since the rollout.",
        ),
        (
            curve(rl, "shift_ratio", smooth=0.5, title="|h W_p| / |p|"),
            "How hard the prediction pushes the router's logits.",
        ),
    ]
    text = (
        f"Mode {mode}. A route is logged when a token is sampled and used again in every "
        "mini-step; gates always come from the live router, so it goes on learning."
    )
    return Section("What routing replay did", [text, page.figures(items)])


def _mismatch_section(rl: Rows) -> Section:
    items = [
        (
            curve(rl, "mismatch/abs", title="mean |difference|", ylabel="nats"),
            "Of the sampler's and the learner's log-probabilities, same weights (mini-step 1).",
        ),
        (
            curve(rl, "mismatch/k3", title="k3 KL", ylabel="nats"),
            "KL of sampler and learner, same weights.",
        ),
        (
            curve(rl, {"largest": "ratio_max", "smallest": "ratio_min"}, title="importance ratio"),
            "Extremes over the batch's mini-steps.",
        ),
        (
            curve(rl, "ratio_ess", smooth=0.5, title="effective sample size"),
            "1 when every ratio is the same.",
        ),
        (
            curve(rl, {"below": "clip_low", "above": "clip_high"}, smooth=0.5, title="clipped"),
            "Share of tokens whose gradient the clip removed.",
        ),
        (
            curve(rl, "grad_norm", smooth=0.5, title="gradient norm"),
            "Before clipping, all groups.",
        ),
    ]
    return Section("Sampler against learner", [page.figures(items)])


def _time_section(rl: Rows) -> Section:
    parts = {"sample": "time/sample", "verify": "time/verify", "learn": "time/learn"}
    items = [
        (curve(rl, parts, smooth=0.5, title="seconds a step"), "Of a whole batch."),
        (
            curve(rl, "tokens_per_second", smooth=0.5, title="tokens / s"),
            "Sampled tokens over the step's whole time.",
        ),
    ]
    return Section("Where the time went", [page.figures(items)])


def _run_section(summary: Mapping[str, Any], session: Session) -> Section:
    counts = {**summary["verifiers"], **summary["sampler"]}
    rows = [[name, value] for name, value in counts.items()]
    return Section(
        "The run",
        [
            *goodput_report.blocks(summary.get("goodput")),
            page.table(["count", ""], rows),
            page.settings(summary["versions"], "Versions and device"),
            page.settings(session.config_json, "Configuration"),
        ],
    )


def _last(rows: Rows, key: str) -> str:
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    return f"{values[-1]:.3g}" if values else "none"


def _rl_tiles(rl: Rows, mini_steps: int) -> list[Tile]:
    return [
        Tile(
            "zero deviation",
            _last(rl, f"mini_{mini_steps}/zero_deviation"),
            f"last batch, mini-step {mini_steps}",
        ),
        Tile("mismatch", _last(rl, "mismatch/abs"), "mean |Δ log-prob|, last batch"),
    ]


def _rl_sections(session: Session, rl: Rows, sft: Rows) -> list[Section]:
    cfg = session.cfg
    sections = [_learning_section(rl, sft, cfg.rl.updates)]
    if cfg.replay.mode != "off":
        sections.append(_replay_section(rl, cfg.replay.mode, cfg.rl.updates))
    return [*sections, _mismatch_section(rl), _time_section(rl)]


def _transcripts(session: Session, before: Evaluation, after: Evaluation) -> Section:
    blocks = page.transcripts(_samples(before), _samples(after), limit=session.cfg.eval.transcripts)
    return Section("Before and after", [blocks])


def _write(session: Session, title: str, sections: list[Section], tiles: list[Tile], summary):
    path = session.workdir / _REPORT
    subtitle = (
        f"{summary['versions']['device_kind']}, jax {summary['versions']['jax']}, "
        f"{summary['compute_dtype']}, {summary['wall_seconds']:.0f} s in all"
    )
    page.write_report(path, title, sections, subtitle=subtitle, tiles=tiles)
    log.info("report: %s", path)


def write_sft(session: Session, summary: Mapping[str, Any], end: Evaluation | None) -> None:
    """The report of an SFT run."""
    rows = training_rows(session.workdir)
    items = [
        (curve(rows, "loss", smooth=0.8, title="loss", ylabel="nats"), "On answers."),
        (curve(rows, "learning_rate", title="learning rate"), "Of the default group."),
        (curve(rows, "grad_norm", smooth=0.8, title="gradient norm"), "Before clipping."),
    ]
    sections = [Section("How it learned", [page.figures(items)])]
    tiles = [Tile("loss", _last(rows, "loss"), "last step")]
    if end is not None:
        sections.insert(0, _outcome_section({"end": end}))
        tiles.append(Tile("pass@1", f"{end['metrics']['pass@1']['value']:.3f}", "held out"))
    sections.append(_run_section(summary, session))
    _write(session, "Supervised fine-tuning", sections, tiles, summary)


def write_pretrain(session: Session, summary: Mapping[str, Any], rows: Rows | None = None) -> None:
    """The report of a pre-training run; `rows` are those of its stages, where it has some."""
    rows = training_rows(session.workdir) if rows is None else rows
    start, end = summary["start"], summary["end"]
    names = [name for name in end if name.endswith("loss")]
    held_out = {name.removesuffix("/loss"): f"eval/{name}" for name in names}
    outcome = Section(
        "What it reached",
        [
            "On documents that were never trained on. Loss is in nats a token; bits per byte do "
            "not depend on the tokenizer. Intervals are 95% bootstrap intervals over rows.",
            page.table(
                ["held out", "before", "after"],
                [[name, _interval(start[name]), _interval(end[name])] for name in end],
            ),
            page.table(
                ["source", *next(iter(summary["data"].values()))],
                [[name, *counts.values()] for name, counts in summary["data"].items()],
            ),
        ],
    )
    items = [
        (curve(rows, held_out, title="held-out loss", ylabel="nats a token"), "By source."),
        (
            curve(rows, "eval/bits_per_byte", title="held-out bits per byte", ylabel="bits"),
            "Of UTF-8 text.",
        ),
        (curve(rows, "loss", smooth=0.9, title="training loss", ylabel="nats a token"), ""),
        (curve(rows, "learning_rate", title="learning rate"), "Of the default group."),
        (curve(rows, "grad_norm", smooth=0.9, title="gradient norm"), "Before clipping."),
        (
            curve(rows, "load_max", smooth=0.9, title="busiest expert"),
            "Its load over the mean, in the worst layer: 1 is balance.",
        ),
        (
            curve(rows, "load_balance", smooth=0.9, title="load-balance loss"),
            "1 at balance.",
        ),
        (curve(rows, "tokens_per_second", smooth=0.5, title="tokens / s"), "Training steps."),
    ]
    tiles = [
        Tile("held-out loss", _from_to(start, end, "loss"), "nats a token"),
        Tile("bits per byte", _from_to(start, end, "bits_per_byte"), "held out"),
        Tile("tokens / s", _last(rows, "tokens_per_second"), "last step"),
    ]
    if rows and "mfu" in rows[-1]:
        tiles.append(Tile("MFU", _last(rows, "mfu"), "of the chips' bf16 peak, last step"))
    sections = [outcome, Section("How it learned", [page.figures(items)])]
    if "stages" in summary:
        sections.insert(1, _growth_section(summary, rows))
    sections.append(_run_section(summary, session))
    _write(session, "Pre-training", sections, tiles, summary)


def _growth_section(summary: Mapping[str, Any], rows: Rows) -> Section:
    """The stages of a growing pool, and what each growth did."""
    events = [
        [
            e["step"],
            e["kind"],
            f"{e['experts'][0]} → {e['experts'][1]}",
            e["jump"],
            "not yet" if e["recovery_steps"] is None else e["recovery_steps"],
        ]
        for e in summary["growth"]
    ]
    stages = summary["stages"]
    savings = [
        f"Step time saved against the last pool from the start, {name}: {100 * saving:.1f}%."
        for name in ("predicted", "measured")
        if (saving := summary[f"{name}_saving"]) is not None
    ]
    items = [
        (curve(rows, "experts", title="experts that take part"), "By step."),
        (
            curve(rows, "load_gini", smooth=0.9, title="expert-usage Gini"),
            "Of assignments over experts, mean of layers: 0 is balance.",
        ),
        (
            curve(rows, "load_dead", smooth=0.9, title="dead experts"),
            "Share of experts that no token of a batch used, mean of layers.",
        ),
        (
            curve(rows, "router_entropy", smooth=0.9, title="router entropy"),
            "Nats a token, mean of layers; a router that tells nothing has ln(experts).",
        ),
    ]
    return Section(
        "How it grew",
        [
            page.table(list(stages[0]), [list(stage.values()) for stage in stages]),
            *savings,
            page.table(
                ["step", "event", "experts", "jump of held-out loss", "steps to recover"], events
            ),
            page.figures(items),
        ],
    )


def _from_to(start: Mapping[str, Any], end: Mapping[str, Any], key: str) -> str:
    return f"{start[key]['value']:.2f} → {end[key]['value']:.2f}"


def write_rl(
    session: Session,
    summary: Mapping[str, Any],
    start: Evaluation | None,
    end: Evaluation | None,
) -> None:
    """The report of an RL run."""
    rl = training_rows(session.workdir)
    sections = _rl_sections(session, rl, [])
    tiles = _rl_tiles(rl, session.cfg.rl.updates)
    if start is not None and end is not None:
        sections.insert(0, _outcome_section({"before": start, "after": end}))
        sections.append(_transcripts(session, start, end))
        tiles.insert(0, _gain_tile(start, end))
    sections.append(_run_section(summary, session))
    title = f"GRPO with {session.cfg.replay.mode} on {session.cfg.rl_task.name}"
    _write(session, title, sections, tiles, summary)


def _gain_tile(start: Evaluation, end: Evaluation) -> Tile:
    before, after = (_interval(e["metrics"]["pass@1"]) for e in (start, end))
    apart = "intervals apart" if after.apart(before) else "intervals overlap"
    return Tile("held-out pass@1", f"{before.mean:.2f} → {after.mean:.2f}", apart)


def write_comparison(
    session: Session,
    summary: Mapping[str, Any],
    start: Evaluation,
    end: Evaluation,
    control: Evaluation,
) -> None:
    """The report of SFT, then RL, beside SFT continued for the same wall time."""
    rl, sft = training_rows(session.workdir / "rl"), training_rows(session.workdir / "sft")
    stages = {"after SFT": start, "after RL": end, "SFT continued": control}
    tiles = [
        _gain_tile(start, end),
        Tile(
            "SFT continued",
            f"{control['metrics']['pass@1']['value']:.2f}",
            "pass@1 for the same wall time",
        ),
        *_rl_tiles(rl, session.cfg.rl.updates),
    ]
    gains = page.table(
        ["RL's gain in pass@1, paired by problem", ""],
        [
            ["over the start", _interval(summary["gain"])],
            ["over SFT continued", _interval(summary["gain_over_sft_continued"])],
        ],
    )
    outcome = _outcome_section(stages)
    sections = [
        Section(outcome.title, [*outcome.blocks, gains]),
        *_rl_sections(session, rl, sft),
        _transcripts(session, start, end),
        _run_section(summary, session),
    ]
    title = f"GRPO with {session.cfg.replay.mode} on {session.cfg.rl_task.name}"
    _write(session, title, sections, tiles, summary)
