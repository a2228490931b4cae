"""One checkpoint on one suite: its samples on disk, written batch by batch, and their figures.

FOLDER/SUITE.jsonl has a line a sample: checkpoint, suite, id, domain, sample (from 0), prompt,
reference, response, answer (what a majority vote counts; null: none), score, reason, tokens
(sampled), finish ("stop" or "length"). FOLDER/SUITE.json says what they were made of and how
far they go; a cell that was cut off goes on from its last whole batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from pr2jax.core.config import ConfigError
from pr2jax.core.metrics import write_json
from pr2jax.evaluation.passk import Interval, bootstrap_interval
from pr2jax.evaluation.runner import Sample, figures
from pr2jax.evaluation.votes import answer_key
from pr2jax.sampler.types import FINISH_LENGTH, Rollout
from pr2jax.tasks.base import Problem, Verdict, domain_of


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a checkpoint did on a suite.

    per_problem: figures by problem (`runner.figures`, with maj@k). domains: of each problem.
    samples: what was answered. failures: responses that a verifier could not judge, by kind;
    they score 0. seconds: sampling and scoring.
    """

    checkpoint: str
    suite: str
    n: int
    ks: tuple[int, ...]
    per_problem: dict[str, Float[np.ndarray, " P"]]
    domains: tuple[str, ...]
    samples: list[Sample]
    failures: dict[str, int]
    seconds: float

    @property
    def metrics(self) -> dict[str, Interval]:
        """Each figure's mean, with its interval over problems."""
        return {name: bootstrap_interval(values) for name, values in self.per_problem.items()}

    def of_domain(self, name: str, domain: str = "") -> Float[np.ndarray, " P"] | None:
        """A figure of the problems of a domain (empty: of all); "avg" is avg@n. None without."""
        values = self.per_problem.get(f"avg@{self.n}" if name == "avg" else name)
        here = np.array([not domain or d == domain for d in self.domains])
        return None if values is None or not here.any() else values[here]


def digest(problems: Sequence[Problem]) -> str:
    """A hash of what the problems ask, in their order."""
    found = hashlib.sha256()
    for p in problems:
        found.update(json.dumps([p.id, p.input, p.answer, p.data_source]).encode())
    return found.hexdigest()[:16]


