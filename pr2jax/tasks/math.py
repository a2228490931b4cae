r"""Math: the last \boxed{} after </think>, equal to the reference in value and in kind.

Sets, lists, tuples, intervals, unions and matrices are told apart and compared item by item here
(`math_text.py`); numbers by `quantities.py`; single expressions are read by math-verify and
compared by `math_expr.py`. math-verify alone would take (1,2) for {1,2}, "silent" for "listen",
"1 2" for 3 and 0.0000001 for 0.0000002.

Conventions: a unit, a currency or a degree sign that only one side has is no difference, two
different ones are; "12%" equals 12%, 0.12 and, as a reference or above 1, 12; a decimal stands for
an exact value only to 1e-6; "x = 3" is 3; "1, 2" and "1 and 2" are {1, 2} but not (1, 2).

math-verify limits its own time by signals, which work in a process's main thread only: score
through a VerifierPool.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from pr2jax.tasks import answers, math_expr, quantities, units
from pr2jax.tasks import math_text as text_of
from pr2jax.tasks.base import Problem, Verdict, explain, normalise
from pr2jax.tasks.math_text import Shape

_NAME = r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w{1,5}\}?)?'*"
_ASSIGNED = re.compile(
    rf"\s*(?:{_NAME}(?:\s?\([^()]{{1,20}}\))?|\(\s?{_NAME}(?:\s?,\s?{_NAME})+\s?\))\s*"
)
_MEMBER = re.compile(rf"\s*{_NAME}\s*\\in(?![A-Za-z])\s*(.+)", re.DOTALL)
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
_FLIPPED = {"<": ">", ">": "<", "le": "ge", "ge": "le", "neq": "neq"}
_REALS = "\\mathbb{R}"
_ALL_REALS = re.compile(r"(?:\\text ?\{)?\s?(?:all )?reals?(?: numbers?)?\s?\}?|all real numbers")
_DEPTH = 6


def verify(problem: Problem, response: str) -> Verdict:
    """1 if the boxed answer equals the reference, else 0 with the reason.

    Raises ValueError where the reference is empty: no response could be right.
    """
    from math_verify import errors  # noqa: F401 (the first response pays for the import)

    reference = answers.last_boxed(problem.answer) or problem.answer
    if not text_of.clean(reference):
        raise ValueError(f"reference answer of {problem.id} cannot be read: {problem.answer!r}")
    found = answers.stated(problem, response, ("boxed",))
    if found is None:
        return Verdict(0.0, "no answer in the expected form")
    right, why = decide(reference, found)
    return Verdict(1.0) if right else Verdict(0.0, why or explain(0.0, found, response))


def decide(reference: str, answer: str) -> tuple[bool, str]:
    """(whether they are equal, why that was not computed where it was not)."""
    from math_verify.errors import TimeoutException

    try:
        return equal(reference, answer), ""
    except math_expr.TooLarge as error:
        return False, f"answer {answer[:80]!r} is not evaluated: {error}"
    except TimeoutException:
        return False, f"answer {answer[:80]!r} takes too long to compare"


def equal(reference: str, answer: str) -> bool:
    """Whether two answers in LaTeX or plain text are equal; the reference says in what form.

    Raises TooLarge for values that would be too large to compute, and math-verify's
    TimeoutException, which is no Exception.
    """
    want, given = text_of.clean(reference), text_of.clean(answer)
    if not want or not given:
        return False
    if text_of.squeezed(text_of.unwrapped(want)) == text_of.squeezed(text_of.unwrapped(given)):
        return True
    return _same(want, given, 0)


def _same(want: str, given: str, depth: int) -> bool:
    """Equality of two clean texts by their shapes."""
    if depth > _DEPTH:
        return False
    want, given = _member(want), _member(given)
    if text_of.squeezed(want) == text_of.squeezed(given):
        return bool(want)
    if text_of.is_words(want):
        return text_of.words(want) == text_of.words(given)
    a, b = text_of.shape(want), text_of.shape(given)
    if a.kind == "list" and b.kind == "atom" and "," in given:
        # 1,234 is one number, unless the reference has a list.
        b = text_of.shape(re.sub(r",(?=\d)", ", ", given))
    if a.kind == "atom" and b.kind == "atom":
        return _atoms(a.text, b.text)
    if a.kind in ("list", "set") and b.kind in ("list", "set"):
        # x = 1, y = 2 is no 1, 2: which is which has to be said.
        if len(_named(a) | _named(b)) > 1 and _named(a) != _named(b):
            return False
        return _either_way(a.items, b.items, depth) or _regions(a, b, depth)
    if a.kind == b.kind == "tuple":
        if len(a.items) != len(b.items) or not _brackets_agree(a, b):
            return False
        return all(_same(x, y, depth + 1) for x, y in zip(a.items, b.items, strict=True))
    if a.kind == b.kind == "matrix":
        rows = [[cell for row in m.items for cell in row.split("&")] for m in (a, b)]
        widths = [[row.count("&") for row in m.items] for m in (a, b)]
        return widths[0] == widths[1] and all(
            _same(x.strip(), y.strip(), depth + 1) for x, y in zip(*rows, strict=True)
        )
    for one, other in ((a, b), (b, a)):  # {5} is 5, but {{}} is not {}
        if one.kind == "set" and len(one.items) == 1 and other.kind == "atom":
            bare = one.items[0]
            if "\\emptyset" in bare or "\\{" in bare:
                return False
            return _same(*((bare, given) if one is a else (want, bare)), depth + 1)
    return _assigned_shapes(want, given, depth) or _regions(a, b, depth)


def _member(text: str) -> str:
    r"""The set in "x \in S"; the reals by their usual names."""
    match = _MEMBER.fullmatch(text)
    text = match.group(1).strip() if match else text
    if _ALL_REALS.fullmatch(text.lower()):
        return _REALS
    return _REALS if text_of.squeezed(text) in (r"(-\infty,\infty)", r"(-\infty,+\infty)") else text


def _named(shape: Shape) -> set[str]:
    """Names that the items of a list are assigned to."""
    heads = [text_of.split(item, ("=",))[0] for item in shape.items]
    return {text_of.squeezed(h[0]) for h in heads if len(h) > 1 and _ASSIGNED.fullmatch(h[0])}


def _brackets_agree(a: Shape, b: Shape) -> bool:
    """Brackets of pairs have to be the same, as they may be intervals; <> is ()."""
    first, second = (s.brackets.replace("<>", "()") for s in (a, b))
    return first == second or (len(a.items) > 2 and {first, second} <= {"()", "[]"})


def _either_way(want: Sequence[str], given: Sequence[str], depth: int) -> bool:
    """Whether the items pair off, in whatever order."""
    if len(want) != len(given) or len(want) > 100:
        return False
    left = list(given)
    for item in want:
        for i, other in enumerate(left):
            if _same(item, other, depth + 1):
                del left[i]
                break
        else:
            return False
    return True


def _assigned_shapes(want: str, given: str, depth: int) -> bool:
    """ "x = (1, 2)" against "(1, 2)" and the like, where only one side is an assignment."""
    first, second = text_of.split(want, ("=",))[0], text_of.split(given, ("=",))[0]
    if len(first) + len(second) != 3:
        return False
    longer, other = (first, given) if len(first) == 2 else (second, want)
    if not _ASSIGNED.fullmatch(longer[0]):
        return False
    pair = (longer[1], other) if longer is first else (other, longer[1])
    return _same(*pair, depth + 1)


# --- Unions of intervals, and inequalities that say the same ------------------------------------


def _region(shape: Shape) -> list[str] | None:
    r"""Intervals whose union the shape is, None where it is no such thing."""
    if shape.kind == "union" or (shape.kind == "list" and shape.joined == "or"):
        parts = [_region(text_of.shape(item)) for item in shape.items]
        return None if None in parts else [i for part in parts for i in part]
    if shape.kind == "tuple" and len(shape.items) == 2 and "<" not in shape.brackets:
        return [shape.text]
    if shape.kind == "set" and shape.items:
        return [shape.text]
    return _from_inequality(shape.text) if shape.kind == "atom" else None


def _from_inequality(text: str) -> list[str] | None:
    """x < 3, 1 < x <= 2, x != 0 as intervals."""
    parts, signs = _relations(text)
    if len(parts) == 2 and signs[0] in _FLIPPED:
        left, right = parts
        sign = signs[0]
        if not _ASSIGNED.fullmatch(left):
            left, right, sign = right, left, _FLIPPED[sign]
        if not _ASSIGNED.fullmatch(left):
            return None
        return {
            "<": [f"(-\\infty, {right})"],
            "le": [f"(-\\infty, {right}]"],
            ">": [f"({right}, \\infty)"],
            "ge": [f"[{right}, \\infty)"],
            "neq": [f"(-\\infty, {right})", f"({right}, \\infty)"],
        }[sign]
    if len(parts) == 3 and _ASSIGNED.fullmatch(parts[1]):
        low, _, high = parts
        if set(signs) <= {">", "ge"}:
            low, high, signs = high, low, [_FLIPPED[sign] for sign in reversed(signs)]
        if set(signs) <= {"<", "le"}:
            opening, closing = "(" if signs[0] == "<" else "[", ")" if signs[1] == "<" else "]"
            return [f"{opening}{low}, {high}{closing}"]
    return None


def _regions(a: Shape, b: Shape, depth: int) -> bool:
    """Whether both are unions of the same intervals, in whatever order and spelling."""
    if not any(s.kind in ("union", "tuple", "list") for s in (a, b)):
        return False
    if {a.kind, b.kind} <= {"tuple", "set"}:
        return False  # these have been compared
    first, second = _region(a), _region(b)
    if first is None or second is None:
        return False
    # Infinity is open on both sides, however it is bracketed.
    tidy = [[_infinite(i) for i in part] for part in (first, second)]
    return _either_way(tidy[0], tidy[1], depth + 1)


def _infinite(interval: str) -> str:
    interval = re.sub(r"\+\s?\\infty", r"\\infty", interval)
    if re.search(r"\\infty\s*\]$", interval):
        interval = interval[:-1] + ")"
    return "(" + interval[1:] if re.match(r"\[\s*-\s?\\infty", interval) else interval


def _relations(text: str) -> tuple[list[str], list[str]]:
    r"""Sides and signs ("<", ">", "le", "ge", "neq") of a chain of inequalities."""
    parts, signs, at = [], [], 0
    for match in _INEQUALITY.finditer(text):
        parts.append(text[at : match.start()].strip())
        signs.append(match.group(1) or match.group(2))
        at = match.end()
    return [*parts, text[at:].strip()], signs


# --- Single values -----------------------------------------------------------------------------


def _atoms(want: str, given: str) -> bool:
    """Equality of two texts that are no collections."""
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
        return _equations(first, second)
    return _values(want, given)


def _equations(first: list[str], second: list[str]) -> bool:
    """Chains a = b = c: assignments by their values, other equations as equations."""
    if not all(first) or not all(second) or len(first) > 6 or len(second) > 6:
        return False
    named = [len(chain) > 1 and bool(_ASSIGNED.fullmatch(chain[0])) for chain in (first, second)]
    if len(first) == 1:
        parts = second[1:] if named[1] else second
        return all(_same(first[0], part, _DEPTH - 2) for part in parts)
    if len(second) == 1:
        return named[0] and _same(first[-1], second[0], _DEPTH - 2)
    if all(named):
        names = [text_of.squeezed(chain[0]) for chain in (first, second)]
        if names[0] == names[1]:
            return all(_same(first[-1], part, _DEPTH - 2) for part in second[1:])
    if len(first) != 2 or len(second) != 2:
        return False
    a, b = (_difference(*chain) for chain in (first, second))
    return a is not None and b is not None and math_expr.proportion(a, b) != 0


def _difference(left: str, right: str):
    """left - right as an expression, None where it is none."""
    a, b = _read(left), _read(right)
    return None if a is None or b is None or hasattr(a, "shape") or hasattr(b, "shape") else a - b


def _inequalities(want: str, given: str) -> bool:
    a, first = _relations(want)
    b, second = _relations(given)
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
        if ratio == 0 or (other if ratio > 0 else _FLIPPED[other]) != sign:
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
