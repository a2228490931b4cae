r"""Where the answer stands in a response: boxes, tags, fences, JSON, letters, literals.

Every function here takes time linear in the text, whatever the text (responses are written by a
policy under optimisation), and looks at its last WINDOW characters only. None returns a guess:
what is not there, or was cut off, is None. Numbers are read by `quantities.py`.
"""

import ast
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pr2jax.tasks.base import Problem, extract_response

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
WINDOW = 200_000  # characters at the end of a response in which its answer must stand
JSON_LIMIT = 1_000_000  # characters: longer texts are not parsed as JSON
LITERAL_LIMIT = 20_000  # characters: longer texts are not parsed as Python literals
_BOX_TOKEN = re.compile(r"\\\\?(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BOX_START = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACES = re.compile(r"[{}]")
_SPANS = 8  # the last so many {...} of a text are tried as JSON
_INFO = re.compile(r"([\w+#.-]{0,40})[ \t\r]{0,40}(\n?)")


class Fence(NamedTuple):
    """A code block: what follows the opening backticks on their line, and the body."""

    language: str
    body: str


def after_think(text: str) -> str | None:
    """What follows the last </think>; the whole text where nothing was thought.

    None where a <think> is never closed: the output was cut off before any answer. Of longer
    texts the last WINDOW characters.
    """
    end = text.rfind(THINK_CLOSE)
    if text.rfind(THINK_OPEN) > end:
        return None
    start = 0 if end < 0 else end + len(THINK_CLOSE)
    return text[max(start, len(text) - WINDOW) :]


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{...} (or \fbox) after </think>, or None.

    Nested braces are content, an escaped brace (\{) does not nest, and of a box in a box the
    inner one counts. A box that is never closed was cut off, and the one before it counts.
    """
    answer = after_think(text)
    if answer is None:
        return None
    first = _BOX_START.search(answer)
    if first is None:
        return None
    best: tuple[int, int] | None = None
    stack: list[int] = []  # content start of a box, -1 for any other brace
    for token in _BOX_TOKEN.finditer(answer, max(first.start() - 1, 0)):
        mark = token.group()
        if mark == "}":
            start = stack.pop() if stack else -1
            if start >= 0 and (best is None or start > best[0]):
                best = start, token.start()
        elif mark == "{":
            stack.append(-1)
        elif mark[-1] == "{" and len(mark) > 2:
            stack.append(token.end())
    return None if best is None else answer[best[0] : best[1]]


def between(text: str, opening: str, closing: str) -> str | None:
    """What the last complete `opening`...`closing` after </think> holds, stripped, or None."""
    answer = after_think(text)
    if answer is None:
        return None
    end = answer.rfind(closing)
    start = answer.rfind(opening, 0, end) if end >= 0 else -1
    return None if start < 0 else answer[start + len(opening) : end].strip()


def answer_tag(text: str) -> str | None:
    """Content of the last complete <answer>...</answer> after </think>, or None."""
    return between(text, "<answer>", "</answer>")


def answer_block(text: str) -> str | None:
    """Content of the last complete [ANSWER]...[/ANSWER] after </think> (CruxEval), or None."""
    return between(text, "[ANSWER]", "[/ANSWER]")


def fences(text: str) -> list[Fence]:
    """The complete ``` blocks after </think>, in order; one that is never closed is left out."""
    answer = after_think(text)
    if answer is None:
        return []
    found, at, last_line = [], 0, answer.rfind("\n```")
    while (start := answer.find("```", at)) >= 0:
        info = _INFO.match(answer, start + 3)
        language, body = info.group(1), info.end()
        # Something may follow on the opening line: ```json {"a": 1}``` or ```{"a": 1}```.
        if not info.group(2) and info.end() == info.end(1):
            language, body = "", start + 3
        # A closing fence begins a line; one in a line closes only where there is none.
        end = answer.find("\n```", body - 1) if last_line >= body - 1 else -1
        if end < 0:
            end = answer.find("```", body)
        if end < 0:
            break
        found.append(Fence(language.lower(), answer[body:end]))
        at = answer.find("```", end) + 3
    return found


def last_code(text: str, languages: Sequence[str] = ()) -> str | None:
    """Body of the last block whose language is among `languages`, else of the last block.

    None where there is no complete block.
    """
    blocks = fences(text)
    named = [block for block in blocks if block.language in languages]
    return (named or blocks)[-1].body if blocks else None


def parse_json(text: str) -> tuple[bool, Any]:
    """(True, value) of a JSON text, (False, None) where it is none, too long or too deep.

    NaN and the infinities are no JSON here.
    """
    if len(text) > JSON_LIMIT:
        return False, None
    try:
        return True, json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False, None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def last_json(text: str) -> dict[str, Any] | None:
    """The last complete JSON object in free text after </think>, or None.

    Objects are found by their braces, outermost first.
    """
    answer = after_think(text)
    if answer is None:
        return None
    spans: list[tuple[int, int]] = []
    starts: list[int] = []
    for brace in _BRACES.finditer(answer):
        if brace.group() == "{":
            starts.append(brace.start())
        elif starts:
            start = starts.pop()
            # An outer object replaces those within it.
            while spans and spans[-1][0] > start:
                spans.pop()
            spans.append((start, brace.end()))
    for start, end in reversed(spans[-_SPANS:]):
        good, value = parse_json(answer[start:end])
        if good and isinstance(value, dict):
            return value
    return None


def json_answer(text: str) -> tuple[bool, Any]:
    r"""(True, value) of the JSON that a response gives as its answer, else (False, None).

    Looked for in the last ```json fence, the last fence of another kind, the last \boxed{}, and
    the last complete object in the text; a body without its outer braces counts too.
    """
    blocks = fences(text)
    named = [b.body for b in blocks if b.language in ("json", "json5", "jsonc")]
    places = (named or [b.body for b in blocks])[-1:]
    boxed = last_boxed(text)
    if boxed is not None:
        places.append(boxed.replace("\\{", "{").replace("\\}", "}"))
        places.append(boxed)
    for place in places:
        for body in (place.strip(), "{" + place.strip().rstrip(",") + "}"):
            good, value = parse_json(body)
            if good:
                return True, value
    found = last_json(text)
    return found is not None, found


def literal(text: str) -> tuple[bool, Any]:
    """(True, value) of a Python literal (`ast.literal_eval`), (False, None) where it is none.

    Nothing is executed; texts beyond LITERAL_LIMIT are refused.
    """
    if len(text) > LITERAL_LIMIT:
        return False, None
    try:
        return True, ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False, None


def data(text: str) -> tuple[bool, Any]:
    """(True, value) of a text that is JSON or a Python literal, else (False, None)."""
    good, value = parse_json(text)
    return (good, value) if good else literal(text)


_LETTER = r"([A-Za-z])"
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textrm|mathsf|rm|bf)\s*\{([^{}]*)\}")
# A letter alone, or in brackets, perhaps with its option after it: A, (A), A., A) five, A: five
_ALONE = re.compile(rf"[(\[]?\s*{_LETTER}\s*[)\]]?\s*[.:]?")
_WITH_OPTION = re.compile(rf"(?:[(\[]\s*{_LETTER}\s*[)\]]|{_LETTER}\s*[).:])\s*\S.*", re.DOTALL)
_SAID = re.compile(r"(?:[Aa]nswer|ANSWER)(?: is|:)[ :*]{0,4}[(\[]?([A-Z])(?![\w'])")
_OPTION_WORD = re.compile(r"(?:option|choice|answer)\s{0,9}:?\s{0,9}", re.IGNORECASE)


def letter_of(text: str, letters: str = "ABCDEFGHIJ") -> str | None:
    r"""The choice letter that a short answer is: A, (A), \text{A}, "A) five", Option A.

    None where it is none of `letters`, or more than one ("A or B"). Never a guess.
    """
    text = text[:2000]
    for _ in range(3):
        text, changed = _WRAPPED.subn(r"\1", text)
        if not changed:
            break
    text = text.replace("$", "").replace("*", "").replace("\\", " ").strip()
    text = _OPTION_WORD.sub("", text, count=1) if _OPTION_WORD.match(text) else text
    match = _ALONE.fullmatch(text)
    if match is None:
        match = _WITH_OPTION.fullmatch(text)
        # "A) five B) six" names two.
        if match and len(re.findall(r"(?<!\w)[A-Z]\s*[).:]", text)) > 1:
            return None
    if match is None:
        return None
    found = next(group for group in match.groups() if group).upper()
    return found if found in letters else None


def choice_letter(text: str, letters: str = "ABCDEFGHIJ") -> str | None:
    r"""The choice letter that a response settles on, or None.

    Read from the last \boxed{}, else from <answer>...</answer>, else from the last
    "answer is A" or "Answer: A" after </think>. What is boxed and is no letter is no answer.
    """
    for content in (last_boxed(text), answer_tag(text)):
        if content is not None:
            return letter_of(content, letters)
    answer = after_think(text)
    if answer is None:
        return None
    said = None
    for said in _SAID.finditer(answer):  # noqa: B007 (the last one)
        pass
    if said is None:
        return letter_of(answer.strip(), letters) if len(answer.strip()) < 100 else None
    found = said.group(1)
    return found if found in letters else None


def short_answer(text: str, places: Iterable[str] = ("boxed", "tag")) -> str | None:
    r"""The answer in the first of `places` that a response has: "boxed", "tag"; None in none."""
    for place in places:
        found = last_boxed(text) if place == "boxed" else answer_tag(text)
        if found is not None:
            return found.strip()
    return None


def stated(problem: Problem, response: str, places: Iterable[str] = ("boxed", "tag")) -> str | None:
    """The answer by the problem's own `response_regex` where it has one, else `short_answer`.

    Under a `response_regex` only what follows </think> counts too.
    """
    if not problem.meta.get("response_regex"):
        return short_answer(response, places)
    answer = after_think(response)
    return None if answer is None else extract_response(problem, answer)
