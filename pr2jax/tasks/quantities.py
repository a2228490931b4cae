r"""Numbers as people write them: -1,234.5, 12%, $3.50, 1.2 \times 10^{5}, 3/4, (17), 5 km/h.

Values are exact fractions. Everything here is linear in the text and works on short texts only.
"""

import re
from fractions import Fraction
from typing import NamedTuple

LIMIT = 2000  # characters: longer texts are no number
_EXPONENT = 400  # beyond this many digits a number is not read
_MINUS = dict.fromkeys(map(ord, "−–—‒﹣－"), "-")
_SPACES = dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u202f\u200a\u2002\u2003"), " ")
_FULL = {ord("０") + i: str(i) for i in range(10)} | {ord("．"): ".", ord("，"): ","}
_GONE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u200e\u200f"), None)
TRANSLATE = _MINUS | _SPACES | _FULL | _GONE | {ord("％"): "%", ord("＋"): "+", ord("＄"): "$"}
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mathit|mathsf|operatorname|mbox|rm|bf|boxed)"
    r"\s?\{([^{}]*)\}"
)
_EXPONENT_BRACES = re.compile(r"\^\s?\{([^{}\\]*)\}")
_FRACTION = re.compile(r"\\[dtc]?frac\s?\{\s?([+-]?[\d.]+)\s?\}\s?\{\s?([\d.]+)\s?\}")
_COMMANDS = (
    ("\\left", ""), ("\\right", ""), ("\\!", ""), ("{,}", ","), ("\\,", " "), ("\\;", " "),
    ("\\:", " "), ("\\ ", " "), ("~", " "), ("\\quad", " "), ("\\%", "%"), ("\\$", "$"),
    ("\\times", "×"), ("\\cdot", "·"), ("^\\circ", "°"), ("^{\\circ}", "°"), ("\\degree", "°"),
    ("\\circ", "°"), ("\\mu", "μ"), ("\\Omega", "Ω"), ("\\pounds", "£"), ("\\euro", "€"),
    ("\\approx", "≈"), ("\\(", ""), ("\\)", ""), ("\\[", ""), ("\\]", ""),
)  # fmt: skip
_CURRENCIES = "$€£¥₹"
_CURRENCY_WORDS = {
    "dollars": "$", "dollar": "$", "usd": "$", "us$": "$", "euros": "€", "euro": "€", "eur": "€",
    "pounds sterling": "£", "gbp": "£", "yen": "¥", "jpy": "¥", "rupees": "₹", "inr": "₹",
}  # fmt: skip
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_BODY = re.compile(
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?![\d,])|\d{1,3}(?: \d{3})+(?![\d])|\d{1,400})?"
    r"(?P<decimals>\.\d{0,400})?"
    r"(?:\s?[eE]\s?(?P<exp>[+-]?\d{1,4})(?!\w)"
    r"|\s{0,2}[×x*·]\s{0,2}10\s?(?:\^|\*\*)\s?[({]?\s?(?P<power>[+-]?\s?\d{1,4})\s?[)}]?)?"
)
_POWER = re.compile(r"10\s?(?:\^|\*\*)\s?[({]?\s?([+-]?\s?\d{1,4})\s?[)}]?")
_RATIO = re.compile(r"\s?/\s?(\d{1,400})(?![\d.,])")
_MIXED = re.compile(r"(\d{1,30})\s(\d{1,30})\s?/\s?(\d{1,30})(?![\d.,])")


# Letters first; digits only right after a letter, a ^ or their sign.
_UNIT = re.compile(r"[^\W\d_⁰¹²³⁴-⁹][\w°'\"′″()/·*^.⁻⁰¹²³⁴-⁹ -]{0,80}|[°'\"′″][\w/]{0,9}")
# A small n is a variable, a capital one the newton.
# Variables in small letters (N and I are units), and words that make it another answer.
_NO_UNITS = re.compile(
    r"\b(?:[exyzni]|pi|π|(?i:or|and|nor|to|not|no|is|are|but|sqrt|frac|log|ln|sin|cos|tan|mod|either|"
    r"else|if|then|maybe|perhaps|possibly|approximately|about|between|plus|minus|times|over|through|"
    r"at|least|most|more|less|than|fewer|greater|except|unless|when|where|for|with|without|other|any|"
    r"all|many|some|several|infinitely|unknown|wrong|can|could|may|might|must|should|guess|think|"
    r"dozens?|hundreds?|tenths?|hundredths?|thousandths?|half|halves|thirds?|quarters?|fourths?|"
    r"fifths?|sixths?|eighths?|squared|cubed|factorial|only|exactly|solutions?))\b"
)


class Quantity(NamedTuple):
    """A number and what stands beside it.

    value: as written, before any percent sign acts. decimals: digits after the point, None where
    the number has neither point nor exponent. unit: the text after the number, spaces single.
    """

    value: Fraction
    percent: bool = False
    currency: str = ""
    unit: str = ""
    decimals: int | None = None