class CellFiles:
    """The files of one cell, for whoever samples it.

    made_of: what decides the samples (JSON-able). Raises ConfigError where the folder holds this
    cell made of something else: its samples are neither lost nor mixed.
    """

    def __init__(
        self, folder: Path, checkpoint: str, suite: str, n: int, made_of: Mapping[str, Any]
    ):
        self.rows, self.state = folder / f"{suite}.jsonl", folder / f"{suite}.json"
        self.checkpoint, self.suite, self.n = checkpoint, suite, n
        made_of = json.loads(json.dumps(made_of))
        self._at: dict[str, Any] = {
            "made_of": made_of,
            "problems": 0,
            "bytes": 0,
            "failures": {},
            "seconds": 0.0,
            "complete": False,
        }
        if self.state.exists():
            self._at = json.loads(self.state.read_text(encoding="utf-8"))
            other = _difference(self._at["made_of"], made_of)
            if other:
                raise ConfigError(
                    f"evaluation: {self.state} was made with another {other}; remove it, or take "
                    "another --workdir"
                )

    @property
    def complete(self) -> bool:
        """Whether every problem is there."""
        return self._at["complete"]

    @property
    def done(self) -> int:
        """Problems that are there."""
        return self._at["problems"]

    def append(
        self,
        rows: Sequence[Mapping[str, Any]],
        failures: Mapping[str, int],
        seconds: float,
        last: bool,
    ) -> None:
        """Adds a scored batch, n `row`s a problem; on disk when this returns."""
        self.rows.parent.mkdir(parents=True, exist_ok=True)
        named = {"checkpoint": self.checkpoint, "suite": self.suite}
        lines = [json.dumps(named | row, ensure_ascii=False) for row in rows]
        body = "".join(f"{line}\n" for line in lines).encode("utf-8", errors="replace")
        with open(self.rows, "r+b" if self.rows.exists() else "w+b") as file:
            file.truncate(self._at["bytes"])  # what a killed run left of its last batch
            file.seek(0, os.SEEK_END)
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        at = self._at
        total = {k: at["failures"].get(k, 0) + v for k, v in failures.items()}
        self._at = at | {
            "problems": at["problems"] + len(rows) // self.n,
            "bytes": at["bytes"] + len(body),
            "failures": at["failures"] | total,
            "seconds": at["seconds"] + seconds,
            "complete": last,
        }
        write_json(self.state, self._at)

    def read(self, ks: tuple[int, ...]) -> Cell:
        """The figures of a complete cell. Raises ConfigError for a file that is damaged."""
        try:
            with open(self.rows, encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
            why = f"{len(rows)} samples, not {self.done} x {self.n}"
        except (OSError, ValueError) as error:
            rows, why = [], str(error)
        if not self.complete or len(rows) != self.done * self.n:
            raise ConfigError(f"evaluation: {self.rows}: {why}; remove it and {self.state.name}")
        groups = [rows[i : i + self.n] for i in range(0, len(rows), self.n)]

        def column(key: str) -> list[list[Any]]:
            return [[row[key] for row in group] for group in groups]

        cut = np.array(column("finish")) == "length"
        per_problem = figures(
            np.array(column("score")), np.array(column("tokens")), cut, ks, column("answer")
        )
        return Cell(
            checkpoint=self.checkpoint,
            suite=self.suite,
            n=self.n,
            ks=ks,
            per_problem=per_problem,
            domains=tuple(group[0]["domain"] for group in groups),
            samples=[_sample(group) for group in groups],
            failures=self._at["failures"],
            seconds=self._at["seconds"],
        )


def _difference(before: Any, now: Any, key: str = "") -> str:
    """ "dotted.key: BEFORE, now NOW" of the first thing that differs; empty where nothing does."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return "" if before == now else f"{key}: {before}, now {now}"
    for name in sorted(before.keys() | now.keys()):
        path = f"{key}.{name}" if key else name
        found = _difference(before.get(name), now.get(name), path)
        if found:
            return found
    return ""


def row(problem: Problem, sample: int, text: str, verdict: Verdict, tokens: int, cut: bool):
    """A line of a cell's file, but for checkpoint and suite. cut: at the length limit."""
    return {
        "id": problem.id,
        "domain": domain_of(problem),
        "sample": sample,
        "prompt": problem.prompt,
        "reference": problem.answer,
        "response": text,
        "answer": answer_key(problem, text),
        "score": float(verdict.score),
        "reason": verdict.reason,
        "tokens": int(tokens),
        "finish": "length" if cut else "stop",
    }


def rollout_rows(
    problems: Sequence[Problem], rollout: Rollout, texts: Sequence[str], n: int
) -> list[dict[str, Any]]:
    """`row`s of a scored rollout, whose rows are group-major."""
    lengths = rollout.lengths - rollout.prompt_lengths
    return [
        row(
            problems[b // n],
            b % n,
            text,
            Verdict(float(rollout.rewards[b]), rollout.reasons[b]),
            lengths[b],
            rollout.finish[b] == FINISH_LENGTH,
        )
        for b, text in enumerate(texts)
    ]


def _sample(group: Sequence[Mapping[str, Any]]) -> Sample:
    """The responses to one problem, as the report shows them."""
    first = group[0]
    reasons = [
        "; ".join(filter(None, [row["reason"], _cut(row["tokens"], row["finish"])]))
        for row in group
    ]
    return Sample(
        problem=Problem(first["id"], first["prompt"], first["reference"], ""),
        responses=tuple(row["response"] for row in group),
        scores=tuple(row["score"] for row in group),
        reasons=tuple(reasons),
    )


def _cut(tokens: int, finish: str) -> str:
    return f"cut off at {tokens} tokens" if finish == "length" and tokens else ""
