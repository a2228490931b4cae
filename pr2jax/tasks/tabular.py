r"""Questions about tables (HiTab, MultiHiertt, FinQA as Guru has them): numbers, labels, lists.

The answer stands in \boxed{}. Several answers are separated by "|" and compared without regard to
their order. Numbers agree within 1e-3 of the reference; what is no number is compared as text.

Percent: "12%" means 0.12, and equals a reference of 0.12 or of "12%". A reference of "12%" is also
met by 12 and by 0.12. A bare reference above 1, say 12, is met by "12%" too (tables give percents
without the sign); a bare 0.12 is not met by 12. Numbers that look like years (1500 to 2100, four
digits and nothing else) have to be equal: 2019 and 2020 are within 1e-3.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from pr2jax.tasks import answers, quantities
from pr2jax.tasks.base import Problem, Verdict, explain, normalise
from pr2jax.tasks.quantities import Quantity

REL_TOL = Fraction(1, 1000)
_YEAR = re.compile(r"(?:1[5-9]|20)\d\d|2100")
_SEPARATOR = re.compile(r"\s?[;\n]\s?|, ")
_QUOTES = "\"'`“”‘’"
_LONGEST = 20_000  # characters of an answer


def verify(problem: Problem, response: str) -> Verdict:
    """1 where every answer of the reference is matched by one of the response's, and none is left.

    Raises ValueError where the reference is empty.
    """
    want = parts(problem.answer, listed=True)
    if not want:
        raise ValueError(f"reference answer of {problem.id} is empty")
    found = answers.stated(problem, response)
    if found is None:
        return Verdict(0.0, "no answer in the expected form")
    if len(found) > _LONGEST:
        return Verdict(0.0, f"an answer of {len(found)} characters")
    given = parts(found, listed=len(want) > 1)
    if len(given) != len(want):
        return Verdict(0.0, f"{len(given)} answers for {len(want)}: read {found[:80]!r}")
    if matches(want, given, same):
        return Verdict(1.0)
    return Verdict(0.0, explain(0.0, found, response))


def parts(text: str, *, listed: bool) -> list[str]:
    """The answers in `text`: of a JSON list, or what "|" separates.

    listed: without a "|", semicolons, new lines and commas followed by a space separate too.
    """
    good, value = answers.parse_json(text) if text.lstrip().startswith("[") else (False, None)
    if good and isinstance(value, list):
        return [str(item).strip() for item in value]
    text = text.replace("\\mid", "|").replace("\\vert", "|")
    if "|" in text:
        found = text.split("|")
    else:
        # The reference itself is one answer unless it has a "|".
        found = _SEPARATOR.split(text) if listed and not _one(text) else [text]
    return [part.strip() for part in found if part.strip()]


def _one(text: str) -> bool:
    """Whether a text without "|" is a single number."""
    return quantities.read(text, accounting=True) is not None


def matches(want: Sequence[str], given: Sequence[str], equal: Callable[[str, str], bool]) -> bool:
    """Whether a one-to-one pairing exists: `equal` within a tolerance is not transitive."""
    options = [[j for j, g in enumerate(given) if equal(w, g)] for w in want]
    holder: dict[int, int] = {}

    def place(i: int, tried: set[int]) -> bool:
        for j in options[i]:
            if j not in tried:
                tried.add(j)
                if j not in holder or place(holder[j], tried):
                    holder[j] = i
                    return True
        return False

    return all(place(i, set()) for i in range(len(want)))


def same(want: str, given: str) -> bool:
    """Whether one answer meets one reference, as text or as numbers."""
    a, b = as_text(want), as_text(given)
    if a == b:
        return bool(a)
    if _YEAR.fullmatch(a) and _YEAR.fullmatch(b):
        return False
    first, second = (quantities.read(text, accounting=True) for text in (want, given))
    return first is not None and second is not None and same_number(first, second, REL_TOL)


def as_text(text: str) -> str:
    """An answer as it is compared as text: lower case, single spaces, no quotes, no LaTeX."""
    text = quantities.plain(text).replace("\\&", "&").replace("\\_", "_").replace("\\#", "#")
    return normalise(text.strip().strip(_QUOTES).rstrip(".").strip(_QUOTES))


def same_number(want: Quantity, given: Quantity, rel_tol: Fraction) -> bool:
    """Numbers within the tolerance under the rules for percents; units that differ are unequal."""
    if want.currency and given.currency and want.currency != given.currency:
        return False
    if want.unit and given.unit and _unit(want.unit) != _unit(given.unit):
        return False
    values = [given.value]
    if given.percent and not want.percent:
        values = [given.value / 100]
        if abs(want.value) > 1:
            values.append(given.value)
    elif want.percent and not given.percent:
        values.append(given.value * 100)
    return any(quantities.close(value, want.value, rel_tol) for value in values)


def _unit(text: str) -> str:
    return normalise(text).removesuffix("s")
