r"""Science: letters, numbers with units and tolerance, and what is left to a judge."""

import math

import pytest

from pr2jax.tasks import science, units
from pr2jax.tasks.base import JudgeRequest, Problem
from pr2jax.tasks.registry import score

OPTIONS = "Which?\nA) one\nB) two\nC) three\nD) four"


def ask(answer, given, question="How much?", source="stem__test", **meta):
    problem = Problem("s", question, answer, source, meta={"question": question, **meta})
    return score(problem, given if "\\boxed" in given else f"\\boxed{{{given}}}")


@pytest.mark.parametrize(
    ("answer", "question", "meta", "source", "kind"),
    [
        ("B", OPTIONS, {}, "stem__supergpqa", "choice"),
        ("(B)", OPTIONS, {}, "stem__supergpqa", "choice"),
        ("B", "Which element?", {}, "stem_web", "text"),  # boron
        ("B", "?", {}, "stem__gpqa_diamond", "choice"),
        ("B", "?", {"choices": ["x", "y"]}, "stem__x", "choice"),
        ("B", "?", {"kind": "choice"}, "stem__x", "choice"),
        ("B", "?", {"answer_type": "Multiple Choice"}, "stem_web", "choice"),
        ("9.8 m/s^2", "?", {}, "stem_web", "numeric"),
        (r"\$8,645.09", "?", {}, "stem_web", "numeric"),
        ("12%", "?", {"answer_type": "Percentage"}, "stem_web", "numeric"),
        (r"\frac{mv^2}{r}", "?", {}, "stem_web", "formula"),
        ("F = ma", "?", {}, "stem_web", "formula"),
        ("increases by a factor of 4", "?", {}, "stem_web", "text"),
        ("mitochondria", "?", {}, "stem_web", "text"),
        ("5", "?", {"kind": "text"}, "stem_web", "text"),
    ],
)
def test_the_reference_decides_the_kind(answer, question, meta, source, kind):
    problem = Problem("s", question, answer, source, meta={"question": question, **meta})
    assert science.kind_of(problem) == kind


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("B", 1),
        ("(B)", 1),
        (r"\text{B}", 1),
        ("B) two", 1),
        ("b", 1),
        ("A", 0),
        ("A or B", 0),
        ("two", 0),
        ("", 0),
        (r"I guess B \boxed{}", 0),
        (r"<think>\boxed{B}</think> \boxed{A}", 0),
    ],
)
def test_choices(given, want):
    assert ask("B", given, OPTIONS).score == want


def test_a_choice_without_a_letter_is_no_guess():
    problem = Problem("s", OPTIONS, "B", "stem__gpqa")
    assert score(problem, "It could be anything, maybe two.").reason == "no choice letter"
    assert score(problem, "<think>Answer: B").score == 0
    assert score(problem, "The answer is B.").score == 1
    named = Problem("s", OPTIONS, "B", "stem__x", meta={"choices": ["one", "two", "two "]})
    assert score(named, r"\boxed{two}").score == 0  # two options read so
    named = Problem("s", OPTIONS, "B", "stem__x", meta={"choices": ["one", "two", "three"]})
    assert score(named, r"\boxed{\text{Two}}").score == 1


@pytest.mark.parametrize(
    ("answer", "given", "want"),
    [
        ("9.81 m/s^2", "9.81 m/s^2", 1),
        ("9.81 m/s^2", r"9.8\ \mathrm{m\,s^{-2}}", 1),
        ("9.81 m/s^2", "9.81", 1),  # the unit is the reference's
        ("9.81 m/s^2", "981 cm/s^2", 1),
        ("9.81 m/s^2", "9.81 m/s", 0),
        ("9.81 m/s^2", "9.81 km/s^2", 0),
        ("9.81 m/s^2", "9.70 m/s^2", 0),
        ("9.81 m/s^2", "9.75 m/s^2", 1),  # 0.6%
        ("566.25", "566.25 N", 1),
        ("36 km/h", "10 m/s", 1),
        ("36 km/h", "10 m/h", 0),
        ("5 mW", "5 MW", 0),
        ("5 mW", "0.005 W", 1),
        ("1.5 kJ", r"1500 \text{ J}", 1),
        ("25 °C", "298.15 K", 1),
        ("25 °C", "25 K", 0),
        ("100 °C", "212 °F", 1),
        ("2.5 eV", r"4.0 \times 10^{-19} J", 1),
        (r"6.63 \times 10^{-34}", "6.63e-34", 1),
        (r"6.63 \times 10^{-34}", "6.63e-33", 0),
        ("8645.09", r"\$8,645.09", 1),
        (r"\$8,645.09", r"€8,645.09", 0),
        ("12.5%", "0.125", 1),
        ("12.5%", "12.5", 1),  # here too the unit is the reference's
        ("0.125", r"12.5\%", 1),
        ("12", "12", 1),
        ("12", "12.1", 0),  # a count is exact
        ("12", "v = 12", 1),
        ("12.0", "12.1", 1),
        ("-3.0 V", "3.0 V", 0),
        ("3.14", r"\pi", 0),  # a number all the same, but to six digits
        ("0.5", r"\frac{1}{2}", 1),
        ("5 apples", "5 pears", 0),
        ("12", "about a dozen", 0),
        ("12", "11 or 12", 0),
    ],
)
def test_numbers(answer, given, want):
    verdict = ask(answer, given)
    assert verdict.score == want
    assert (verdict.reason == "") == (want == 1)


