"""Equality of single mathematical values: numbers with units, equations, inequalities, expressions.

The conventions are those at the head of `math.py`, which compares what is made of several values.
"""

import re
from collections.abc import Callable
from fractions import Fraction

from pr2jax.tasks import answers, math_expr, quantities, units
from pr2jax.tasks import math_text as text_of
from pr2jax.tasks.base import normalise

NAME = r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w{1,5}\}?)?'*"
ASSIGNED = re.compile(
    rf"\s*(?:{NAME}(?:\s?\([^()]{{1,20}}\))?|\(\s?{NAME}(?:\s?,\s?{NAME})+\s?\))\s*"
)
_UNIT_TAIL = re.compile(r"(.*?)\s*(?:\\text\s?\{\s*([^{}]*?)\s*\}(\s?\^\s?\{?\d\}?)?)$", re.DOTALL)
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_CLOCK = re.compile(r"\d{1,2}\s?:\s?[0-5]\d(?!\d)")
_DEGREE = re.compile(r"\s?\^\\circ\s?$")
_GLUED = re.compile(r"\d[A-Za-z]")
_BASE = re.compile(
    r"(\(?)\s?([0-9A-F]{1,64})\s?\)?\s?_\s?\{?\s?(?:\(?\\?t?e?n?)?(\d{1,2})?\)?\s?\}?"
)
_RELATION = re.compile(r"\\(?:le|ge|neq|in|approx|equiv|sim|subset|pmod|mod)(?![A-Za-z])|[<>=]")
_INEQUALITY = re.compile(r"\\(le|ge|neq)(?![A-Za-z])|([<>])")
FLIPPED = {"<": ">", ">": "<", "le": "ge", "ge": "le", "neq": "neq"}


def same(want: str, given: str, whole: Callable[[str, str], bool]) -> bool:
    """Equality of two clean texts that are no collections.

    whole: compares the sides of equations, which may be collections again.
    """
    if text_of.is_words(given):
        return False
    letter = answers.letter_of(want)
    alone = letter is not None and len(re.sub(r"\\text|[^A-Za-z]", "", want)) == 1
    if alone and letter in want and letter in given and answers.letter_of(given) == letter:
        return True
    if "|" in want and "\\{" in want:
        return False  # a set by its property: equal as text or not at all
    want, given = (t.replace("\\approx", "=") for t in (want, given))
    if _INEQUALITY.search(want) or _INEQUALITY.search(given):
        return _inequalities(want, given)
    if re.search(r"\\(?:equiv|pmod|bmod|in|subset|sim)(?![A-Za-z])", want + " " + given):
        return False
    if _CLOCK.match(want) and not _CLOCK.match(given):
        return False  # a time, and no ratio
    first, second = text_of.split(want, ("=",))[0], text_of.split(given, ("=",))[0]
    if len(first) > 1 or len(second) > 1:
        return _equations(first, second, whole)
    return _values(want, given)


def _equations(first: list[str], second: list[str], whole: Callable[[str, str], bool]) -> bool:
    """Chains a = b = c: assignments by their values, other equations as equations."""
    if not all(first) or not all(second) or len(first) > 6 or len(second) > 6:
        return False
    named = [len(chain) > 1 and bool(ASSIGNED.fullmatch(chain[0])) for chain in (first, second)]
    if len(first) == 1:
        parts = second[1:] if named[1] else second
        return all(whole(first[0], part) for part in parts)
    if len(second) == 1:
        return named[0] and whole(first[-1], second[0])
    if all(named):
        names = [text_of.squeezed(chain[0]) for chain in (first, second)]
        if names[0] == names[1]:
            return all(whole(first[-1], part) for part in second[1:])
    if len(first) != 2 or len(second) != 2:
        return False
    a, b = (_difference(*chain) for chain in (first, second))
    return a is not None and b is not None and math_expr.proportion(a, b) != 0


def _difference(left: str, right: str):
    """left - right as an expression, None where it is none."""
    a, b = _read(left), _read(right)
    return None if a is None or b is None or hasattr(a, "shape") or hasattr(b, "shape") else a - b


def relations(text: str) -> tuple[list[str], list[str]]:
    r"""Sides and signs ("<", ">", "le", "ge", "neq") of a chain of inequalities."""
    parts, signs, at = [], [], 0
    for match in _INEQUALITY.finditer(text):
        parts.append(text[at : match.start()].strip())
        signs.append(match.group(1) or match.group(2))
        at = match.end()
    return [*parts, text[at:].strip()], signs


def _inequalities(want: str, given: str) -> bool:
    a, first = relations(want)
    b, second = relations(given)
    if not first or len(first) != len(second) or not all(a) or not all(b):
        return False
    pairs = [
        list(zip(sides, sides[1:], signs, strict=False))
        for sides, signs in ((a, first), (b, second))
    ]
    return _same_relations(*pairs) or _same_relations(pairs[0], pairs[1][::-1])


def _same_relations(first: list, second: list) -> bool:
    for (left, right, sign), (other_left, other_right, other) in zip(first, second, strict=True):
        a, b = _difference(left, right), _difference(other_left, other_right)
        if a is None or b is None:
            return False
        ratio = math_expr.proportion(a, b)
        if ratio == 0 or (other if ratio > 0 else FLIPPED[other]) != sign:
            return False
    return True


