"""What our own generators have in common: items, levels, forms of answers."""

import dataclasses
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

from pr2jax.core.config import ConfigError
from pr2jax.tasks.base import Problem

Level = Literal["tiny", "easy", "medium", "hard"]
LEVELS: tuple[Level, ...] = ("tiny", "easy", "medium", "hard")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that every generator has.

    level: how hard; "tiny" has questions of at most 80 characters and answers of at most 18 (zebra
        puzzles apart), for models trained from scratch.
    form: "full": the answer as Guru asks for it (\\boxed{}, <answer>, a fence...), which the
        question asks for too; "unasked": so, but the question does not say it; "bare": the answer
        alone is the whole response.
    families: names of the kinds of question to draw from; empty takes all that the level has.
    """

    level: Level = "easy"
    form: Literal["full", "unasked", "bare"] = "full"
    families: tuple[str, ...] = ()

    def choose(self, rng: random.Random, known: dict[str, Any] | tuple[str, ...]) -> str:
        """One of the families, drawn. Raises ConfigError for one that the level does not have."""
        for name in self.families:
            if name not in known:
                raise ConfigError(
                    f"families: {name!r} is not one of {', '.join(known)} (level {self.level})"
                )
        return rng.choice(self.families or tuple(known))


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    truth: ground truth as text, as Guru's files have it. value: the right answer, bare; wrap: the
    form around it, with "{}" in its place. ask: what the question says about the form. meta: what
    the verifier and `wrong` need.
    """

    question: str
    truth: str
    value: str
    wrap: str
    ask: str
    data_source: str
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Generator:
    """A generator of one domain.

    make: (rng, settings) -> Item; all randomness is of `rng`. wrong: (problem, rng) -> (a response
    that is wrong, the score it must get).
    """

    domain: str
    make: Callable[[random.Random, Any], Item]
    wrong: Callable[[Problem, random.Random], tuple[str, float]]
    settings: type[Settings] = Settings


def respond(problem: Problem, value: str) -> str:
    """`value` in the form in which the problem's answer is given."""
    return problem.meta["wrap"].replace("{}", value, 1)


BOXED = ("\\boxed{{}}", "Put the answer within \\boxed{}.")


def number_text(value: Fraction | int | float, places: int = 6) -> str:
    """A number without exponent, at most `places` decimals, no zeros at the end."""
    text = f"{float(value):.{places}f}" if not isinstance(value, int) else str(value)
    return text.rstrip("0").rstrip(".") if "." in text else text