def plain(text: str) -> str:
    """A short LaTeX or Unicode text with its wrappers, spacing commands and math signs gone."""
    text = text[:LIMIT].translate(TRANSLATE).strip()
    text = _EXPONENT_BRACES.sub(r"^\1", text)
    for _ in range(4):
        text, changed = _WRAPPED.subn(r"\1", text)
        if not changed:
            break
    text = _FRACTION.sub(r" \1/\2", text)
    for command, sign in _COMMANDS:
        text = text.replace(command, sign)
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text.strip("$")
    return " ".join(text.replace("{", " { ").split()).replace(" { ", "{").replace("{ ", "{")


def read(text: str, *, accounting: bool = False) -> Quantity | None:
    """The quantity that `text` is as a whole, or None.

    accounting: (1,234) is -1234. What follows the number and is neither a percent sign, a
    currency nor a scale word (million) is its unit, whatever it says.
    """
    if len(text) > LIMIT:
        return None
    text = re.sub(r"(?<!\.)\.$", "", plain(text)).strip()
    negative = False
    if accounting and text.startswith("(") and text.endswith(")"):
        text, negative = text[1:-1].strip(), True
    if accounting and text.startswith("$(") and text.endswith(")"):
        text, negative = text[:1] + text[2:-1].strip(), True
    head = re.match(rf"([+-]?)\s?([{_CURRENCIES}]?)\s?([+-]?)\s?", text)
    if head.group(1) and head.group(3):
        return None
    negative ^= "-" in (head.group(1), head.group(3))
    found = _number(text[head.end() :])
    if found is None:
        return None
    value, rest, decimals = found
    return _with_unit(-value if negative else value, head.group(2), rest, decimals)


def _with_unit(value: Fraction, currency: str, rest: str, decimals: int | None) -> Quantity | None:
    rest = rest.strip()
    word, _, after = rest.partition(" ")
    if word.lower() in _SCALES:
        value, rest = value * 10 ** _SCALES[word.lower()], after.strip()
    percent = rest[:1] == "%" or rest.lower() in ("percent", "per cent")
    if percent:
        rest = rest[1:].strip() if rest[0] == "%" else ""
    if rest[:1] and rest[0] in _CURRENCIES and not currency:
        currency, rest = rest[0], rest[1:].strip()
    if rest.lower() in _CURRENCY_WORDS and currency in ("", _CURRENCY_WORDS[rest.lower()]):
        currency, rest = _CURRENCY_WORDS[rest.lower()], ""
    if rest and not is_unit(rest):
        return None  # "1 2", "1.2.3", "12,34", "2^5", "3-4", "3 or 4": no single number
    return Quantity(value, percent, currency, rest, decimals)


def is_unit(text: str) -> bool:
    """Whether `text` could be a unit, a word counted, or a product of such: m/s^2, square feet."""
    if re.match(r"[exEX]\d", text):  # the rest of 0x10, 1e99999
        return False
    return bool(_UNIT.fullmatch(text)) and not _NO_UNITS.search(text)


def _number(text: str) -> tuple[Fraction, str, int | None] | None:
    """(value, what follows, decimals) of the unsigned number that `text` begins with."""
    mixed = _MIXED.match(text)
    if mixed:
        whole, over, under = map(int, mixed.groups())
        if not 0 < over < under:
            return None
        return whole + Fraction(over, under), text[mixed.end() :], None
    bare = _POWER.match(text)
    if bare:
        exponent = int(bare.group(1).replace(" ", ""))
        return _scaled(Fraction(1), exponent, text[bare.end() :], 0)
    match = _BODY.match(text)
    whole, decimals = match.group("whole") or "", match.group("decimals") or ""
    if not whole and len(decimals) < 2:
        return None
    digits = whole.replace(",", "").replace(" ", "")
    value = Fraction(int(digits or "0"))
    if len(decimals) > 1:
        value += Fraction(int(decimals[1:]), 10 ** (len(decimals) - 1))
    exponent = match.group("exp") or match.group("power")
    rest = text[match.end() :]
    if exponent is not None:
        return _scaled(value, int(exponent.replace(" ", "")), rest, max(len(decimals) - 1, 0))
    ratio = _RATIO.match(rest)
    if ratio and not decimals:
        under = int(ratio.group(1))
        return (value / under, rest[ratio.end() :], None) if under else None
    return value, rest, len(decimals) - 1 if decimals else None


def _scaled(value: Fraction, exponent: int, rest: str, decimals: int):
    if abs(exponent) > _EXPONENT:
        return None
    return value * Fraction(10) ** exponent, rest, max(decimals - exponent, 0)


def close(a: Fraction, b: Fraction, rel_tol: Fraction) -> bool:
    """|a - b| <= rel_tol |b|, exactly."""
    return abs(a - b) <= rel_tol * abs(b)
