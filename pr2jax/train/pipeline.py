"""What each training mode does from start to report: stages run in the loop, figures around them.

Every stage has a folder of its own and finishes at a checkpoint, and every full evaluation is
written to a file: the same command goes on wherever it was stopped.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from pr2jax.core import goodput, hosts
from pr2jax.core.config import ConfigError
from pr2jax.core.device import versions
from pr2jax.core.metrics import write_json, write_summary
from pr2jax.core.optim import learning_rate
from pr2jax.core.store import as_path
from pr2jax.evaluation.passk import PASS_SCORE, Interval, paired_interval
from pr2jax.tasks.base import Problem, Task
from pr2jax.tasks.registry import build_task
from pr2jax.train import emo, report
from pr2jax.train.config import Config
from pr2jax.train.evaluator import Evaluator
from pr2jax.train.loop import Outcome, run
from pr2jax.train.pretrain import PretrainData, PretrainTrainer, read_data, with_trained_tokenizer
from pr2jax.train.regimes import only
from pr2jax.train.rl import RLTrainer
from pr2jax.train.session import Session, open_session
from pr2jax.train.sft import SFTTrainer

log = logging.getLogger("pr2jax")

BEST_METRIC = "eval/pass@1"


def _evaluation(
    session: Session, evaluator: Evaluator, name: str, params, steps: int
) -> dict[str, Any]:
    """The full evaluation NAME of `params`, which `steps` steps made; read from its file when
    that holds the same one (a run that was given more steps is evaluated again).

    Keys: metrics {NAME: {value, low, high}}, samples (rows of evaluation.runner.Sample), seconds,
    of (what was evaluated, and how).
    """
    path = session.workdir / f"eval_{name}.json"
    of = {"steps": steps, "eval": session.config_json["eval"]}
    if (found := _known(path, of)) is not None:
        return found
    start = time.monotonic()
    with goodput.during("evaluate"):
        result = evaluator.full(params)
    figures = {
        "metrics": _intervals(result.metrics),
        "samples": [s.to_json() for s in result.samples],
        "seconds": time.monotonic() - start,
        "of": of,
    }
    write_json(path, figures)
    shown = ", ".join(
        f"{key} {m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]"
        for key, m in figures["metrics"].items()
    )
    log.info("%s, %d held-out problems: %s", name, len(evaluator.problems), shown)
    return figures


def _known(path: epath.Path, of: dict[str, Any]) -> dict[str, Any] | None:
    """What the file holds where it is of `of`: on all hosts what it is on process 0."""
    found = None
    if hosts.first() and path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        found = found if found.get("of") == of else None
    return hosts.from_first(found)


def _intervals(metrics: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {key: {"value": m.mean, "low": m.low, "high": m.high} for key, m in metrics.items()}


def _evaluator(session: Session, problems: list[Problem]) -> Evaluator | None:
    if not problems:
        log.info("no held-out problems: nothing is evaluated")
        return None
    for problem in problems:
        session.encode(problem)  # what cannot be put to the model is told before it is trained
    session.check_verifiers(problems)
    return Evaluator(session, problems)


def _run(session: Session, trainer, params, folder: str, **options) -> Outcome:
    return run(
        trainer,
        trainer.initial_state(params),
        workdir=session.workdir / folder,
        options=session.cfg.loop,
        config=session.config_json,
        **{"best_metric": BEST_METRIC, **options},
    )


def _summary(session: Session, **figures: Any) -> dict[str, Any]:
    """summary.json: the figures of this mode and what they were made with."""
    summary = {
        "mode": session.cfg.mode,
        **figures,
        "verifiers": _verifiers(session),
        "sampler": {k: int(v) for k, v in session.sampler.stats.items()} if session.samples else {},
        "versions": versions(),
        "compute_dtype": session.dtype.name,
        "config": session.config_json,
        "wall_seconds": round(session.wall_seconds(), 1),
        "goodput": goodput.so_far(),
    }
    write_summary(session.workdir, summary)
    return summary


def _verifiers(session: Session) -> dict[str, int]:
    """Counts of the verifiers of all hosts."""
    if not session.verifies:
        return {}
    total: collections.Counter[str] = collections.Counter()
    for own in hosts.gather(dict(session.pool.stats)):
        total.update(own)
    return dict(total)


def _stage(outcome: Outcome) -> dict[str, Any]:
    return {"steps": outcome.steps, "seconds": outcome.seconds, "compile": outcome.compile}


def _figures(evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if evaluation is None else evaluation["metrics"]


def _gain(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """What pass@1 gained, problem by problem: {value, low, high}."""
    share = lambda e: np.array([np.mean(np.array(r["scores"]) >= PASS_SCORE) for r in e["samples"]])
    gain = paired_interval(share(before), share(after))
    return {"value": gain.mean, "low": gain.low, "high": gain.high}


def _log_sizes(name: str, task: Task) -> None:
    counts = ", ".join(f"{key} {value}" for key, value in task.stats.items())
    sizes = len(task.train), len(task.held_out)
    log.info("%s: %d problems to train on, %d held out (%s)", name, *sizes, counts)


def run_pretrain(cfg: Config, workdir: str, profile_steps: int = 0) -> None:
    """Pre-training on pretrain.data; evaluated on the documents held out, before and after."""
    data = read_data(cfg.pretrain)
    cfg = with_trained_tokenizer(cfg, data)
    with open_session(cfg, workdir) as session:
        if cfg.emo.experts:
            _grow(session, data, profile_steps)
            return
        trainer = PretrainTrainer(session, data)
        params = session.initial_params()
        start = _held_out(session, trainer, "start", params, 0)
        outcome = _run(
            session,
            trainer,
            params,
            ".",
            best_metric="eval/loss",
            best_mode="min",
            profile_steps=profile_steps,
        )
        end = _held_out(session, trainer, "end", outcome.state.params, outcome.steps)
        summary = _summary(
            session,
            pretrain=_stage(outcome),
            data=trainer.counts(),
            start=start["metrics"],
            end=end["metrics"],
        )
        if hosts.first():
            report.write_pretrain(session, summary)


def _grow(session: Session, data: PretrainData, profile_steps: int) -> None:
    """Pre-training in stages of a growing pool (EMO)."""
    phases = emo.phases_of(session.cfg)
    trainers = emo.Trainers(session, data, phases)
    plan = emo.plan(session, trainers)
    emo.log_table(plan)
    first = trainers[0]
    params = session.initial_params()
    start = _held_out(session, first, "start", params, 0)
    trainer, outcome = emo.train(trainers, params, profile_steps)
    end = _held_out(session, trainer, "end", outcome.state.params, outcome.steps)
    summary = _summary(
        session,
        pretrain=_stage(outcome),
        data=first.counts(),
        start=start["metrics"],
        end=end["metrics"],
        stages=plan,
        predicted_saving=emo.predicted_saving(plan),
        **(emo.outcome(session.workdir, phases) if hosts.first() else {}),
    )
    if hosts.first():
        report.write_pretrain(session, summary, emo.rows(session.workdir, phases))


def _held_out(
    session: Session, trainer: PretrainTrainer, name: str, params, steps: int
) -> dict[str, Any]:
    """Held-out figures NAME of `params`, as `_evaluation`: read from their file where it holds
    those of as many steps on the same documents."""
    path = session.workdir / f"eval_{name}.json"
    of = {"steps": steps, "documents": trainer.data.fingerprint()}
    if (found := _known(path, of)) is not None:
        return found
    with goodput.during("evaluate"):
        figures = {"metrics": _intervals(trainer.full(params)), "of": of}
    write_json(path, figures)
    shown = ", ".join(f"{key} {m['value']:.4f}" for key, m in figures["metrics"].items())
    log.info("%s, held out: %s", name, shown)
    return figures


def run_sft(cfg: Config, workdir: str, profile_steps: int = 0) -> None:
    """SFT on sft.task; evaluated on its held-out problems."""
    with open_session(cfg, workdir) as session:
        task = build_task(cfg.sft.task)
        _log_sizes(cfg.sft.task.name, task)
        evaluator = _evaluator(session, task.held_out)
        trainer = SFTTrainer(session, task.train, steps=cfg.sft.steps, evaluator=evaluator)
        outcome = _run(session, trainer, session.initial_params(), ".", profile_steps=profile_steps)
        end = evaluator and _evaluation(
            session, evaluator, "end", outcome.state.params, outcome.steps
        )
        summary = _summary(session, sft=_stage(outcome), end=_figures(end))
        if hosts.first():
            report.write_sft(session, summary, end)


def run_rl(cfg: Config, workdir: str, profile_steps: int = 0) -> None:
    """GRPO with routing replay on rl_task, from init_from or random parameters."""
    with open_session(cfg, workdir) as session:
        task = only(build_task(cfg.rl_task), cfg.rl_problems)
        _log_sizes(cfg.rl_task.name, task)
        evaluator = _evaluator(session, task.held_out)
        trainer = RLTrainer(session, task.train, evaluator)
        params = session.initial_params()
        start = evaluator and _evaluation(session, evaluator, "start", params, 0)
        outcome = _run(session, trainer, params, ".", profile_steps=profile_steps)
        end = evaluator and _evaluation(
            session, evaluator, "end", outcome.state.params, outcome.steps
        )
        summary = _summary(session, rl=_stage(outcome), start=_figures(start), end=_figures(end))
        if hosts.first():
            report.write_rl(session, summary, start, end)


def run_sft_then_rl(cfg: Config, workdir: str, profile_steps: int = 0) -> None:
    """SFT on sft.task, RL on rl_task, and for honesty SFT continued for RL's wall time.

    The two tasks share no question, so no solution of rl_task is ever seen. Writes report.html
    and summary.json with the held-out figures of all three on rl_task, and RL's gains over both,
    paired by problem.
    """
    with open_session(cfg, workdir) as session:
        hard = only(build_task(cfg.rl_task), cfg.rl_problems)
        easy = build_task(cfg.sft.task, exclude=[*hard.train, *hard.held_out])
        _log_sizes(f"SFT on {cfg.sft.task.name}", easy)
        _log_sizes(f"RL on {cfg.rl_task.name}", hard)
        evaluator = _evaluator(session, hard.held_out)
        if evaluator is None:
            raise ConfigError("rl_task.held_out: this mode compares held-out figures; not 0")

        trainer = SFTTrainer(session, easy.train, steps=cfg.sft.steps, evaluator=None)
        warm = _run(session, trainer, session.initial_params(), "sft")
        start = _evaluation(session, evaluator, "start", warm.state.params, warm.steps)

        learner = RLTrainer(session, hard.train, evaluator)
        # RL donates its parameters; SFT goes on from these.
        params = jax.tree.map(jnp.copy, warm.state.params)
        rl = _run(session, learner, params, "rl", profile_steps=profile_steps)
        end = _evaluation(session, evaluator, "end", rl.state.params, rl.steps)

        control = _continue_sft(session, easy, warm, rl.seconds)
        other = _evaluation(
            session, evaluator, "sft_continued", control.state.params, control.steps
        )
        summary = _summary(
            session,
            sft=_stage(warm),
            rl=_stage(rl),
            sft_continued=_stage(control),
            start=_figures(start),
            end=_figures(end),
            sft_continued_end=_figures(other),
            gain=_gain(start, end),
            gain_over_sft_continued=_gain(other, end),
        )
        if hosts.first():
            report.write_comparison(session, summary, start, end, other)


def run_pretrain_sft_rl(cfg: Config, workdir: str, profile_steps: int = 0) -> None:
    """Pre-training (in WORKDIR/pretrain, growing where told so), then SFT and RL of its model.

    The predictor that growth carried along is the one that RL trains. Each part has its own
    summary and report; the last one's lie in WORKDIR.
    """
    folder = as_path(workdir) / "pretrain"
    first, _ = cfg.parts("")
    run_pretrain(first, str(folder), profile_steps)
    last = emo.last_folder(cfg, folder) if cfg.emo.experts else folder
    _, second = cfg.parts(str(last))
    run_sft_then_rl(second, workdir, profile_steps)


def _continue_sft(session: Session, task: Task, warm: Outcome, seconds: float) -> Outcome:
    """SFT from where it ended, its optimizer's moments kept, for `seconds` of wall time."""
    log.info("SFT continued for the same %.0f s", seconds)
    # At the rate where the warm-up ended; a schedule that had ended at 0 would be no comparison.
    cfg = session.cfg.sft
    rate = max(float(learning_rate(cfg.optim, cfg.steps - 1)), 0.1 * cfg.optim.learning_rate)
    optim = dataclasses.replace(cfg.optim, schedule="constant", warmup_steps=0, learning_rate=rate)
    trainer = SFTTrainer(
        session,
        task.train,
        steps=warm.steps + 10**9,
        evaluator=None,
        name="sft continued",
        optim=optim,
    )
    return run(
        trainer,
        warm.state,
        workdir=session.workdir / "sft_continued",
        options=dataclasses.replace(session.cfg.loop, checkpoint_every=0),
        config=session.config_json,
        max_seconds=seconds,
        start=warm.steps,
    )
