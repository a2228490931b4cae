r"""Mathematical answers as text: one spelling for LaTeX, Unicode and plain ways to write them,
and the shape of an answer (set, tuple, interval, list, matrix, single value).
"""

import re
from typing import NamedTuple

from pr2jax.tasks import quantities

LIMIT = 2000  # characters of an answer that are looked at
_UNICODE = {
    "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "π": r"\pi ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\neq ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "°": r"^\circ ",
    "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}", "⅛": r"\frac{1}{8}", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ",
    "δ": r"\delta ", "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ", "φ": r"\phi ",
    "ω": r"\omega ",
    "σ": r"\sigma ", "ρ": r"\rho ", "ε": r"\varepsilon ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "⟨": r"\langle ", "⟩": r"\rangle ",
    "∖": r"\setminus ", "∧": r" and ", "∨": " or ", "′": "'", "−": "-", "≈": r"\approx ", "∣": "|",
    "（": "(", "）": ")", "，": ",", "＝": "=", "｛": r"\{", "｝": r"\}", "＋": "+",
    "≡": r"\equiv ",
}  # fmt: skip
_SUPER = {c: str(i) for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {"⁻": "-", "ⁿ": "n", "⁺": "+"}
_SUB = {c: str(i) for i, c in enumerate("₀₁₂₃₄₅₆₇₈₉")}
_SUPERS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ⁺]{1,20}")
_SUBS = re.compile("[₀₁₂₃₄₅₆₇₈₉]{1,20}")
_ROOT = re.compile(r"√\s?(?:\(([^()]{1,200})\)|\{([^{}]{1,200})\}|(\d+(?:\.\d+)?|[A-Za-z]))")
_SQRT_PLAIN = re.compile(r"(?<![\\A-Za-z])sqrt\s?(?:\(([^()]{1,200})\)|\{([^{}]{1,200})\})")
_RENAMED = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|bigg|Bigg)(?![A-Za-z])\s?\.?"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|nolimits)(?![A-Za-z])"), ""),
    (re.compile(r"\\!"), ""),
    (re.compile(r"(?<!\\)\\(?:[,;: ]|quad|qquad|thinspace|hspace\{[^{}]{0,20}\})|~"), " "),
    (re.compile(r"\\(?:leqslant|leq)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\(?:geqslant|geq)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\ne(?![A-Za-z])"), r"\\neq"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"<=|=<"), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\neq "),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\(?:lbrace|rbrace)(?![A-Za-z])"), lambda m: "\\{" if "l" in m[0][:2] else "\\}"),
    (re.compile(r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])"), "|"),
    (re.compile(r"\\(?:lor|vee)(?![A-Za-z])"), " or "),
    (re.compile(r"\\(?:land|wedge)(?![A-Za-z])"), " and "),
    (re.compile(r"\\(?:mathbb|mathbf|Bbb)\s?\{?([RZNQC])\}?(?![A-Za-z])"), r"\\mathbb{\1}"),
    (re.compile(r"\\bf(?![A-Za-z])|\\rm(?![A-Za-z])"), ""),
    (re.compile(r"\^\s?\{\s?\\circ\s?\}|\^\s?\\circ|\\degree(?![A-Za-z])|\^\s?\{\s?\\prime\s?\}\\circ"),
     r"^\\circ "),
    (re.compile(r"\\operatorname\s?\{(arcsin|arccos|arctan|sec|csc|cot|sinh|cosh|tanh|ln|log|exp|gcd|lcm)\}"),
     r"\\\1"),
    (re.compile(r"\\(?:mathrm|textrm|textbf|textit|mathbf|mathit|mathsf|mbox|textsf|operatorname)\s?\{([^{}]{0,400})\}"),
     r"\\text{\1}"),
    (re.compile(r"\\text\s?\{\s?([a-zA-Z])\s?\}(?=\s?[\^=])"), r"\1"),
    (re.compile(r"\\log\s?_\s?(\w)(?!\w)"), r"\\log_{\1}"),
    (re.compile(r"(?<=\d)\s?x\s?(?=10\s?\^)"), r"\\times "),
    (re.compile(r"\\text\s?\{\s*(or|and)\s*\}"), r" \1 "),
)  # fmt: skip
# \frac12, \frac1{2}, \frac{1}2, \sqrt2
_FRAC_DIGITS = re.compile(r"\\frac\s?(\d)\s?(\d)(?!\d)")
_FRAC_FIRST = re.compile(r"\\frac\s?(\d)\s?\{")
_FRAC_LAST = re.compile(r"(\\frac\s?\{[^{}]{1,100}\})\s?(\d)(?!\d)")
_SQRT_BARE = re.compile(r"\\sqrt\s?(\d+|[A-Za-z])(?![A-Za-z])")
_LEAD = re.compile(
    r"^(?:(?:the|so|thus|hence|therefore|my|our|final|correct|answer|result|value|is|are|equals)\b"
    r"[\s,]{0,3}){1,8}[:=]?\s?", re.IGNORECASE
)  # fmt: skip
_ENDS = re.compile(r"^[\s:=]+|^\\approx(?![A-Za-z])\s?|(?<![.;,])[.;,]?\s*$")
_TEXT = re.compile(r"\\text\s?\{([^{}]*)\}")
_FUNCTIONS = re.compile(
    "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|sqrt|max|min|gcd|lcm|"
    "mod|pi|deg|det|dim|ker|lim|inf|sup"
)
_SHORT_WORDS = re.compile(
    "yes|no|odd|even|true|false|none|red|blue|all|sun|mon|tue|wed|thu|fri|sat|dne|neither|both|"
    "win|tie|him|her|his|she|one|two|six|ten"
)
_LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+")
_ONLY_WORDS = re.compile(r"[^\W\d_][^\W\d_\s'’.\-!?]*(?:[\s'’.\-!?]+[^\W\d_]*)*")


