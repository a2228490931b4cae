"""Sums, fractions, equations and remainders for the math verifier ("math__generated")."""

import math
import random
from fractions import Fraction

from pr2jax.tasks.base import Problem
from pr2jax.tasks.generated.items import BOXED, Generator, Item, Settings, respond

_DIGITS = {"tiny": 1, "easy": 2, "medium": 3, "hard": 4}


def _sum(rng: random.Random, level: str) -> tuple[str, Fraction]:
    terms = {"tiny": 2, "easy": 3, "medium": 4, "hard": 6}[level]
    top = 99 if level == "tiny" else 10 ** _DIGITS[level] - 1
    values = [rng.randint(1, top) for _ in range(terms)]
    signs = [1, *(rng.choice((1, -1)) for _ in values[1:])]
    text = str(values[0])
    for sign, value in zip(signs[1:], values[1:], strict=True):
        text += f" {'+' if sign > 0 else '-'} {value}"
    total = sum(s * v for s, v in zip(signs, values, strict=True))
    return (text.replace(" ", "") + "=" if level == "tiny" else f"Compute {text}."), Fraction(total)


def _product(rng: random.Random, level: str) -> tuple[str, Fraction]:
    top = 10 ** _DIGITS[level]
    a, b = rng.randint(2, top), rng.randint(2, top)
    return f"Compute {a} * {b}.", Fraction(a * b)


def _fraction(rng: random.Random, level: str) -> tuple[str, Fraction]:
    top = 6 * _DIGITS[level]
    a, b = (Fraction(rng.randint(1, top), rng.randint(2, top)) for _ in range(2))
    sign = rng.choice("+-")
    text = f"{a.numerator}/{a.denominator} {sign} {b.numerator}/{b.denominator}"
    return f"Compute {text} as a fraction in lowest terms.", a + b if sign == "+" else a - b


def _equation(rng: random.Random, level: str) -> tuple[str, Fraction]:
    top = 10 * _DIGITS[level]
    a, b, c = rng.randint(2, top), rng.randint(-top, top), rng.randint(-top, top)
    left = f"{a}x" + (f" {'+' if b > 0 else '-'} {abs(b)}" if b else "")
    return f"Solve {left} = {c} for x.", Fraction(c - b, a)


def _remainder(rng: random.Random, level: str) -> tuple[str, Fraction]:
    base, power = rng.randint(2, 20), rng.randint(2, 10 ** (_DIGITS[level] - 1) + 2)
    modulus = rng.randint(3, 10 ** _DIGITS[level])
    question = f"What is the remainder of {base}^{power} divided by {modulus}?"
    return question, Fraction(pow(base, power, modulus))


def _divisor(rng: random.Random, level: str) -> tuple[str, Fraction]:
    common = rng.randint(1, 5 * _DIGITS[level])
    a, b = (common * rng.randint(2, 10 ** _DIGITS[level]) for _ in range(2))
    return f"What is the greatest common divisor of {a} and {b}?", Fraction(math.gcd(a, b))


_FAMILIES = {
    "sum": _sum,
    "product": _product,
    "fraction": _fraction,
    "equation": _equation,
    "remainder": _remainder,
    "divisor": _divisor,
}


def _text(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _make(rng: random.Random, settings: Settings) -> Item:
    known = ("sum",) if settings.level == "tiny" else tuple(_FAMILIES)
    family = settings.choose(rng, known)
    question, value = _FAMILIES[family](rng, settings.level)
    return Item(
        question=question,
        truth=_text(value),
        value=_text(value),
        wrap=BOXED[0],
        ask=BOXED[1],
        data_source="math__generated",
        meta={"family": family, "exact": [value.numerator, value.denominator]},
    )


def _wrong(problem: Problem, rng: random.Random) -> tuple[str, float]:
    """Another rational number: a nonzero rational is added."""
    value = Fraction(*problem.meta["exact"])
    off = Fraction(
        rng.choice((-1, 1)) * rng.randint(1, 9), rng.choice((1, 1, 2, value.denominator))
    )
    return respond(problem, _text(value + off)), 0.0


GENERATORS = {"numbers": Generator("math", _make, _wrong)}
