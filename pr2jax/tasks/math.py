r"""Math: the last \boxed{} after </think>, equal to the reference in value and in kind.

Sets, lists, tuples, intervals, unions and matrices are told apart and compared item by item here
(`math_text.py`), single values by `math_atoms.py`; expressions are read by math-verify's parser
and compared by `math_expr.py`. math-verify alone would take (1,2) for {1,2}, "silent" for "listen",
"1 2" for 3 and 0.0000001 for 0.0000002.

Conventions: a unit, a currency or a degree sign that only one side has is no difference, two
different ones are; "12%" equals 12%, 0.12 and, as a reference or above 1, 12; a decimal stands for
an exact value only to 1e-6; "x = 3" is 3; "1, 2" and "1 and 2" are {1, 2} but not (1, 2).

math-verify limits its own time by signals, which work in a process's main thread only: score
through a VerifierPool.
"""

import re
from collections.abc import Sequence

from pr2jax.tasks import answers, math_atoms, math_expr
from pr2jax.tasks import math_text as text_of
from pr2jax.tasks.base import Problem, Verdict, explain
from pr2jax.tasks.math_text import Shape

_MEMBER = re.compile(rf"\s*{math_atoms.NAME}\s*\\in(?![A-Za-z])\s*(.+)", re.DOTALL)
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
        return math_atoms.same(a.text, b.text, lambda x, y: _same(x, y, depth + 1))
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
    return {
        text_of.squeezed(h[0]) for h in heads if len(h) > 1 and math_atoms.ASSIGNED.fullmatch(h[0])
    }


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
    if not math_atoms.ASSIGNED.fullmatch(longer[0]):
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
    parts, signs = math_atoms.relations(text)
    if len(parts) == 2 and signs[0] in math_atoms.FLIPPED:
        left, right = parts
        sign = signs[0]
        if not math_atoms.ASSIGNED.fullmatch(left):
            left, right, sign = right, left, math_atoms.FLIPPED[sign]
        if not math_atoms.ASSIGNED.fullmatch(left):
            return None
        return {
            "<": [f"(-\\infty, {right})"],
            "le": [f"(-\\infty, {right}]"],
            ">": [f"({right}, \\infty)"],
            "ge": [f"[{right}, \\infty)"],
            "neq": [f"(-\\infty, {right})", f"({right}, \\infty)"],
        }[sign]
    if len(parts) == 3 and math_atoms.ASSIGNED.fullmatch(parts[1]):
        low, _, high = parts
        if set(signs) <= {">", "ge"}:
            low, high, signs = high, low, [math_atoms.FLIPPED[sign] for sign in reversed(signs)]
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
