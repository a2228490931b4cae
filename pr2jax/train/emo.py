"""Pre-training that grows its experts: a stage a folder, growth in between (arXiv 2605.13247).

Every phase (`emo.schedule.Phase`) is a stage of the loop with a model, a program and checkpoints
of its own. Growth is a function of the state that a phase ends with, which is on disk before the
next begins: a run that is killed in the middle of growth grows again from there, to the same
bits; once the next phase has a checkpoint it goes on from that, and nothing grows twice.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import time
from typing import Any

import jax
import numpy as np
from etils import epath

from pr2jax.core import hosts
from pr2jax.core.checkpoint import Checkpointer
from pr2jax.core.config import ConfigError
from pr2jax.core.hardware import GB
from pr2jax.core.metrics import read_jsonl, write_json
from pr2jax.core.params import init_params
from pr2jax.core.sharding import param_shardings
from pr2jax.core.state import TrainState
from pr2jax.emo.expansion import expand
from pr2jax.emo.schedule import EMOConfig, Phase, law_params, plan_phases, with_schedule
from pr2jax.models.flops import active_params, total_params
from pr2jax.models.transformer import param_specs
from pr2jax.train.config import Config
from pr2jax.train.loop import CHECKPOINTS, run
from pr2jax.train.pretrain import PretrainData, PretrainTrainer
from pr2jax.train.session import Session

log = logging.getLogger("pr2jax")

PLAN = "plan.json"
_MEASURED = ("step_seconds", "memory_bytes")
# Steps before growth whose mean loss says when it is recovered from, and a mean's length after.
RECOVERY_WINDOW = 10


def phases_of(cfg: Config) -> list[Phase]:
    """The run's phases. Raises ConfigError("emo.key: why")."""
    try:
        return plan_phases(cfg.emo, cfg.model, cfg.pretrain.steps)
    except ConfigError as error:
        raise ConfigError(f"emo.{error}") from None


def phase_configs(cfg: Config) -> list[tuple[Phase, Config]]:
    """Each phase as a run of its own model that grows nothing: for what is asked of programs."""
    return [
        (phase, dataclasses.replace(cfg, model=phase.model, emo=EMOConfig()))
        for phase in phases_of(cfg)
    ]


def phase_session(session: Session, phase: Phase, phases: list[Phase]) -> Session:
    """The run's surroundings with a phase's model. Raises ShardingError where the mesh does not
    divide its experts."""
    cfg = session.cfg
    pretrain = dataclasses.replace(
        cfg.pretrain,
        steps=phase.stop,
        optim=with_schedule(cfg.pretrain.optim, phases, cfg.emo.rewarmup_steps),
    )
    specs = param_specs(phase.model)
    mesh = session.mesh
    return dataclasses.replace(
        session,
        cfg=dataclasses.replace(cfg, model=phase.model, pretrain=pretrain),
        specs=specs,
        shardings=None if mesh is None else param_shardings(specs, mesh),
    )


def table(session: Session, phases: list[Phase]) -> list[dict[str, Any]]:
    """What is planned, a row a phase: stage, experts, masked, total and active parameters, steps,
    tokens, share, and the law's loss (nats a token, of its own data) at the phase's end."""
    cfg = session.cfg
    each = cfg.pretrain.batch * cfg.pretrain.row_length
    rows = []
    for phase in phases:
        moe, steps = phase.model.moe, phase.stop - phase.start
        n = cfg.emo.law_params or law_params(phase.model)
        rows.append(
            {
                "stage": phase.stage,
                "experts": moe.num_experts,
                "masked": moe.masked,
                "total_params": total_params(phase.model),
                "active_params": active_params(phase.model),
                "steps": steps,
                "tokens": steps * each,
                "share": steps / phases[-1].stop,
                "law_loss": float(cfg.emo.law.loss(n, phase.stop * each, moe.live / moe.top_k)),
            }
        )
    return rows


def log_table(rows: list[dict[str, Any]]) -> None:
    """The plan, before anything runs."""
    head = ("stage", "experts", "total", "active", "steps", "tokens", "share", "law's loss")
    log.info("%5s %14s %10s %10s %7s %9s %6s %10s %8s %8s", *head, "s/step", "GB/chip")
    told = lambda value, scale: "-" if value is None else f"{value / scale:.3f}"
    for row in rows:
        pool = f"{row['experts']}" + (f" ({row['masked']} masked)" if row["masked"] else "")
        log.info(
            "%5d %14s %9.2fM %9.2fM %7d %8.2fM %5.1f%% %10.3f %8s %8s",
            *(row["stage"], pool, row["total_params"] / 1e6, row["active_params"] / 1e6),
            *(row["steps"], row["tokens"] / 1e6, 100 * row["share"], row["law_loss"]),
            *(told(row["step_seconds"], 1.0), told(row["memory_bytes"], GB)),
        )
    saving = predicted_saving(rows)
    if saving is not None:
        log.info("saving predicted against the last pool from the start: %.1f%%", 100 * saving)