def clean(text: str) -> str:
    """An answer in one spelling; "" where it is longer than LIMIT."""
    if len(text) > LIMIT:
        return ""
    text = text.translate(quantities.TRANSLATE)
    text = _SUPERS.sub(lambda m: "^{" + "".join(_SUPER[c] for c in m[0]) + "}", text)
    text = _SUBS.sub(lambda m: "_{" + "".join(_SUB[c] for c in m[0]) + "}", text)
    text = _ROOT.sub(lambda m: r"\sqrt{" + next(g for g in m.groups() if g) + "}", text)
    text = _SQRT_PLAIN.sub(lambda m: r"\sqrt{" + next(g for g in m.groups() if g) + "}", text)
    for sign, command in _UNICODE.items():
        text = text.replace(sign, command)
    text = _unwrapped(text.strip())
    for pattern, replacement in _RENAMED:
        text = pattern.sub(replacement, text)
    text = text.replace("\\%", "%").replace("{,}", ",").replace("**", "^")
    text = _FRAC_DIGITS.sub(r"\\frac{\1}{\2}", text)
    text = _FRAC_FIRST.sub(r"\\frac{\1}{", text)
    text = _FRAC_LAST.sub(r"\1{\2}", text)
    text = _SQRT_BARE.sub(r"\\sqrt{\1}", text)
    text = " ".join(text.split())
    first = _TEXT.match(text)
    if first and _LEAD.fullmatch(first.group(1).strip()):
        text = text[first.end() :].strip()
    text = _LEAD.sub("", text)
    return _ENDS.sub("", text).strip()


def _unwrapped(text: str) -> str:
    r"""Without $...$, \(...\), \[...\] around the whole, or dollar signs that pair up."""
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > 3:
            text = text[2:-2].strip()
    marks = re.findall(r"(?<!\\)\$", text)
    if marks and len(marks) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text).strip()
    return text


def unwrapped(text: str) -> str:
    r"""`text` with what stands in \text{} bare."""
    return " ".join(_TEXT.sub(r" \1 ", text).split())


def squeezed(text: str) -> str:
    """`text` without spaces but those between digits, and without braces around one character."""
    text = re.sub(r"(?<![\d,])\s+|(?<=,)\s+(?!\d)|\s+(?!\d)", "", text)
    return re.sub(r"\{(\w)\}", r"\1", text)


def is_words(text: str) -> bool:
    """Whether a clean text is prose: words, not a product of variables."""
    inner = _TEXT.sub(r" \1 ", text).strip()
    if not _ONLY_WORDS.fullmatch(inner):
        return False
    wrapped = "\\text" in text
    return any(_is_word(word, wrapped) for word in re.findall(r"[^\W\d_]+", inner))


def _is_word(word: str, wrapped: bool) -> bool:
    low = word.lower()
    if _FUNCTIONS.fullmatch(low):
        return False
    return len(low) >= (2 if wrapped else 4) or bool(_SHORT_WORDS.fullmatch(low))


def has_words(text: str) -> bool:
    """Whether prose stands anywhere in a clean text."""
    if any(_is_word(w, True) for t in _TEXT.findall(text) for w in re.findall(r"[^\W\d_]+", t)):
        return True
    return any(_is_word(word, False) for word in _LETTERS.findall(_TEXT.sub(" ", text)))


def words(text: str) -> str:
    """Prose as it is compared: lower case, single spaces, no punctuation at the ends."""
    inner = _TEXT.sub(r" \1 ", text).lower()
    return " ".join(re.sub(r"[^\w\s]", " ", inner).split())


class Shape(NamedTuple):
    r"""What an answer is made of.

    kind: "atom" (text), "list" (items in no order), "set", "tuple" (brackets and order matter),
    "union", "matrix" (items are rows joined by &). brackets: of a tuple. joined: of a list: what
    stood between its items (",", "or", "and", "pm").
    """

    kind: str
    items: tuple[str, ...] = ()
    text: str = ""
    brackets: str = ""
    joined: str = ""


_OPEN = re.compile(r"\\begin\s?\{\w{1,12}\*?\}|\\\{|\\langle(?![A-Za-z])|[({\[]")
_TOKEN = re.compile(
    r"\\begin\s?\{\w{1,12}\*?\}|\\end\s?\{\w{1,12}\*?\}|\\[{}]|\\langle(?![A-Za-z])|"
    r"\\rangle(?![A-Za-z])|\\cup(?![A-Za-z])|\\[A-Za-z]+|\\.|(?<![A-Za-z])(?:or|and)(?![A-Za-z])|"
    r"[(){}\[\],;=<>&]",
    re.DOTALL,
)
_CLOSING = ("\\}", "\\rangle", ")", "]", "}")
_OPENING = ("\\{", "\\langle", "(", "[", "{")


