"""Sampling and scoring problems with a policy: what held-out evaluation and rewards both need."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from pr2jax.core import hosts
from pr2jax.data.tokenizer import Tokenizer, encode_prompt
from pr2jax.evaluation import passk
from pr2jax.evaluation.passk import Interval
from pr2jax.sampler.types import FINISH_LENGTH, FINISH_STOP, Rollout, SamplingParams
from pr2jax.tasks.base import Problem, Verdict, domain_of


class Scorer(Protocol):
    """Something with `tasks.pool.VerifierPool`'s way to score."""

    def score_batch(self, items: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Verdicts in the order of `items`."""
        ...


@dataclasses.dataclass(frozen=True)
class Sample:
    """The responses to one problem, with their scores and reasons."""

    problem: Problem
    responses: tuple[str, ...]
    scores: tuple[float, ...]
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-able row: id, domain, prompt, answer, responses, scores, reasons."""
        return {
            "id": self.problem.id,
            "domain": domain_of(self.problem),
            "prompt": self.problem.prompt,
            "answer": self.problem.answer,
            "responses": list(self.responses),
            "scores": list(self.scores),
            "reasons": list(self.reasons),
        }


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Figures of one evaluation.

    metrics: what `figures` gives, each with an interval over problems.
    per_problem: the same figures by problem, in the order given, for paired comparisons.
    samples: what was answered.
    """

    metrics: dict[str, Interval]
    per_problem: dict[str, Float[np.ndarray, " P"]]
    samples: list[Sample]

    def flat(self, prefix: str = "") -> dict[str, float]:
        """{"pass@1": mean, "pass@1/low": ..., "pass@1/high": ...}, each with the prefix."""
        out = {}
        for name, value in self.metrics.items():
            out[f"{prefix}{name}"] = value.mean
            out[f"{prefix}{name}/low"] = value.low
            out[f"{prefix}{name}/high"] = value.high
        return out


def response_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """Each row's sampled tokens as text, without the stop token that ended it."""
    texts = []
    for b in range(len(rollout.tokens)):
        ids = rollout.tokens[b, rollout.prompt_lengths[b] : rollout.lengths[b]].tolist()
        stops = {tokenizer.eos_id, *rollout.sampling.stop_ids}
        if rollout.finish[b] == FINISH_STOP and ids and ids[-1] in stops:
            ids = ids[:-1]
        texts.append(tokenizer.decode(ids))
    return texts


def score_rollout(
    rollout: Rollout, problems: Sequence[Problem], n: int, tokenizer: Tokenizer, pool: Scorer
) -> tuple[Rollout, list[str]]:
    """The rollout with rewards and reasons filled in, and its texts.

    Of several hosts each scores every n-th row, and all know all verdicts. Rows are group-major:
    problem i's are i*n .. i*n+n-1. Raises ValueError if they do not fit.
    """
    if len(rollout.tokens) != len(problems) * n:
        raise ValueError(f"{len(rollout.tokens)} rows, not {len(problems)} problems x {n}")
    texts = response_texts(rollout, tokenizer)
    verdicts = _scored(pool, [(problems[b // n], text) for b, text in enumerate(texts)])
    rewards = np.array([v.score for v in verdicts], np.float32)
    return rollout.replace(rewards=rewards, reasons=tuple(v.reason for v in verdicts)), texts


def _scored(pool: Scorer, items: list[tuple[Problem, str]]) -> list[Verdict]:
    """Verdicts of all items, each by one host."""
    index, count = jax.process_index(), jax.process_count()
    with hosts.together("verifying"):
        own = pool.score_batch(items[index::count])
    if count == 1:
        return own
    verdicts: list[Verdict] = [Verdict(0.0, "")] * len(items)
    for i, found in enumerate(hosts.gather([dataclasses.astuple(v) for v in own])):
        verdicts[i::count] = [Verdict(*fields) for fields in found]
    return verdicts


def evaluate(
    sampler: Any,
    params: Any,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    pool: Scorer,
    sampling: SamplingParams,
    n: int,
    ks: Sequence[int],
    key: Key[Array, ""],
) -> EvalResult:
    """Samples n responses to each problem and scores them.

    sampler: anything with `Sampler.rollout`. ks: the k of pass@k, each at most n.
    The same key gives the same responses. Raises ValueError without problems or for k > n.
    """
    if not problems:
        raise ValueError("no problems to evaluate")
    if any(not 1 <= k <= n for k in ks):
        raise ValueError(f"pass@k for k in {list(ks)} from {n} samples a problem: k must be 1..{n}")
    prompts = [encode_prompt(tokenizer, p.input) for p in problems]
    rollout, _ = sampler.rollout(prompts, n, sampling, params=params, key=key)
    rollout, texts = score_rollout(rollout, problems, n, tokenizer, pool)
    return summarise(rollout, texts, problems, n, ks)


def summarise(
    rollout: Rollout, texts: list[str], problems: Sequence[Problem], n: int, ks: Sequence[int]
) -> EvalResult:
    """Figures of a scored rollout (see `EvalResult`)."""
    scores = rollout.rewards.astype(np.float64).reshape(len(problems), n)
    lengths = (rollout.lengths - rollout.prompt_lengths).reshape(len(problems), n)
    cut = (rollout.finish == FINISH_LENGTH).reshape(len(problems), n)
    per_problem = figures(scores, lengths, cut, ks)
    samples = [
        Sample(
            problem=problem,
            responses=tuple(texts[i * n : (i + 1) * n]),
            scores=tuple(scores[i].tolist()),
            reasons=rollout.reasons[i * n : (i + 1) * n],
        )
        for i, problem in enumerate(problems)
    ]
    metrics = {name: passk.bootstrap_interval(v) for name, v in per_problem.items()}
    return EvalResult(metrics, per_problem, samples)


def figures(
    scores: Float[np.ndarray, "P n"],
    lengths: Int[np.ndarray, "P n"],
    cut: Bool[np.ndarray, "P n"],
    ks: Sequence[int],
    answers: Sequence[Sequence[Hashable]] | None = None,
) -> dict[str, Float[np.ndarray, " P"]]:
    """Figures by problem: "avg@n" (mean score), "pass@k"; for k > 1 "best@k" and "worst@k", and
    with `answers` (see `passk.majority_at_k`) "maj@k"; "length" (sampled tokens), "truncated"
    (share of responses cut at the length limit)."""
    n = scores.shape[1]
    right = (scores >= passk.PASS_SCORE).sum(axis=1)
    out = {f"avg@{n}": passk.avg_at_n(scores)}
    out |= {f"pass@{k}": passk.pass_at_k(n, right, k) for k in ks}
    several = [k for k in ks if k > 1]  # best@1 = worst@1 = avg@n
    out |= {f"best@{k}": passk.best_at_k(scores, k) for k in several}
    out |= {f"worst@{k}": passk.worst_at_k(scores, k) for k in several}
    if answers is not None:
        out |= {f"maj@{k}": passk.majority_at_k(answers, scores, k) for k in several}
    return out | {"length": lengths.mean(axis=1), "truncated": cut.mean(axis=1)}