def predicted_saving(rows: list[dict[str, Any]]) -> float | None:
    """1 - sum(share t / t_last): step time won over training the last pool all along (None: not
    measured)."""
    if any(row["step_seconds"] is None for row in rows):
        return None
    last = rows[-1]["step_seconds"]
    return 1.0 - sum(row["share"] * row["step_seconds"] / last for row in rows)


class Trainers:
    """The phases' trainers, made when they are asked for; a phase's program compiles once."""

    def __init__(self, session: Session, data: PretrainData, phases: list[Phase]):
        self.phases, self._data = phases, data
        self.sessions = [phase_session(session, phase, phases) for phase in phases]
        self._made: dict[int, PretrainTrainer] = {}

    def __getitem__(self, index: int) -> PretrainTrainer:
        if index not in self._made:
            self._made[index] = PretrainTrainer(self.sessions[index], self._data)
        return self._made[index]

    def drop(self, index: int) -> None:
        """Lets a phase's trainer and its programs go."""
        self._made.pop(index, None)


def plan(session: Session, trainers: Trainers) -> list[dict[str, Any]]:
    """`table` with what each phase's program takes on this machine: `step_seconds` (median of
    emo.measure_steps, after one that compiles) and `memory_bytes` a chip, both None where nothing
    is measured. Kept in plan.json: a run that goes on measures nothing again. Of several hosts
    the first one's figures count, and whether it has them: all must compile, or none."""
    rows = table(session, trainers.phases)
    path = session.workdir / PLAN
    steps = session.cfg.emo.measure_steps
    own = {"stages": rows, "steps": steps, "devices": jax.device_count()}
    own = json.loads(json.dumps(own | {"device": jax.devices()[0].device_kind}))
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = hosts.from_first(known["stages"] if known.get("planned") == own else None)
    if found is None:
        empty = dict.fromkeys(_MEASURED)
        made = [trainers[i].measure(steps) if steps else empty for i in range(len(rows))]
        found = hosts.from_first([row | own for row, own in zip(rows, made, strict=True)])
    write_json(path, {"planned": own, "stages": found, "predicted_saving": predicted_saving(found)})
    return found


def folder(phase: Phase) -> str:
    """Of a phase, in the run's."""
    return f"stage_{phase.index}"


def last_folder(cfg: Config, workdir: epath.Path) -> epath.Path:
    """Of the last phase: the one with the whole pool."""
    return workdir / folder(phases_of(cfg)[-1])


def _begun(workdir: epath.Path) -> bool:
    """Whether a phase has a checkpoint."""
    path = workdir / CHECKPOINTS
    if not path.is_dir():
        return False
    with Checkpointer(path, read_only=True) as checkpoints:
        return checkpoints.latest_step() is not None


def change(
    state: TrainState, before: Session, after: Session, phase: Phase, optimizer
) -> TrainState:
    """The state that `phase` starts with: grown, or as it is where masks fall."""
    if not phase.grows:
        return state
    return expand(
        state,
        before.cfg.model,
        after.cfg.model,
        after.cfg.emo.growth,
        after.key("growth", phase.stage),
        optimizer,
        after.mesh,
    )


def _transition(phase: Phase, trainers: Trainers, state: TrainState) -> TrainState:
    """Changes the pool and writes down what it did to the held-out loss (growth_INDEX.json)."""
    before, after = trainers.sessions[phase.index - 1 : phase.index + 1]
    smaller, larger = trainers[phase.index - 1], trainers[phase.index]
    path = after.workdir / f"growth_{phase.index}.json"
    loss = smaller.full(state.params)["loss"]
    start = time.monotonic()
    state = jax.block_until_ready(change(state, before, after, phase, larger.optimizer))
    seconds = time.monotonic() - start
    found = larger.full(state.params)["loss"]
    event = {
        "phase": phase.index,
        "step": phase.start,
        "kind": "growth" if phase.grows else "unmasking",
        "experts": [s.cfg.model.moe.live for s in (before, after)],
        "masked": phase.model.moe.masked,
        "loss_before": loss.mean,
        "loss_after": found.mean,
        "jump": found.mean - loss.mean,
        "seconds": seconds,
    }
    write_json(path, event)
    log.info(
        "step %d, %s: %d experts -> %d (%d masked), held-out loss %.4f -> %.4f, %.1f s",
        *(event["step"], event["kind"], *event["experts"], event["masked"]),
        *(event["loss_before"], event["loss_after"], seconds),
    )
    return state


