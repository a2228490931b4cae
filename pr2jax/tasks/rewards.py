r"""Format and length rewards: named, weighted terms beside the verifier's score.

Each term is a function of the response alone, in [0, 1]; what a trainer adds to the score is
weight x term. They say nothing about whether an answer is right.
"""

import dataclasses
from typing import Literal, get_args

from pr2jax.core.config import ConfigError
from pr2jax.tasks import answers

Format = Literal["boxed", "answer_tag", "think", "think_opened", "json", "code"]
Kind = Literal["boxed", "answer_tag", "think", "think_opened", "json", "code", "length"]


@dataclasses.dataclass(frozen=True)
class RewardTerm:
    """One term.

    kind: a format of `format_reward`, or "length". weight: what the term is multiplied by; may be
    negative. target, max: length: tokens up to which a response gets 1, and from which it gets 0.
    """

    kind: Kind = "boxed"
    weight: float = 0.1
    target: int = 0
    max: int = 0

    def validate(self) -> None:
        """Raises ConfigError naming the key."""
        if self.kind not in get_args(Kind):
            raise ConfigError(f"kind: {self.kind!r} is not one of {', '.join(get_args(Kind))}")
        if self.weight != self.weight or abs(self.weight) == float("inf"):
            raise ConfigError(f"weight: {self.weight} is no finite number")
        if self.kind == "length":
            if not 0 <= self.target < self.max:
                raise ConfigError(f"max: target {self.target} and max {self.max} leave no slope")
        elif self.target or self.max:
            raise ConfigError(f"target: only for kind 'length', not for {self.kind!r}")


def term_value(term: RewardTerm, text: str, tokens: int) -> float:
    """The term of a response in [0, 1], before its weight."""
    if term.kind == "length":
        return length_reward(tokens, term.target, term.max)
    return format_reward(term.kind, text)


def format_reward(kind: Format, text: str) -> float:
    r"""1.0 where the response has the form, else 0.0.

    boxed: a complete, non-empty \boxed{} after </think>. answer_tag: so for <answer>...</answer>,
    exactly one. think: exactly one <think>...</think>, at the start, then a non-empty answer.
    think_opened: the same where the prompt already opened it: one </think> and no <think>.
    json: an answer in a fence, a box or braces that parses. code: a complete, non-empty ``` block.
    """
    if kind == "boxed":
        return float(bool((answers.last_boxed(text) or "").strip()))
    if kind == "answer_tag":
        after = answers.after_think(text) or ""
        once = after.count("<answer>") == after.count("</answer>") == 1
        return float(once and bool(answers.answer_tag(text)))
    if kind in ("think", "think_opened"):
        opened = text.count(answers.THINK_OPEN)
        closed = text.count(answers.THINK_CLOSE)
        if closed != 1 or opened != (kind == "think"):
            return 0.0
        if kind == "think" and not text.lstrip().startswith(answers.THINK_OPEN):
            return 0.0
        return float(bool((answers.after_think(text) or "").strip()))
    if kind == "json":
        return float(answers.json_answer(text)[0])
    if kind == "code":
        return float(bool((answers.last_code(text) or "").strip()))
    raise ValueError(f"format {kind!r} is not one of {', '.join(get_args(Format))}")


def length_reward(tokens: int, target: int, max: int) -> float:
    """1 up to `target` tokens, 0 from `max` on, and linear between."""
    if tokens <= target:
        return 1.0
    return 0.0 if tokens >= max else (max - tokens) / (max - target)
