"""Sampling from a checkpoint to JSONL."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

from pr2jax.core.config import ConfigError
from pr2jax.core.fetch import fetched
from pr2jax.core.store import Staged
from pr2jax.tasks.base import Problem
from pr2jax.tasks.registry import build_task
from pr2jax.train.config import Config
from pr2jax.train.session import Session, open_session

log = logging.getLogger("pr2jax")

_BATCH = 64  # prompts a call, so that output appears as it is made


def _prompts(session: Session) -> list[Problem]:
    generate = session.cfg.generate
    if generate.task is not None:
        return build_task(generate.task).held_out
    path = Path(fetched(generate.prompts))
    if not path.is_file():
        raise ConfigError(f"generate.prompts: no file {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    made = [Problem(str(i), line, "", "text") for i, line in enumerate(lines) if line]
    if not made:
        raise ConfigError(f"generate.prompts: {path} holds no prompt")
    return made


def run_generate(cfg: Config, workdir: str, profile_steps: int = 0) -> None:
    """Samples every prompt and writes WORKDIR/OUTPUT, a JSON object a prompt.

    Keys: id, prompt, completions [{text, tokens, logprobs, finish}], and for a task also answer
    and each completion's score and reason. Raises ConfigError, CheckpointError.
    """
    if profile_steps:
        raise ConfigError("--profile: only for modes that train")
    with open_session(cfg, workdir) as session:
        cfg = session.cfg
        problems = _prompts(session)
        params = session.initial_params()
        path = session.workdir / cfg.generate.output
        with (
            Staged(path.parent) as staged,
            open(staged.path / path.name, "w", encoding="utf-8") as file,
        ):
            for start in range(0, len(problems), _BATCH):
                for row in _sample(session, params, problems[start : start + _BATCH], start):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                staged.sync_now_and_then()
                done = min(start + _BATCH, len(problems))
                log.info("%d of %d prompts sampled", done, len(problems))
        log.info("samples in %s", path)


def _sample(session: Session, params, problems: list[Problem], offset: int) -> list[dict]:
    generate = session.cfg.generate
    completions = session.sampler.generate(
        [session.encode(p) for p in problems],
        generate.sampling,
        n=generate.samples,
        params=params,
        seeds=[generate.sampling.seed + offset + i for i in range(len(problems))],
    )
    rows = []
    for problem, answers in zip(problems, completions, strict=True):
        row = {
            "id": problem.id,
            "prompt": problem.prompt,
            "completions": [dataclasses.asdict(c) for c in answers],
        }
        if generate.task is not None:
            verdicts = session.pool.score_batch([(problem, c.text) for c in answers])
            row["answer"] = problem.answer
            for made, verdict in zip(row["completions"], verdicts, strict=True):
                made |= {"score": verdict.score, "reason": verdict.reason}
        rows.append(row)
    return rows
