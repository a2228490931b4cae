r"""Tabular answers: numbers within 1e-3, percents, lists in any order, text; and quantities."""

from fractions import Fraction

import pytest

from pr2jax.tasks import quantities, tabular
from pr2jax.tasks.base import Problem
from pr2jax.tasks.registry import score


def verdict(answer, given, boxed=True):
    response = f"<think>hm</think> so \\boxed{{{given}}}" if boxed else given
    return score(Problem("t", "?", answer, "table__hitab"), response)


@pytest.mark.parametrize(
    ("answer", "given", "want"),
    [
        ("12.5", "12.5", 1),
        ("12.5", "12.51", 1),  # 8e-4
        ("12.5", "12.52", 0),  # 1.6e-3
        ("1000", "1001", 1),
        ("1000", "1002", 0),
        ("-3", "3", 0),
        ("-3", "−3", 1),
        ("0", "0.0", 1),
        ("0", "0.0001", 0),
        ("1,234.5", "1234.5", 1),
        ("1234.5", r"\$1,234.50", 1),
        ("1234.5", "$1,234.50", 1),
        ("$5", "€5", 0),
        ("-1234", "(1,234)", 1),
        ("(1,234)", "-1,234", 1),
        ("1234", "(1,234)", 0),
        ("5 million", "5,000,000", 1),
        ("5 million", "5", 0),
        ("2e3", "2000", 1),
        # Percent: the conventions of the module's head.
        ("0.12", r"12\%", 1),
        ("0.12", "12%", 1),
        ("12%", "0.12", 1),
        ("12%", "12", 1),
        ("12", "12%", 1),
        ("0.12", "12", 0),
        ("12", "0.12", 0),
        ("0.5", "0.5%", 0),
        ("12%", "12 percent", 1),
        ("12%", "13%", 0),
        # Years are within 1e-3 of each other.
        ("2019", "2020", 0),
        ("2019", "2019", 1),
        ("2019.5", "2020", 1),
        # Text.
        ("North America", "north  america", 1),
        ("North America", r"\text{North America}", 1),
        ("North America", '"North America"', 1),
        ("North America", "America", 0),
        ("R&D", r"R\&D", 1),
        ("2008-2009", "2008–2009", 1),
        ("5 apples", "5", 1),
        ("5 apples", "5 pears", 0),
        ("yes", "no", 0),
        ("12", "__import__('os').system('true')", 0),
        ("12", "6*2", 0),  # nothing is evaluated
        ("12", "", 0),
        ("12", "12 or 13", 0),
        # Lists.
        ("a|b", "b|a", 1),
        ("a|b", "B | A", 1),
        ("a|b", "a, b", 1),
        ("a|b", "a; b", 1),
        ("a|b", "a", 0),
        ("a|b", "a|b|c", 0),
        ("a|a|b", "a|b|b", 0),
        ("a|a|b", "b|a|a", 1),
        ("1|2|3", "3|1|2", 1),
        ("1,000|2", "2|1000", 1),
        ("10|9.995", "9.99|10", 1),  # only one pairing works: 9.99 is within 1e-3 of 9.995 alone
        ('["a", "b"]', '["b", "a"]', 1),
        ("a", "a|a", 0),
        ("a, b", "a, b", 1),
    ],
)
def test_tabular(answer, given, want):
    assert verdict(answer, given).score == want


def test_form_and_reasons():
    assert verdict("12", "12", boxed=False).reason == "no answer in the expected form"
    assert verdict("12", "<think>\\boxed{12}", boxed=False).score == 0
    assert verdict("a|b", "a").reason == "1 answers for 2: read 'a'"
    with pytest.raises(ValueError, match="reference answer of t is empty"):
        verdict("|", "x")


def test_matching_finds_a_pairing_that_greed_misses():
    want, given = ["1", "2"], ["a", "b"]
    allowed = {("1", "a"), ("1", "b"), ("2", "a")}
    equal = lambda w, g: (w, g) in allowed
    assert tabular.matches(want, given, equal)
    assert not tabular.matches(["2", "3"], given, equal)
    # Brute force over all relations of three against three.
    import itertools

    pairs = list(itertools.product("123", "abc"))
    for bits in range(2 ** len(pairs)):
        chosen = {pair for i, pair in enumerate(pairs) if bits >> i & 1}
        brute = any(
            all((w, g) in chosen for w, g in zip("123", order, strict=True))
            for order in itertools.permutations("abc")
        )
        assert tabular.matches("123", "abc", lambda w, g, c=chosen: (w, g) in c) is brute


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("-1,234.5", Fraction(-12345, 10), ""),
        ("−5", Fraction(-5), ""),
        ("＋5", Fraction(5), ""),
        (r"1.2 \times 10^{5}", Fraction(120000), ""),
        ("3 x 10^5", Fraction(300000), ""),
        ("3 × 10^-5", Fraction(3, 100000), ""),
        ("1e5", Fraction(100000), ""),
        ("1.5E-3 m", Fraction(3, 2000), "m"),
        ("10^{-3}", Fraction(1, 1000), ""),
        ("3/4", Fraction(3, 4), ""),
        (r"\frac{3}{4}", Fraction(3, 4), ""),
        (r"2\frac{1}{2}", Fraction(5, 2), ""),
        ("2 1/2", Fraction(5, 2), ""),
        ("12 345", Fraction(12345), ""),
        (r"1{,}000", Fraction(1000), ""),
        (r"1\,000", Fraction(1000), ""),
        (".5", Fraction(1, 2), ""),
        (r"5.2 \text{ m/s}^2", Fraction(26, 5), "m/s^2"),
        (r"9.8\ \mathrm{m\,s^{-2}}", Fraction(49, 5), "m s^-2"),
        (r"90^\circ", Fraction(90), "°"),
        ("5 km/h", Fraction(5), "km/h"),
    ],
)
def test_quantities(text, value, unit):
    found = quantities.read(text)
    assert (found.value, found.unit) == (value, unit)


@pytest.mark.parametrize(
    "text",
    ["", "x", "1 2", "1,23", "1.2.3", "12,345,67", "3-4", "3 or 4", "2^5", "2 to 3", "--5", "1/0",
     "5 at most", "5 dozen", "0x10", "1_000", "1e999999", "9" * 3000, "5 tenths", "3 + 4i", "7..."],
)  # fmt: skip
def test_what_is_no_single_number(text):
    assert quantities.read(text) is None
