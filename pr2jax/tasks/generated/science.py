"""Textbook questions with units, as numbers and as choices ("stem__generated")."""

import dataclasses
import math
import random
from collections.abc import Callable

from pr2jax.core.config import ConfigError
from pr2jax.tasks.base import Problem
from pr2jax.tasks.generated.items import BOXED, Generator, Item, Settings, number_text, respond

TOLERANCE = 0.01  # relative: constants and roundings of a textbook stay within it
_G, _R, _C, _H = 9.81, 8.314, 2.998e8, 6.626e-34  # SI


@dataclasses.dataclass(frozen=True)
class _Family:
    """statement: text with {names}; ranges: name -> (lowest, highest, step) of its values.

    solve: the answer in `unit`, of the values by name.
    """

    statement: str
    unit: str
    ranges: dict[str, tuple[float, float, float]]
    solve: Callable[..., float]


_FAMILIES = {
    "distance": _Family(
        "A train moves at a constant {v} m/s for {t} s. How far does it go?",
        "m",
        {"v": (2, 90, 1), "t": (2, 300, 1)},
        lambda v, t: v * t,
    ),
    "speed": _Family(
        "A car at {u} m/s accelerates at {a} m/s^2 for {t} s. What is its speed then?",
        "m/s",
        {"u": (1, 30, 1), "a": (0.5, 5, 0.5), "t": (1, 12, 1)},
        lambda u, a, t: u + a * t,
    ),
    "fall": _Family(
        "A stone falls freely from rest for {t} s (g = 9.81 m/s^2, no drag). How far?",
        "m",
        {"t": (0.5, 30, 0.1)},
        lambda t: _G * t * t / 2,
    ),
    "force": _Family(
        "What net force gives {m} kg an acceleration of {a} m/s^2?",
        "N",
        {"m": (0.5, 80, 0.5), "a": (0.5, 12, 0.5)},
        lambda m, a: m * a,
    ),
    "kinetic": _Family(
        "What is the kinetic energy of {m} kg moving at {v} m/s?",
        "J",
        {"m": (0.5, 90, 0.5), "v": (1, 40, 1)},
        lambda m, v: m * v * v / 2,
    ),
    "potential": _Family(
        "By how much does the potential energy of {m} kg grow when lifted by {h} m "
        "(g = 9.81 m/s^2)?",
        "J",
        {"m": (0.5, 90, 0.5), "h": (1, 50, 1)},
        lambda m, h: m * _G * h,
    ),
    "ohm": _Family(
        "What current flows through {r} ohm at {u} V?",
        "A",
        {"r": (2, 200, 1), "u": (3, 240, 1)},
        lambda r, u: u / r,
    ),
    "power": _Family(
        "What power does a resistor of {r} ohm take at a current of {i} A?",
        "W",
        {"r": (1, 100, 1), "i": (0.5, 12, 0.5)},
        lambda r, i: r * i * i,
    ),
    "gas": _Family(
        "What is the pressure of {n} mol of an ideal gas in {v} m^3 at {t} K "
        "(R = 8.314 J/(mol K))?",
        "Pa",
        {"n": (1, 20, 1), "v": (0.5, 5, 0.5), "t": (250, 500, 5)},
        lambda n, v, t: n * _R * t / v,
    ),
    "molarity": _Family(
        "What is the concentration of {n} mol dissolved to {v} L of solution?",
        "mol/L",
        {"n": (0.1, 6, 0.1), "v": (0.25, 5, 0.25)},
        lambda n, v: n / v,
    ),
    "dilution": _Family(
        "{v} mL of a {c} mol/L solution are diluted to {w} mL. What is the new concentration?",
        "mol/L",
        {"v": (5, 95, 5), "c": (0.5, 12, 0.5), "w": (100, 1000, 50)},
        lambda v, c, w: v * c / w,
    ),
    "moles": _Family(
        "How many moles are {m} g of water (18.02 g/mol)?",
        "mol",
        {"m": (5, 900, 1)},
        lambda m: m / 18.02,
    ),
    "heat": _Family(
        "How much heat warms {m} kg of water by {d} K (c = 4186 J/(kg K))?",
        "J",
        {"m": (0.1, 9, 0.1), "d": (2, 80, 1)},
        lambda m, d: m * 4186 * d,
    ),
    "density": _Family(
        "What is the density of a body of {m} kg and {v} m^3?",
        "kg/m^3",
        {"m": (10, 900, 10), "v": (0.05, 2, 0.05)},
        lambda m, v: m / v,
    ),
    "wave": _Family(
        "A wave of {f} Hz travels at {v} m/s. What is its wavelength?",
        "m",
        {"f": (10, 900, 5), "v": (100, 1500, 10)},
        lambda f, v: v / f,
    ),
    "lens": _Family(
        "An object stands {d} cm before a thin converging lens of focal length {f} cm. How far "
        "behind the lens is the image?",
        "cm",
        {"f": (5, 20, 1), "d": (25, 90, 1)},
        lambda f, d: f * d / (d - f),
    ),
    "half_life": _Family(
        "Of {m} g of an isotope with a half-life of {h} years, how much is left after {t} years?",
        "g",
        {"m": (10, 500, 10), "h": (5, 40, 1), "t": (5, 60, 5)},
        lambda m, h, t: m * 0.5 ** (t / h),
    ),
    "photon": _Family(
        "What is the energy of a photon of {w} nm, in units of 1e-19 J (h = 6.626e-34 J s, "
        "c = 2.998e8 m/s)?",
        "",
        {"w": (200, 900, 1)},
        lambda w: _H * _C / (w * 1e-9) / 1e-19,
    ),
    "acid": _Family(
        "What is the pH of {c} mmol/L of a strong monoprotic acid?",
        "",
        {"c": (0.5, 90, 0.5)},
        lambda c: -math.log10(c / 1000),
    ),
}
_EASY = ("distance", "speed", "force", "ohm", "power", "molarity", "density", "wave")
# For small models: one product or sum, whole numbers.
_TINY = {
    "distance": ("v={a}m/s t={b}s d?", "m", lambda a, b: a * b),
    "force": ("m={a}kg a={b}m/s2 F?", "N", lambda a, b: a * b),
    "voltage": ("R={a}ohm I={b}A U?", "V", lambda a, b: a * b),
    "series": ("R={a}ohm R={b}ohm in series?", "ohm", lambda a, b: a + b),
}


