r"""Science: choice letters, numbers with units, formulas and text, as in Guru's stem sets.

What kind a reference is follows from the reference and the problem's meta, never from the
response. Letters and numbers are decided here; formulas and texts that are not equal by rule go
to a model judge (`JudgeRequest`), which has to be configured: nothing is scored 0 for want of one.

meta: "kind" ("choice", "numeric", "formula", "text") or WebInstruct's "answer_type"; "choices",
the options by letter; "unit", of a reference that does not say it; "tolerance", relative. Without
one a number must agree within DEFAULT_TOLERANCE, and exactly where the reference is a whole number
without a unit, which is a count.
"""

import re
from fractions import Fraction

from pr2jax.tasks import answers, quantities, units
from pr2jax.tasks import math as symbolic
from pr2jax.tasks.base import JudgeRequest, Problem, Verdict, explain, normalise
from pr2jax.tasks.quantities import Quantity

DEFAULT_TOLERANCE = 0.01
LETTERS = "ABCDEFGHIJ"
NO_ANSWER = "no answer in the expected form"
_KINDS = {
    "choice": "choice", "multiple choice": "choice", "multiple_choice": "choice",
    "numeric": "numeric", "number": "numeric", "integer": "numeric", "float": "numeric",
    "percentage": "numeric", "fraction": "numeric", "formula": "formula", "expression": "formula",
    "matrix": "formula", "list": "text", "string": "text", "text": "text", "boolean": "text",
    "other": "text",
}  # fmt: skip
# Options of a question, each at the start of a line or after a space: "A) ", "(B) ", "C. ".
_OPTION = re.compile(r"(?:^|\s)\(?([A-J])[).:]\s")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{4,}")


def kind_of(problem: Problem) -> str:
    """ "choice", "numeric", "formula" or "text": what the reference is."""
    reference = problem.answer
    said = problem.meta.get("kind") or problem.meta.get("answer_type") or ""
    kind = _KINDS.get(str(said).lower(), "")
    letter = answers.letter_of(reference, LETTERS)
    if kind == "choice" or "gpqa" in problem.data_source or problem.meta.get("choices"):
        return "choice" if letter else "text"
    if not kind and letter and len(bare(reference)) == 1:
        question = str(problem.meta.get("question", problem.prompt))
        if {"A", "B"} <= set(_OPTION.findall(question)):
            return "choice"
    if quantities.read(reference) is not None and kind in ("", "numeric", "formula"):
        return "numeric"
    if kind in ("text", "formula"):
        return kind
    words = _WORD.search(_COMMAND.sub(" ", quantities.plain(reference)))
    signs = any(sign in reference for sign in "=^\\_")
    return "formula" if signs and not words else "text"


def bare(text: str) -> str:
    """`text` without brackets, dots and spaces."""
    return re.sub(r"[\s().\[\]:$]|\\text|[{}]", "", text)


def verify(problem: Problem, response: str) -> Verdict | JudgeRequest:
    """1 or 0 where a rule decides, else a request for a judge.

    Raises ValueError where the reference is empty.
    """
    if not problem.answer.strip():
        raise ValueError(f"reference answer of {problem.id} is empty")
    kind = kind_of(problem)
    if kind == "choice":
        return _choice(problem, response)
    found = answers.stated(problem, response)
    if found is None or not found:
        return Verdict(0.0, NO_ANSWER)
    # Case tells V from v and mW from MW, but in prose it says nothing.
    if found == problem.answer or (kind == "text" and same_text(found, problem.answer)):
        return Verdict(1.0)
    if kind == "numeric":
        return _numeric(problem, found, response)
    if kind == "formula" and symbolic.decide(problem.answer, found)[0]:
        return Verdict(1.0)
    question = str(problem.meta.get("judge_question") or problem.meta.get("question", ""))
    return JudgeRequest(question or problem.prompt, problem.answer, found)


def same_text(a: str, b: str) -> bool:
    """Equality of texts, case, spacing, LaTeX wrappers and a final dot aside."""
    left, right = (normalise(quantities.plain(text)).rstrip(".").strip() for text in (a, b))
    return bool(left) and left == right