def _values(want: str, given: str) -> bool:
    """Equality of numbers with units, of numerals in a base, and of expressions."""
    if (based := _bases(want, given)) is not None:
        return based
    first, second = (_quantity(text) for text in (want, given))
    if first is not None and second is not None:
        return _same_quantity(first, second)
    want, unit = _without_unit(want)
    given, other = _without_unit(given)
    if unit and other and not _same_unit(unit, other):
        return False
    if "°" in (unit, other) and unit != other:
        bare = given if unit == "°" else want
        if "\\pi" in bare:  # radians
            degrees = want if unit == "°" else given
            return _expressions(f"\\frac{{({degrees})\\pi}}{{180}}", bare)
    percent = [text.endswith("%") for text in (want, given)]
    if any(percent):
        want, given = want.rstrip("% "), given.rstrip("% ")
        if percent[0] and not percent[1]:
            return _expressions(want, given) or _expressions(f"\\frac{{{want}}}{{100}}", given)
        if percent[1] and not percent[0]:
            return _expressions(want, f"\\frac{{{given}}}{{100}}")
    return _expressions(want, given)


def _bases(want: str, given: str) -> bool | None:
    """Equality of numerals such as 1011_2; None where neither has a base."""
    found = [_BASE.fullmatch(text.replace("\\text", "")) for text in (want, given)]
    values = []
    for match in found:
        base = int(match.group(3) or 10) if match else 0
        try:
            values.append(int(match.group(2), base) if 2 <= base <= 16 else None)
        except ValueError:
            values.append(None)
    if all(match is None for match in found):
        return None
    if all(value is not None for value in values):
        return values[0] == values[1]
    if values[0] is not None:  # the base may be left out, as it is asked for
        return text_of.squeezed(found[0].group(2)) == text_of.squeezed(given)
    return False


def _quantity(text: str) -> quantities.Quantity | None:
    """A number with what stands beside it; None for an expression, such as 5m."""
    bare = re.sub(r"\d\s?[eE]\s?[+-]?\d", "", text)
    return None if _GLUED.search(bare) else quantities.read(text)


def _same_quantity(want: quantities.Quantity, given: quantities.Quantity) -> bool:
    kinds = [q.currency or ("%" if q.percent else "") or q.unit for q in (want, given)]
    if all(kinds) and (want.unit == "") != (given.unit == ""):
        return False  # a percentage, an amount and a length are three things
    if want.currency != given.currency and want.currency and given.currency:
        return False
    if bool(want.currency and given.percent) or bool(given.currency and want.percent):
        return False
    decimal = want.decimals is not None or given.decimals is not None
    if want.unit and given.unit and not _same_unit(want.unit, given.unit):
        first = units.to_si(float(want.value), want.unit)
        second = units.to_si(float(given.value), given.unit)
        if first is None or second is None or first[1] != second[1]:
            return False
        return abs(first[0] - second[0]) <= 1e-9 * abs(first[0])
    values = [given.value]
    if given.percent and not want.percent:
        values = [given.value / 100] + ([given.value] if abs(want.value) > 1 else [])
    elif want.percent and not given.percent:
        values.append(given.value * 100)
    return any(_close(want.value, value, decimal) for value in values)


def _close(want: Fraction, given: Fraction, decimal: bool) -> bool:
    gap = abs(want - given)
    if not decimal:
        return gap == 0
    return gap <= Fraction(1, 10**6) * abs(want) and gap <= Fraction(1, 10**4)


def _without_unit(text: str) -> tuple[str, str]:
    r"""("5\sqrt{2}", "cm") of "5\sqrt{2} \text{ cm}"; a degree sign is the unit "°"."""
    if _DEGREE.search(text) and not _FUNCTION.search(text):
        return _DEGREE.sub("", text).strip(), "°"
    for sign in ("\\$", "$", "€", "£"):
        if text.startswith(sign):
            return text.removeprefix(sign).strip(), sign.strip("\\")
    match = _UNIT_TAIL.fullmatch(text)
    if match and match.group(1).strip() and quantities.is_unit(match.group(2)):
        power = re.sub(r"[\s{}]", "", match.group(3) or "")
        unit = "°" if match.group(2) in ("degrees", "degree") else match.group(2) + power
        return match.group(1).strip(), unit
    return text, ""


def _same_unit(a: str, b: str) -> bool:
    if a.replace(" ", "") == b.replace(" ", ""):
        return True
    first, second = units.parse(a), units.parse(b)
    if first is not None and second is not None:
        return first == second
    return normalise(a).removesuffix("s") == normalise(b).removesuffix("s")


def _expressions(want: str, given: str) -> bool:
    a, b = _read(want), _read(given)
    return a is not None and b is not None and math_expr.same(a, b)


_SEPARATE = re.compile(
    r"[\d.]\s+[\d.]|\d\.\d+\.\d|(?<![\d])\.(?!\d)|\?|!\s?[=!]|\.\.|\\[lcd]?dots|'|\\prime"
)
_MIXED = re.compile(r"(?<![\d.}])(\d+)\s*\\frac\s?\{\s?(\d+)\s?\}\s?\{\s?(\d+)\s?\}")
_DIGIT_GROUPS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_POWER_OF_TEN = re.compile(r"(\d(?:\.\d+)?)[eE]([+-]?\d{1,3})(?![\w.])")
_IN_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s?\^\\circ")
_BELOW = re.compile(r"_\s?\{[^{}]*\}")


def _read(text: str):
    """A clean text as an expression; None for prose, and for what math-verify would guess at.

    Raises TooLarge.
    """
    text = _DIGIT_GROUPS.sub("", text.strip())
    text = _POWER_OF_TEN.sub(r"\1 \\times 10^{\2}", text)
    text = _IN_DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    text = _MIXED.sub(r"(\1+\\frac{\2}{\3})", text)
    if not text or len(text) > 600 or text_of.has_words(text) or _SEPARATE.search(text):
        return None
    if text.count("{") > 60 or text.count("(") > 60 or "%" in text or text.count("|") % 2:
        return None
    # Bounds of sums hold an equals sign.
    return None if _RELATION.search(_BELOW.sub("", text)) else math_expr.read(text)
