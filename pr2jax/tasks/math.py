r"""Math answers: the last \boxed{} after </think>, compared symbolically by `math-verify`.

math-verify limits its own time by signals, which work in a process's main thread only: score
through a VerifierPool.
"""

from pr2jax.tasks.base import Problem, Verdict, explain, extract_response

_BOXES = ("\\boxed", "\\fbox")


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{...} of `text`, nested braces included, or None.

    Only what follows the last </think> counts. An escaped brace (\{) does not nest.
    """
    text = text.rpartition("</think>")[2]
    end = len(text)
    while True:
        start = max(text.rfind(box, 0, end) for box in _BOXES)
        if start < 0:
            return None
        content = _braced(text, start)
        if content is not None:
            return content
        end = start


def _braced(text: str, start: int) -> str | None:
    """What stands between the brace that opens after the command at `start` and its partner."""
    i = start + len("\\boxed" if text.startswith("\\boxed", start) else "\\fbox")
    while i < len(text) and text[i].isspace():
        i += 1
    if i == len(text) or text[i] != "{":
        return None
    depth, first = 0, i + 1
    while i < len(text):
        if text[i] == "\\":
            i += 2
            continue
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[first:i]
        i += 1
    return None


def verify(problem: Problem, response: str) -> Verdict:
    """1 if the boxed answer equals the reference symbolically, else 0 with the reason.

    Raises ValueError where the reference itself cannot be parsed: no response could be right.
    """
    from math_verify import parse
    from math_verify import verify as equal

    if problem.meta.get("response_regex"):
        answer = extract_response(problem, response)
    else:
        answer = last_boxed(response)
    if answer is None:
        return Verdict(0.0, "no answer in the expected form")
    reference = parse(f"\\boxed{{{last_boxed(problem.answer) or problem.answer}}}")
    if not reference:
        raise ValueError(f"reference answer of {problem.id} cannot be read: {problem.answer!r}")
    given = parse(f"\\boxed{{{answer}}}")
    if not given:
        return Verdict(0.0, f"answer {answer[:80]!r} cannot be read")
    if equal(reference, given):
        return Verdict(1.0)
    return Verdict(0.0, explain(0.0, answer, response))