def _choice(problem: Problem, response: str) -> Verdict:
    """By letter; an option's own text counts as its letter where no other option has it."""
    want = answers.letter_of(problem.answer, LETTERS)
    if problem.meta.get("response_regex"):
        found = answers.stated(problem, response)
        given = answers.letter_of(found, LETTERS) if found is not None else None
    else:
        found = answers.short_answer(response)
        given = answers.choice_letter(response, LETTERS)
    options = problem.meta.get("choices") or []
    if given is None and found and isinstance(options, list):
        same = [letter for letter, text in zip(LETTERS, options, strict=False)
                if same_text(found, str(text))]  # fmt: skip
        given = same[0] if len(same) == 1 else None
    if given is None:
        return Verdict(0.0, "no choice letter")
    return Verdict(1.0) if given == want else Verdict(0.0, explain(0.0, given, response))


def tolerance(problem: Problem, want: Quantity) -> Fraction:
    """The relative tolerance. Raises ValueError where the meta's is none in [0, 1)."""
    said = problem.meta.get("tolerance")
    if said is not None:
        if isinstance(said, bool) or not isinstance(said, int | float) or not 0 <= said < 1:
            raise ValueError(f"{problem.id}: tolerance {said!r} is not in [0, 1)")
        return Fraction(str(said))
    count = want.decimals is None and not (want.unit or want.percent or want.currency)
    return Fraction(0) if count else Fraction(str(DEFAULT_TOLERANCE))


def _numeric(problem: Problem, found: str, response: str) -> Verdict:
    want = quantities.read(problem.answer)
    if want is None:
        raise ValueError(f"reference answer of {problem.id} is no number: {problem.answer!r}")
    given = quantities.read(_after_equals(found))
    if given is None:
        # 2\pi, \sqrt{2}: a number all the same.
        if symbolic.decide(problem.answer, found)[0]:
            return Verdict(1.0)
        return Verdict(0.0, f"no number with a unit: read {found[:80]!r}")
    unit = want.unit or str(problem.meta.get("unit") or "")
    if same_quantity(want._replace(unit=unit), given, tolerance(problem, want)):
        return Verdict(1.0)
    return Verdict(0.0, explain(0.0, found, response))


def _after_equals(text: str) -> str:
    """The right side of "v = 3 m/s" or "x \\approx 2", where the left is one short name."""
    left, sign, right = text.replace("\\approx", "=").replace("≈", "=").partition("=")
    name = quantities.plain(left).replace(" ", "").replace("_", "").replace("\\", "")
    return right if sign and len(name) <= 12 and not name[:1].isdigit() else text


def same_quantity(want: Quantity, given: Quantity, rel_tol: Fraction) -> bool:
    """Numbers within the tolerance, after conversion to the same unit.

    A missing unit is the reference's. Units of other dimensions, or unknown ones that differ,
    are unequal. A percent sign is a unit of 1/100.
    """
    if want.currency and given.currency and want.currency != given.currency:
        return False
    if want.percent or given.percent:
        values = [given.value / 100 if given.percent else given.value]
        if want.percent and not given.percent:
            values.append(given.value / 100)
        elif given.percent and not want.percent and abs(want.value) > 1:
            values.append(given.value)
        goal = want.value / 100 if want.percent else want.value
        return any(quantities.close(value, goal, rel_tol) for value in values)
    if want.unit and given.unit and want.unit.split() != given.unit.split():
        # Case tells units apart (mW, MW); names that are no units (apples) are compared as words.
        first = units.to_si(float(want.value), want.unit)
        second = units.to_si(float(given.value), given.unit)
        if first is None or second is None:
            same_words = normalise(want.unit) == normalise(given.unit)
            return same_words and quantities.close(given.value, want.value, rel_tol)
        # Conversion is in floats: their own error is not the answer's.
        slack = max(float(rel_tol), 1e-9)
        return first[1] == second[1] and abs(first[0] - second[0]) <= slack * abs(first[0])
    return quantities.close(given.value, want.value, rel_tol)