def split(text: str, separators: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(parts, separators between them) of `text` outside all brackets."""
    parts, found, depth, start = [], [], 0, 0
    for token in _TOKEN.finditer(text):
        sign = token.group()
        if sign in _OPENING or sign.startswith("\\begin"):
            depth += 1
        elif sign in _CLOSING or sign.startswith("\\end"):
            depth -= 1
        elif depth == 0 and sign in separators:
            if sign == "," and _thousands(text, token.start()):
                continue
            parts.append(text[start : token.start()].strip())
            found.append(sign)
            start = token.end()
    parts.append(text[start:].strip())
    return parts, found


def _thousands(text: str, comma: int) -> bool:
    """Whether the comma stands between groups of a number: 12,345 and not 1,2345 or 1, 234."""
    before = re.search(r"(?<![\d,.])\d{1,3}(?:,\d{3})*$", text[max(0, comma - 40) : comma])
    return bool(before) and bool(re.match(r",\d{3}(?!\d)", text[comma:]))


def _bracketed(text: str) -> tuple[str, str, str] | None:
    """(opening, inner, closing) where one pair of brackets holds the whole text."""
    opening = next((b for b in ("\\{", "\\langle", "(", "[") if text.startswith(b)), None)
    closing = next((b for b in ("\\}", "\\rangle", ")", "]") if text.endswith(b)), None)
    if opening is None or closing is None or len(text) < len(opening) + len(closing):
        return None
    depth = 0
    for token in _TOKEN.finditer(text):
        sign = token.group()
        if sign in _OPENING or sign.startswith("\\begin"):
            depth += 1
        elif sign in _CLOSING or sign.startswith("\\end"):
            depth -= 1
            if depth == 0 and token.end() < len(text):
                return None
    return (opening, text[len(opening) : -len(closing)].strip(), closing) if depth == 0 else None


_MATRIX = re.compile(
    r"\\begin\s?\{([pbvBV]?matrix|array)\}(?:\{[lcr|]{1,20}\})?(.*)\\end\s?\{\1\}", re.DOTALL
)


def shape(text: str, depth: int = 0) -> Shape:
    """The shape of a clean text; of ((x)) that of x, to four brackets."""
    if (matrix := _MATRIX.fullmatch(text)) and "\\begin" not in matrix.group(2):
        rows = [row.strip() for row in re.split(r"\\\\(?:\[[^\]]{0,9}\])?", matrix.group(2))]
        rows = [row for row in rows if row]
        determinant = matrix.group(1) in ("vmatrix", "Vmatrix")
        if not determinant:
            return Shape("matrix", tuple(rows), text)
    parts, found = split(text, ("or", "and", ";"))
    if not found:
        parts, found = split(text, (",",))
        # "1, 2, and 3", "1, 2 or 3"
    elif len(parts) == 2 and set(found) <= {"or", "and"}:
        first, commas = split(parts[0].rstrip(", "), (",",))
        if commas:
            parts = [*first, parts[1]]
    if found and all(parts):
        return Shape("list", tuple(parts), text, joined=found[-1])
    parts, found = split(text, ("\\cup",))
    if found and all(parts):
        return Shape("union", tuple(parts), text)
    brackets = _bracketed(text)
    if brackets is not None:
        opening, inner, closing = brackets
        if opening == "\\{" and closing == "\\}":
            if not inner:
                return Shape("atom", text="\\emptyset")
            if split(inner, ("|",))[1] or "|" in inner or ":" in inner:
                return Shape("atom", text=text)
            return Shape("set", tuple(_items(inner)), text)
        items = _items(inner)
        if len(items) > 1 and all(items):
            return Shape("tuple", tuple(items), text, brackets=_mark(opening) + _mark(closing))
        if opening == "(" and closing == ")" and len(items) == 1:
            return shape(inner, depth + 1) if inner and depth < 4 else Shape("atom", text=text)
    if text.count("\\pm") == 1 and "\\mp" not in text and "=" not in text.partition("\\pm")[2]:
        both = (re.sub(r"\\pm\s?", lambda _, sign=sign: sign, text, count=1) for sign in "+-")
        ends = (re.sub(r"(^|=)\s?\+", r"\1", one) for one in both)
        return Shape("list", tuple(ends), text, joined="pm")
    return Shape("atom", text=text)


def _items(inner: str) -> list[str]:
    """What commas or semicolons separate within brackets, where no comma groups digits."""
    spaced = re.sub(r"(?<=\d),(?=\d)", ", ", inner)
    parts, found = split(spaced, (";",))
    return parts if found else split(spaced, (",",))[0]


def _mark(bracket: str) -> str:
    return {"\\langle": "<", "\\rangle": ">", "\\{": "{", "\\}": "}"}.get(bracket, bracket)
