r"""The math verifier on pairs judged by hand (math_pairs.jsonl), and on hostile answers.

Each line of the file has a reference, answers that equal it, and answers that do not, judged by
their meaning. Where habits differ, the conventions are those at the head of `pr2jax.tasks.math`.
"""

import concurrent.futures
import json
import pathlib
import time

import pytest

from pr2jax.tasks import math, math_text
from pr2jax.tasks.base import Problem
from pr2jax.tasks.registry import score

FILE = pathlib.Path(__file__).with_name("math_pairs.jsonl")
PAIRS = [
    (row["reference"], answer, equal)
    for row in map(json.loads, FILE.read_text(encoding="utf-8").splitlines())
    for key, equal in (("equal", True), ("unequal", False))
    for answer in row[key]
]


def errors(pairs):
    """(false positives, false negatives) on pairs."""
    found = ([], [])
    for reference, answer, equal in pairs:
        if math.decide(reference, answer)[0] != equal:
            found[equal].append((reference, answer))
    return found


def test_a_third_of_the_pairs():
    some = PAIRS[::3]
    assert len(some) > 300
    false_positives, false_negatives = errors(some)
    assert not false_positives
    assert len(false_negatives) <= 0.01 * sum(equal for _, _, equal in some), false_negatives


@pytest.mark.slow
def test_all_pairs():
    assert len(PAIRS) > 1000
    false_positives, false_negatives = errors(PAIRS)
    assert not false_positives
    assert len(false_negatives) <= 0.01 * sum(equal for _, _, equal in PAIRS), false_negatives


def test_pairs_are_told_apart_in_both_directions():
    """Swapping reference and answer makes no unequal pair of plain numbers equal."""
    plain = [(a, b) for a, b, equal in PAIRS if not equal and len(a) < 4 and len(b) < 4][:60]
    assert len(plain) > 30
    # Percent signs follow the reference.
    swapped = [(b, a, False) for a, b in plain if "%" not in a + b]
    assert errors(swapped) == ([], [])


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^{9}}}",
        "(10^{10})!",
        r"\frac{1}{9^{9^{9^{9}}}}",
        r"\sum_{k=1}^{10^{12}} \frac{1}{k^k}",
        "{" * 1900,
        "(" * 900 + "1" + ")" * 900,
        r"\frac{" * 300 + "1" + "}{2}" * 300,
        r"\sqrt{" * 200 + "4" + "}" * 200,
        "1+" * 900 + "1",
        "-" * 1900 + "1",
        "x" * 1900,
        "9" * 1900,
        "1," * 900 + "1",
        "a=" * 900 + "1",
        "|" * 1900,
        r"\int_0^1 x^{x^{x}} dx",
        "\x00\ud800 1",
        r"\begin{pmatrix}" + "1&" * 500 + r"1\end{pmatrix}",
    ],
)
def test_hostile_answers_are_refused_in_time(answer):
    start = time.monotonic()
    assert not math.decide("1", answer)[0]
    assert time.monotonic() - start < 15


def test_reasons():
    problem = Problem("p", "?", "1", "math__test")
    assert "not evaluated" in score(problem, r"\boxed{9^{9^{9^{9}}}}").reason
    assert score(problem, r"<think>\boxed{1}").reason == "no answer in the expected form"
    assert "read '2'" in score(problem, r"so \boxed{2}").reason
    with pytest.raises(ValueError, match="reference answer of p cannot be read"):
        score(Problem("p", "?", " ", "math__test"), r"\boxed{1}")


def test_another_thread_is_an_error_and_no_zero():
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        found = threads.submit(math.decide, "x+1", "1+x")
        with pytest.raises(RuntimeError, match="use a VerifierPool"):
            found.result()


@pytest.mark.parametrize(
    ("text", "kind", "items"),
    [
        ("1,234", "atom", ()),
        ("1,234, 5", "list", ("1,234", "5")),
        ("(1,234)", "tuple", ("1", "234")),
        (r"\{100,200\}", "set", ("100", "200")),
        ("[0, 1)", "tuple", ("0", "1")),
        (r"(-\infty, 0) \cup (1, 2)", "union", (r"(-\infty, 0)", "(1, 2)")),
        (r"x = \pm 2", "list", ("x = 2", "x = -2")),
        ("1, 2 and 3", "list", ("1", "2", "3")),
        (r"\frac{1, 2}{3}", "atom", ()),
        ("((1))", "atom", ()),
    ],
)
def test_shapes(text, kind, items):
    shape = math_text.shape(math_text.clean(text))
    assert (shape.kind, tuple(item.replace("=2", "= 2") for item in shape.items)) == (kind, items)