def train(trainers: Trainers, params, profile_steps: int = 0) -> tuple[PretrainTrainer, Any]:
    """Runs every phase that is left; returns the last one's trainer and outcome.

    `params`: initial parameters of the first phase; not read where another has begun.
    """
    phases = trainers.phases
    done = [_begun(trainers.sessions[0].workdir / folder(phase)) for phase in phases]
    done = hosts.from_first(done)  # all go on from the same one
    first = max((i for i, begun in enumerate(done) if begun), default=0)
    trainer = trainers[first]
    if first:  # shapes only: its checkpoint is read
        own = trainers.sessions[first]
        params = init_params(own.specs, own.key("params"), own.shardings)
    state = trainer.initial_state(params)
    del params
    outcome = None
    for phase in phases[first:]:
        own = trainers.sessions[phase.index]
        outcome = run(
            trainer,
            state,
            workdir=own.workdir / folder(phase),
            options=own.cfg.loop,
            config=own.config_json,
            best_metric="eval/loss",
            best_mode="min",
            start=phase.start,
            profile_steps=profile_steps if phase.index == first else 0,
        )
        if phase.index + 1 < len(phases):
            state = _transition(phases[phase.index + 1], trainers, outcome.state)
            trainers[phase.index + 1].remember(trainer.memory())
            trainer, outcome = trainers[phase.index + 1], None
            trainers.drop(phase.index)
    return trainer, outcome


def rows(workdir: epath.Path, phases: list[Phase]) -> list[dict[str, Any]]:
    """metrics.jsonl of every phase, one after another, `experts` added."""
    found = []
    for phase in phases:
        path = workdir / folder(phase)
        own = read_jsonl(path) if (path / "metrics.jsonl").exists() else []
        found += [row | {"experts": phase.model.moe.live} for row in own]
    return found


def seconds_per_token(rows: list[dict[str, Any]]) -> float:
    """Median over a phase's steps; the first two, which may compile, are left out where there are
    more."""
    return float(np.median([1.0 / row["tokens_per_second"] for row in rows[2:] or rows]))


def measured_saving(workdir: epath.Path, phases: list[Phase]) -> float | None:
    """`predicted_saving` with the median step of each phase as it was (None: a phase of fewer than
    three steps)."""
    found = [
        [row for row in read_jsonl(workdir / folder(phase)) if "loss" in row] for phase in phases
    ]
    if min(map(len, found)) < 3:
        return None
    medians = list(map(seconds_per_token, found))
    spent = sum((p.stop - p.start) * t for p, t in zip(phases, medians, strict=True))
    return 1.0 - spent / (phases[-1].stop * medians[-1])


def events(workdir: epath.Path, phases: list[Phase]) -> list[dict[str, Any]]:
    """What every growth and unmasking did, `recovery_steps` among it: steps until the mean
    training loss of RECOVERY_WINDOW steps is back at that of the last ones before (None: never)."""
    losses = {row["step"]: row["loss"] for row in rows(workdir, phases) if "loss" in row}
    found = []
    for phase in phases[1:]:
        event = json.loads((workdir / f"growth_{phase.index}.json").read_text(encoding="utf-8"))
        mean = functools.partial(_mean, losses)
        before = mean(phase.start)
        after = range(phase.start + RECOVERY_WINDOW, phase.stop + 1)
        event["recovery_steps"] = next(
            (step - phase.start for step in after if before is not None and mean(step) <= before),
            None,
        )
        found.append(event)
    return found


def outcome(workdir: epath.Path, phases: list[Phase]) -> dict[str, Any]:
    """What the run's files tell of it: `measured_saving`, and `growth` (events)."""
    return {
        "measured_saving": measured_saving(workdir, phases),
        "growth": events(workdir, phases),
    }


def _mean(losses: dict[int, float], last: int) -> float | None:
    steps = range(last - RECOVERY_WINDOW + 1, last + 1)
    values = [losses[step] for step in steps if step in losses]
    return float(np.mean(values)) if values else None