def test_tolerance_and_unit_of_the_meta():
    assert ask("10.0", "10.4", tolerance=0.05).score == 1
    assert ask("10.0", "10.6", tolerance=0.05).score == 0
    assert ask("10.0", "10.05", tolerance=0.001).score == 0
    assert ask("10.0", "10 cm", unit="m").score == 0
    assert ask("10.0", "1000 cm", unit="m").score == 1
    for bad in (1.5, -0.1, True, "x"):
        with pytest.raises(ValueError, match="s: tolerance"):
            ask("10.0", "10", tolerance=bad)


def test_texts_and_formulas_go_to_a_judge_unless_they_are_equal():
    request = ask("the mitochondria", "It is in the mitochondrion", "Where?")
    assert request == JudgeRequest("Where?", "the mitochondria", "It is in the mitochondrion")
    assert ask("the mitochondria", r"\text{The  Mitochondria}.").score == 1
    assert ask(r"\frac{mv^2}{r}", r"m \frac{v^2}{r}").score == 1
    assert ask("F = ma", "ma").score == 1
    assert isinstance(ask("F = ma", "m/a"), JudgeRequest)
    assert isinstance(ask("F = ma", "9^{9^{9^{9}}}"), JudgeRequest)
    # Nothing to judge: no box, or an empty one.
    problem = Problem("s", "Where?", "the mitochondria", "stem_web")
    assert score(problem, "the mitochondria").score == 0
    assert score(problem, r"\boxed{ }").score == 0
    bare = ask("the cell", "a cell", "prompt", judge_question="Where?")
    assert bare.question == "Where?"
    with pytest.raises(ValueError, match="reference answer of s is empty"):
        ask(" ", "x")


@pytest.mark.parametrize(
    ("text", "factor", "like"),
    [
        ("km", 1e3, "m"),
        ("kg m^2/s^2", 1.0, "J"),
        ("N·m", 1.0, "J"),
        ("J/(mol·K)", 1.0, "J/mol K"),
        ("meters per second", 1.0, "m/s"),
        ("square feet", 0.09290304, "m^2"),
        ("cubic centimeters", 1e-6, "m^3"),
        ("mL", 1e-6, "m^3"),
        ("kWh", 3.6e6, "J"),
        ("min", 60.0, "s"),
        ("mPa", 1e-3, "Pa"),
        ("m⁻¹", 1.0, "m^-1"),
        ("rpm", 2 * math.pi / 60, "Hz"),
        ("mol/L", 1e3, "mol/m^3"),
        ("Å", 1e-10, "m"),
        ("lbs", 0.45359237, "kg"),
    ],
)
def test_units(text, factor, like):
    found = units.parse(text)
    assert found.factor == pytest.approx(factor, rel=1e-12)
    assert found.powers == units.parse(like).powers


@pytest.mark.parametrize("text", ["", "foo", "m/s/s", "m)(", "(m", "m^x", "°C", "m" * 100])
def test_what_is_no_unit(text):
    assert units.parse(text) is None


def test_temperatures_have_scales():
    assert units.to_si(0, "°C") == (273.15, units.parse("K").powers)
    assert units.to_si(212, "degrees Fahrenheit")[0] == pytest.approx(373.15)
    assert units.to_si(1, "foo") is None
