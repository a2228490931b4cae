"""How hard a task's problems are for a checkpoint, and the problems of one difficulty.

The IsoCompute study chooses its problem sets by the base model's avg@16: easy, hard, and (by
pass@128) extremely hard. Training and held-out problems are measured alike, so that a chosen set
has both.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pr2jax.core.config import ConfigError
from pr2jax.core.device import versions
from pr2jax.core.fetch import fetched
from pr2jax.core.files import replacing
from pr2jax.core.metrics import write_json, write_summary
from pr2jax.evaluation.passk import PASS_SCORE, bootstrap_interval
from pr2jax.evaluation.runner import score_rollout
from pr2jax.tasks.base import Problem, Task
from pr2jax.tasks.registry import build_task
from pr2jax.train.config import Config
from pr2jax.train.session import Session, open_session

log = logging.getLogger("pr2jax")

SCORES, PROBLEMS = "scores.jsonl", "problems.jsonl"
_OF = "scores_of.json"
_WAVES = 4  # of the sampler's slots, between two writes


def run_difficulty(cfg: Config, workdir: str, profile_steps: int = 0) -> None:
    """Answers every problem of rl_task regime.samples times and chooses those of the regime.

    WORKDIR/scores.jsonl has a row a problem ({id, split, scores}), written as it goes: the same
    command goes on where it was stopped. problems.jsonl has the chosen ones as rows of the Guru
    schema, with id, split and avg@N besides (for `rl_problems`); summary.json the counts.
    Raises ConfigError where too few are left to train on, or to evaluate.
    """
    if profile_steps:
        raise ConfigError("--profile: only for modes that train")
    with open_session(cfg, workdir) as session:
        task = build_task(cfg.rl_task)
        problems = [*task.held_out, *task.train]
        splits = ["held_out"] * len(task.held_out) + ["train"] * len(task.train)
        scores = _measure(session, problems, splits)
        average = scores.mean(axis=1)
        chosen = (average >= cfg.regime.low) & (average <= cfg.regime.high)
        _write_chosen(session, problems, splits, average, chosen)
        _summarise(session, splits, scores, chosen)


def _measure(session: Session, problems: Sequence[Problem], splits: Sequence[str]) -> np.ndarray:
    """Scores [problems, samples] of what is in the file already and of the rest."""
    cfg, samples = session.cfg, session.cfg.regime.samples
    keys = ("seed", "compute_dtype", "init_from", "model", "tokenizer", "rl_task")
    of = {key: session.config_json[key] for key in keys}
    of |= {"sampling": session.config_json["eval"]["sampling"], "samples": samples}
    path, note = session.workdir / SCORES, session.workdir / _OF
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != of:
        raise ConfigError(f"--workdir: {path} holds scores of another configuration")
    write_json(note, of)
    rows = list(_read(path))
    if [row["id"] for row in rows] != [p.id for p in problems[: len(rows)]]:
        raise ConfigError(f"--workdir: {path} holds scores of other problems")
    scores = [row["scores"] for row in rows]
    if len(scores) == len(problems):
        return np.array(scores, np.float64)
    params = session.initial_params()
    size = max(1, _WAVES * cfg.sampler.slots // samples)
    with open(path, "a", encoding="utf-8") as file:
        for start in range(len(scores), len(problems), size):
            part = problems[start : start + size]
            rollout, _ = session.sampler.rollout(
                [session.encode(p) for p in part],
                samples,
                cfg.eval.sampling,
                params=params,
                key=session.key("difficulty"),
                request_offset=start * samples,
            )
            scored, _ = score_rollout(rollout, part, samples, session.tokenizer, session.pool)
            found = scored.rewards.astype(np.float64).reshape(len(part), samples).tolist()
            for problem, split, values in zip(part, splits[start:], found, strict=False):
                row = {"id": problem.id, "split": split, "scores": values}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            scores += found
            log.info("difficulty: %d of %d problems", len(scores), len(problems))
    return np.array(scores, np.float64)


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file; what a killed writer left of the last line is cut off the file."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with replacing(path) as file:
            file.write(whole)
    for line in whole.decode("utf-8").splitlines():
        yield json.loads(line)


def _write_chosen(session: Session, problems, splits, average, chosen) -> None:
    name = f"avg@{session.cfg.regime.samples}"
    with replacing(session.workdir / PROBLEMS) as file:
        for i in np.flatnonzero(chosen):
            problem = problems[i]
            row = {
                "id": problem.id,
                "split": splits[i],
                name: float(average[i]),
                "data_source": problem.data_source,
                "prompt": [{"role": "user", "content": problem.meta.get("question", "")}],
                "reward_model": {"ground_truth": problem.answer},
                "extra_info": {"index": int(i)},
            }
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))


def _summarise(session: Session, splits, scores: np.ndarray, chosen: np.ndarray) -> None:
    """summary.json, once there is enough to go on with. Raises ConfigError."""
    cfg, regime = session.cfg, session.cfg.regime
    average = scores.mean(axis=1)
    split = np.array(splits)
    left = {name: int((chosen & (split == name)).sum()) for name in ("train", "held_out")}
    interval = bootstrap_interval(average)
    edges = np.linspace(0.0, 1.0, 11)
    counts = np.histogram(average, edges)[0].tolist()
    told = ", ".join(f"{low:.1f}: {n}" for low, n in zip(edges, counts, strict=False))
    log.info("difficulty: avg@%d %s; problems from %s", regime.samples, interval, told)
    log.info("difficulty: %(train)d problems to train on, %(held_out)d held out are chosen", left)
    least = {"train": cfg.rl.prompts_per_batch, "held_out": int("held_out" in splits)}
    for name, wanted in least.items():
        if left[name] < wanted:
            raise ConfigError(
                f"regime: {left[name]} of {int((split == name).sum())} {name} problems have "
                f"{regime.low} <= avg@{regime.samples} <= {regime.high}; {wanted} are needed "
                f"(avg@{regime.samples} is {interval}; problems by tenths: {counts})"
            )
    summary = {
        "mode": cfg.mode,
        "regime": dataclasses.asdict(regime),
        "average": {"value": interval.mean, "low": interval.low, "high": interval.high},
        "solved_once": float((scores >= PASS_SCORE).any(axis=1).mean()),
        "histogram": {"edges": edges, "problems": counts},
        "pool": {name: int((split == name).sum()) for name in left},
        "chosen": left,
        "versions": versions(),
        "config": session.config_json,
        "wall_seconds": round(session.wall_seconds(), 1),
    }
    write_summary(session.workdir, summary)


def only(task: Task, path: str) -> Task:
    """`task` with the problems named in the JSONL file `path` alone (all, where it is empty).

    Raises ConfigError("rl_problems: ...") for a file that cannot be read, a row without an id,
    an id that `task` has not, and where nothing is left to train on.
    """
    if not path:
        return task
    ids = set()
    try:
        lines = Path(fetched(path)).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"rl_problems: {path} cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            ids.add(row["id"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"rl_problems: {path}:{number}: no JSON object with an id") from None
    train = [p for p in task.train if p.id in ids]
    held_out = [p for p in task.held_out if p.id in ids]
    unknown = ids - {p.id for p in train} - {p.id for p in held_out}
    if unknown:
        raise ConfigError(
            f"rl_problems: {len(unknown)} of {len(ids)} ids in {path} are not of "
            f"{task.config.name} as it is configured, such as {min(unknown)!r}"
        )
    if not train:
        raise ConfigError(f"rl_problems: {path} leaves nothing to train on")
    stats = task.stats | {"named": len(ids)}
    return dataclasses.replace(task, train=train, held_out=held_out, stats=stats)