def _values(rng: random.Random, family: _Family) -> dict[str, float]:
    values = {}
    for name, (low, high, step) in family.ranges.items():
        values[name] = round(low + step * rng.randint(0, round((high - low) / step)), 6)
    return values


def _significant(value: float, digits: int = 5) -> str:
    """Rounded to `digits` significant ones (half a unit of the fifth is 0.005% at most)."""
    places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return number_text(round(value, places), max(places, 0))


def _question(rng: random.Random, level: str, family: str) -> tuple[str, float, str]:
    if level == "tiny":
        text, unit, solve = _TINY[family]
        a, b = rng.randint(1, 20), rng.randint(1, 20)
        return text.format(a=a, b=b), solve(a, b), unit
    chosen = _FAMILIES[family]
    values = _values(rng, chosen)
    shown = {name: number_text(value) for name, value in values.items()}
    return chosen.statement.format(**shown), chosen.solve(**values), chosen.unit


def _make(rng: random.Random, settings: "ScienceSettings") -> Item:
    level = settings.level
    known = {"tiny": tuple(_TINY), "easy": _EASY}.get(level, tuple(_FAMILIES))
    family = settings.choose(rng, known)
    question, value, unit = _question(rng, level, family)
    text = _significant(value)
    meta = {"family": family, "unit": unit, "tolerance": TOLERANCE}
    if rng.random() >= settings.choices:
        asked = f" Answer in {unit}." if unit and level != "tiny" else ""
        shown = f"{text} {unit}" if unit and level != "tiny" else text
        meta |= {"kind": "numeric", "value": value}
        return Item(question + asked, text, shown, *BOXED, data_source="stem__generated", meta=meta)
    # Usual slips: factors of 2 and 10, and the like; all far outside the tolerance.
    slips = rng.sample((0.5, 2.0, 10.0, 0.1, 1.5, 4.0), 3)
    numbers = [value, *(value * slip for slip in slips)]
    rng.shuffle(numbers)
    choices = [f"{_significant(number)} {unit}".strip() for number in numbers]
    right = "ABCD"[numbers.index(value)]
    listed = [f"{letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
    between = " " if level == "tiny" else "\n"
    question = f"{question}{between}{between.join(listed)}"
    meta |= {"kind": "choice", "choices": choices}
    ask = "Put the letter of the answer within \\boxed{}."
    return Item(question, right, right, BOXED[0], ask, data_source="stem__generated", meta=meta)


@dataclasses.dataclass(frozen=True)
class ScienceSettings(Settings):
    """choices: share of the questions that list four answers by letter, in [0, 1]."""

    choices: float = 0.3

    def validate(self) -> None:
        """Raises ConfigError naming the key."""
        if not 0.0 <= self.choices <= 1.0:
            raise ConfigError(f"choices: {self.choices} is not in [0, 1]")


def _wrong(problem: Problem, rng: random.Random) -> tuple[str, float]:
    """Another letter, or a number at least 5% off (the tolerance is 1%)."""
    if problem.meta["kind"] == "choice":
        return respond(problem, rng.choice([c for c in "ABCD" if c != problem.answer])), 0.0
    value = problem.meta["value"]
    off = value * rng.choice((-1, 1)) * rng.uniform(0.05, 0.9)
    text = _significant(value + off)
    unit = problem.meta["unit"]
    shown = f"{text} {unit}" if unit and problem.meta["level"] != "tiny" else text
    return respond(problem, shown), 0.0


GENERATORS = {"science": Generator("science", _make, _wrong, ScienceSettings)}
