"""Run a program in the head: outputs of inputs, and inputs of outputs.

"simulation__codeio_generated" after CodeI/O (arXiv 2502.07316), with answers in JSON, and
"simulation__cruxeval_generated" after CRUXEval (arXiv 2401.03065), with Python literals.
"""

import json
import random

from pr2jax.tasks.base import Problem
from pr2jax.tasks.generated import steps
from pr2jax.tasks.generated.items import Generator, Item, Settings, respond

_LENGTHS = {"easy": 1, "medium": 2, "hard": 4}


def _affine(rng: random.Random) -> tuple[str, int, int]:
    """Source of a one-to-one f(n), an input and its output."""
    a, b, n = rng.randint(1, 9), rng.randint(0, 20), rng.randint(1, 9)
    sign = rng.choice((1, -1))
    code = f"def f(n):return n*{a}{'+' if sign > 0 else '-'}{b}"
    return code, n, n * a + sign * b


def _list_program(rng: random.Random, level: str, direction: str) -> tuple[str, list, list]:
    """Source of f(xs), an input and its output; inputs are unique where they are asked for."""
    known = steps.INVERTIBLE if direction == "input" else steps.STEPS
    names = [rng.choice(list(known)) for _ in range(_LENGTHS[level])]
    size = rng.randint(3, 3 + 2 * _LENGTHS[level])
    xs = [rng.randint(-9, 20) for _ in range(size)]
    return steps.program(names), xs, steps.chain(names, xs)


def _drawn(rng: random.Random, settings: Settings) -> tuple[str, str, object, object]:
    """(direction, source, input, output)."""
    direction = settings.choose(rng, ("output", "input"))
    if settings.level == "tiny":
        return (direction, *_affine(rng))
    return (direction, *_list_program(rng, settings.level, direction))


def _argument(code: str) -> str:
    return "n" if code.startswith("def f(n)") else "xs"


def _codeio(rng: random.Random, settings: Settings) -> Item:
    direction, code, given, result = _drawn(rng, settings)
    name = _argument(code)
    held = {name: given} if direction == "input" else result
    if settings.level == "tiny":
        known = f"f({given})?" if direction == "output" else f"f(n)={result} n?"
        question = f"{code}\n{known}"
    elif direction == "output":
        question = f"Given this program:\n\n{code}\n\nWhat does f return for {name} = {given}?"
    else:
        question = (
            f"Given this program:\n\n{code}\n\nFor which list of integers {name} does f return "
            f"{result}?"
        )
    shape = '{"output": ...}' if direction == "output" else f'{{"input": {{"{name}": ...}}}}'
    compact = (",", ":") if settings.level == "tiny" else (", ", ": ")
    return Item(
        question,
        truth=f'"{direction}": {json.dumps(held)}',
        value=json.dumps({direction: held}, separators=compact),
        wrap="```json\n{}\n```",
        ask=f"Give the answer as JSON in a ```json fence, in the form {shape}.",
        data_source="simulation__codeio_generated",
        meta={"family": direction, "argument": name, "input": given, "output": result},
    )


def _cruxeval(rng: random.Random, settings: Settings) -> Item:
    direction, code, given, result = _drawn(rng, settings)
    if settings.level == "tiny":
        question = f"{code}\n" + (
            f"assert f({given})==?" if direction == "output" else f"assert f(?)=={result}"
        )
    elif direction == "output":
        question = f"{code}\n\nassert f({given!r}) == ??\n\nWhat stands for ??"
    else:
        question = f"{code}\n\nassert f(??) == {result!r}\n\nWhich literal stands for ??"
    value = repr(result if direction == "output" else given)
    return Item(
        question,
        truth=value,
        value=value,
        wrap="[ANSWER]{}[/ANSWER]",
        ask="Put it, a Python literal, between [ANSWER] and [/ANSWER].",
        data_source="simulation__cruxeval_generated",
        meta={
            "family": direction,
            "code": code,
            "input": repr(given),
            "output": repr(result),
        },
    )


def _other(value: object, rng: random.Random) -> object:
    """Another number, or a list with one element changed or left out."""
    if isinstance(value, list):
        other = list(value)
        if len(other) > 1 and rng.random() < 0.3:
            other.pop()
            return other
        if not other:
            return [0]
        other[rng.randrange(len(other))] += rng.choice((-1, 1))
        return other
    return value + rng.choice((-1, 1)) * rng.randint(1, 9)


def _codeio_wrong(problem: Problem, rng: random.Random) -> tuple[str, float]:
    """Another output; or another input, which gives another output, as f is one-to-one."""
    direction = problem.meta["family"]
    held = _other(problem.meta[direction], rng)
    if direction == "input":
        held = {problem.meta["argument"]: held}
    return respond(problem, json.dumps({direction: held})), 0.0


def _cruxeval_wrong(problem: Problem, rng: random.Random) -> tuple[str, float]:
    """As for CodeI/O."""
    return respond(problem, repr(_other(json.loads(problem.answer), rng))), 0.0


GENERATORS = {
    "codeio": Generator("simulation", _codeio, _codeio_wrong),
    "cruxeval": Generator("simulation", _cruxeval, _cruxeval_wrong),
}
