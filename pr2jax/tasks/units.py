"""Units of measurement: a small table, products, quotients and powers of its entries.

A library of units takes seconds to import in every verifier worker; the units of school and
university problems fit on a page. A unit is a factor to SI and seven exponents (m, kg, s, A, K,
mol, cd).
"""

import functools
import math
import re
from typing import NamedTuple


class Unit(NamedTuple):
    """factor: to the SI unit of the same dimensions. powers: of m, kg, s, A, K, mol, cd."""

    factor: float
    powers: tuple[float, ...]


_DIMENSIONS = ("m", "kg", "s", "A", "K", "mol", "cd")


def _base(**powers: float) -> tuple[float, ...]:
    return tuple(float(powers.get(name, 0)) for name in _DIMENSIONS)


_NONE, _LENGTH, _MASS, _TIME = _base(), _base(m=1), _base(kg=1), _base(s=1)
_ENERGY, _POWER = _base(kg=1, m=2, s=-2), _base(kg=1, m=2, s=-3)
_FORCE, _PRESSURE = _base(kg=1, m=1, s=-2), _base(kg=1, m=-1, s=-2)
_VOLUME, _VOLT = _base(m=3), _base(kg=1, m=2, s=-3, A=-1)

# Symbols that take SI prefixes.
_PREFIXED = {
    "m": (1.0, _LENGTH), "g": (1e-3, _MASS), "s": (1.0, _TIME), "A": (1.0, _base(A=1)),
    "K": (1.0, _base(K=1)), "mol": (1.0, _base(mol=1)), "cd": (1.0, _base(cd=1)),
    "Hz": (1.0, _base(s=-1)), "N": (1.0, _FORCE), "Pa": (1.0, _PRESSURE), "J": (1.0, _ENERGY),
    "W": (1.0, _POWER), "C": (1.0, _base(A=1, s=1)), "V": (1.0, _VOLT),
    "F": (1.0, _base(kg=-1, m=-2, s=4, A=2)), "Ω": (1.0, _base(kg=1, m=2, s=-3, A=-2)),
    "S": (1.0, _base(kg=-1, m=-2, s=3, A=2)), "Wb": (1.0, _base(kg=1, m=2, s=-2, A=-1)),
    "T": (1.0, _base(kg=1, s=-2, A=-1)), "H": (1.0, _base(kg=1, m=2, s=-2, A=-2)),
    "L": (1e-3, _VOLUME), "l": (1e-3, _VOLUME), "eV": (1.602176634e-19, _ENERGY),
    "cal": (4.184, _ENERGY), "bar": (1e5, _PRESSURE), "M": (1e3, _base(mol=1, m=-3)),
    "Wh": (3600.0, _ENERGY), "Bq": (1.0, _base(s=-1)), "Gy": (1.0, _base(m=2, s=-2)),
    "Sv": (1.0, _base(m=2, s=-2)), "t": (1e3, _MASS), "lm": (1.0, _base(cd=1)),
    "lx": (1.0, _base(cd=1, m=-2)), "pc": (3.0856775814913673e16, _LENGTH),
    "Da": (1.66053906892e-27, _MASS), "dyn": (1e-5, _FORCE), "P": (0.1, _base(kg=1, m=-1, s=-1)),
}  # fmt: skip
_PLAIN = {
    "min": (60.0, _TIME), "h": (3600.0, _TIME), "hr": (3600.0, _TIME), "d": (86400.0, _TIME),
    "day": (86400.0, _TIME), "week": (604800.0, _TIME), "yr": (31557600.0, _TIME),
    "sec": (1.0, _TIME), "year": (31557600.0, _TIME), "rad": (1.0, _NONE), "sr": (1.0, _NONE),
    "°": (math.pi / 180, _NONE), "deg": (math.pi / 180, _NONE), "rev": (2 * math.pi, _NONE),
    "rpm": (2 * math.pi / 60, _base(s=-1)), "%": (0.01, _NONE), "ppm": (1e-6, _NONE),
    "ppb": (1e-9, _NONE), "Å": (1e-10, _LENGTH), "atm": (101325.0, _PRESSURE),
    "torr": (101325.0 / 760, _PRESSURE), "mmHg": (133.322387415, _PRESSURE),
    "psi": (6894.757293168, _PRESSURE), "in": (0.0254, _LENGTH), "ft": (0.3048, _LENGTH),
    "yd": (0.9144, _LENGTH), "mi": (1609.344, _LENGTH), "ly": (9.4607304725808e15, _LENGTH),
    "AU": (1.495978707e11, _LENGTH), "lb": (0.45359237, _MASS), "oz": (0.028349523125, _MASS),
    "u": (1.66053906892e-27, _MASS), "amu": (1.66053906892e-27, _MASS),
    "lbf": (4.4482216152605, _FORCE), "kgf": (9.80665, _FORCE), "mph": (0.44704, _base(m=1, s=-1)),
    "kph": (1 / 3.6, _base(m=1, s=-1)), "cc": (1e-6, _VOLUME), "gal": (3.785411784e-3, _VOLUME),
    "ha": (1e4, _base(m=2)), "acre": (4046.8564224, _base(m=2)), "erg": (1e-7, _ENERGY),
    "BTU": (1055.05585262, _ENERGY), "hp": (745.69987158227, _POWER),
    "kn": (1852 / 3600, _base(m=1, s=-1)), "Ci": (3.7e10, _base(s=-1)),
    "G": (1e-4, _base(kg=1, s=-2, A=-1)), "D": (3.33564e-30, _base(A=1, s=1, m=1)),
    "dB": (1.0, _NONE), "molar": (1e3, _base(mol=1, m=-3)),
}  # fmt: skip
_PREFIXES = {
    "Y": 24, "Z": 21, "E": 18, "P": 15, "T": 12, "G": 9, "M": 6, "k": 3, "h": 2, "da": 1, "d": -1,
    "c": -2, "m": -3, "u": -6, "μ": -6, "µ": -6, "n": -9, "p": -12, "f": -15, "a": -18,
}  # fmt: skip
_LONG_PREFIXES = {
    "giga": 9, "mega": 6, "kilo": 3, "hecto": 2, "deci": -1, "centi": -2, "milli": -3,
    "micro": -6, "nano": -9, "pico": -12, "femto": -15, "tera": 12,
}  # fmt: skip
_NAMES = {
    "meter": "m", "metre": "m", "gram": "g", "second": "s", "ampere": "A", "amp": "A",
    "kelvin": "K", "mole": "mol", "candela": "cd", "hertz": "Hz", "newton": "N", "pascal": "Pa",
    "joule": "J", "watt": "W", "coulomb": "C", "volt": "V", "farad": "F", "ohm": "Ω",
    "siemens": "S", "weber": "Wb", "tesla": "T", "henry": "H", "liter": "L", "litre": "L",
    "electronvolt": "eV", "calorie": "cal", "minute": "min", "hour": "h", "radian": "rad",
    "degree": "°", "revolution": "rev", "angstrom": "Å", "atmosphere": "atm", "inch": "in",
    "inches": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi", "pound": "lb",
    "lbs": "lb", "ounce": "oz", "gallon": "gal", "hectare": "ha", "tonne": "t", "parsec": "pc",
    "dalton": "Da", "hrs": "h", "mins": "min", "secs": "s", "yrs": "yr", "gauss": "G",
    "horsepower": "hp", "percent": "%", "becquerel": "Bq", "curie": "Ci", "poise": "P",
    "debye": "D", "knot": "kn", "Å": "Å", "henries": "H", "lumen": "lm", "Torr": "torr",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SPELLED = (
    (re.compile(r"\bper\b"), "/"), (re.compile(r"\bsquared\b"), "^2"),
    (re.compile(r"\bcubed\b"), "^3"), (re.compile(r"\b(?:square|sq\.?) (\w+)"), r"\1^2"),
    (re.compile(r"\b(?:cubic|cu\.?) (\w+)"), r"\1^3"), (re.compile(r"\*\*"), "^"),
    (re.compile(r"[·*⋅.]"), " "), (re.compile(r"°\s?([CF])\b"), r"deg\1"),
    (re.compile(r"\bdegrees? (?:[Cc]elsius|C)\b|℃"), "degC"),
    (re.compile(r"\bdegrees? (?:[Ff]ahrenheit|F)\b|℉"), "degF"),
)  # fmt: skip
_TOKEN = re.compile(
    r"\s?(?:([/()])|([^\W\d]+|[%°])(?:\s?\^\s?\(([+-]?\d{1,2})\)|\s?\^?\s?([+-]?\d{1,2}))?)"
)
_OFFSETS = {"degC": (1.0, 273.15), "degF": (5 / 9, 459.67 * 5 / 9), "Celsius": (1.0, 273.15)}


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Unit | None:
    """The unit that `text` writes (km/h, J/(mol K), kg m s^-2, meters per second), or None.

    What follows a slash is below it up to the next bracket's end: J/mol K is J/(mol K).
    Temperatures in °C and °F are none here: see `to_si`.
    """
    text = text.translate(_SUPERSCRIPTS).strip()
    if not text or len(text) > 80:
        return None
    for pattern, sign in _SPELLED:
        text = pattern.sub(sign, text)
    factor, powers = 1.0, [0.0] * 7
    at, below, depth, below_at = 0, False, 0, 0
    text = text.strip()
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None or token.end() == at:
            return None
        at = token.end()
        sign, name, bracketed, bare = token.groups()
        if sign == "/":
            if below and depth == below_at:
                return None  # a/b/c: written by nobody who means one thing
            below, below_at = True, depth
        elif sign == "(":
            depth += 1
        elif sign == ")":
            depth -= 1
            if depth < 0:
                return None
        else:
            unit = _named(name)
            if unit is None:
                return None
            exponent = int(bracketed or bare or 1)
            exponent = -exponent if below else exponent
            factor *= unit.factor**exponent
            powers = [p + exponent * q for p, q in zip(powers, unit.powers, strict=True)]
    return Unit(factor, tuple(powers)) if depth == 0 else None


def _named(name: str) -> Unit | None:
    """A unit of the table, with a prefix or a plural s."""
    for word in (name, name.lower()):
        for form in (word, word.removesuffix("s"), word.removesuffix("es")):
            symbol = _NAMES.get(form)
            if symbol is not None:
                return Unit(*(_PREFIXED.get(symbol) or _PLAIN[symbol]))
            for prefix, power in _LONG_PREFIXES.items():
                rest = form.removeprefix(prefix)
                if rest != form and rest in _NAMES:
                    symbol = _NAMES[rest]
                    scale, powers = _PREFIXED.get(symbol) or _PLAIN[symbol]
                    return Unit(scale * 10.0**power, powers)
    for form in (name, name.removesuffix("s") if len(name) > 3 else name):
        if form in _PLAIN:
            return Unit(*_PLAIN[form])
        if form in _PREFIXED:
            return Unit(*_PREFIXED[form])
    for prefix, power in _PREFIXES.items():
        rest = name.removeprefix(prefix)
        if rest != name and rest in _PREFIXED:
            scale, powers = _PREFIXED[rest]
            return Unit(scale * 10.0**power, powers)
    return None


def to_si(value: float, text: str) -> tuple[float, tuple[float, ...]] | None:
    """(value in SI, powers) of a value in the unit `text`; None where the unit is unknown.

    A bare °C or °F is a temperature on its scale, and becomes kelvins.
    """
    text = text.strip()
    for pattern, sign in _SPELLED:
        text = pattern.sub(sign, text)
    if text in _OFFSETS:
        slope, offset = _OFFSETS[text]
        return value * slope + offset, _base(K=1)
    unit = parse(text)
    return None if unit is None else (value * unit.factor, unit.powers)
