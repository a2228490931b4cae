"""Programming problems with tests, through stdin and stdout or as a function.

"codegen__generated": ground truth {"inputs": [...], "outputs": [...]} or {"functional": asserts},
as in Guru's files. Expected outputs are those of our reference solutions, run here.
"""

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any, Literal

from pr2jax.tasks.base import Problem
from pr2jax.tasks.generated import solutions
from pr2jax.tasks.generated.items import Generator, Item, Settings, respond
from pr2jax.tasks.generated.steps import source

_FENCE = "```python\n{}\n```"
_SIZE = {"easy": 6, "medium": 10, "hard": 16}
_CASES = 6
Rng = random.Random


@dataclasses.dataclass(frozen=True)
class _Family:
    """statement: what `solve` does with arguments of these names.

    draw: (rng, size) -> arguments; kinds: how each is read: "int", "ints", "text", "rows".
    """

    statement: str
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    draw: Callable[[Rng, int], tuple]


def _ints(rng: Rng, size: int, low: int = -20, high: int = 50) -> list[int]:
    return [rng.randint(low, high) for _ in range(rng.randint(2, size))]


def _text(rng: Rng, size: int, letters: str) -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randint(1, size)))


def _multiples(rng: Rng, size: int) -> tuple[list[int]]:
    common = rng.randint(1, 12)
    return ([common * x for x in _ints(rng, size, 1, 20)],)


def _palindrome(rng: Rng, size: int) -> tuple[str]:
    text = _text(rng, size, "abc")
    kind = rng.randrange(3)
    return (text + text[::-1] if kind == 0 else text + "b" + text[:1] if kind == 1 else text,)


def _square(rng: Rng, size: int) -> tuple[list[list[int]]]:
    n = rng.randint(2, max(2, size // 3))
    return ([[rng.randint(-9, 9) for _ in range(n)] for _ in range(n)],)


def _oblong(rng: Rng, size: int) -> tuple[list[list[int]]]:
    rows, columns = rng.randint(1, 4), rng.randint(1, max(2, size // 2))
    return ([[rng.randint(-9, 30) for _ in range(columns)] for _ in range(rows)],)


def _intervals(rng: Rng, size: int) -> tuple[list[list[int]]]:
    return ([sorted(rng.sample(range(6 * size), 2)) for _ in range(rng.randint(1, size))],)


def _edges(rng: Rng, size: int) -> tuple[int, list[list[int]]]:
    nodes = rng.randint(3, size)
    pairs = [[a, b] for a in range(1, nodes + 1) for b in range(a + 1, nodes + 1)]
    return nodes, rng.sample(pairs, rng.randint(1, min(len(pairs), nodes + 1)))


def _second(rng: Rng, size: int) -> tuple[list[int]]:
    numbers = [*_ints(rng, size), 51, 60]
    numbers += [60] * rng.randint(0, 2)
    rng.shuffle(numbers)
    return (numbers,)


_FAMILIES = {
    "sum_above": _Family(
        "the sum of those of the numbers that are greater than bound",
        ("numbers", "bound"),
        ("ints", "int"),
        lambda rng, size: ((xs := _ints(rng, size)), rng.choice(xs)),
    ),
    "second_largest": _Family(
        "the second largest of the distinct values among the numbers",
        ("numbers",),
        ("ints",),
        _second,
    ),
    "sort_by_last_digit": _Family(
        "the numbers (none negative) sorted by their last digit, equal last digits by value",
        ("numbers",),
        ("ints",),
        lambda rng, size: (_ints(rng, size, 0, 99),),
    ),
    "common_divisor": _Family(
        "the greatest common divisor of the positive numbers",
        ("numbers",),
        ("ints",),
        _multiples,
    ),
    "count_primes": _Family(
        "how many primes there are from low to high, both included",
        ("low", "high"),
        ("int", "int"),
        lambda rng, size: ((low := rng.randint(0, 40)), low + rng.randint(0, 20 * size)),
    ),
    "count_vowels": _Family(
        "how many letters of the text are vowels (a, e, i, o, u)",
        ("text",),
        ("text",),
        lambda rng, size: (_text(rng, 3 * size, "aeioubcdfg"),),
    ),
    "is_palindrome": _Family(
        "whether the text reads the same backwards",
        ("text",),
        ("text",),
        _palindrome,
    ),
    "run_lengths": _Family(
        "the text with each run of equal letters written as the letter and the run's length "
        "(aab becomes a2b1)",
        ("text",),
        ("text",),
        lambda rng, size: (_text(rng, 2 * size, "abc"),),
    ),
    "row_sums": _Family("the sum of each row of the matrix", ("matrix",), ("rows",), _oblong),
    "trace_of_square": _Family(
        "the trace (sum of the diagonal) of the square matrix multiplied by itself",
        ("matrix",),
        ("rows",),
        _square,
    ),
    "covered_length": _Family(
        "the length of the number line that the intervals (rows of start and end) cover together",
        ("intervals",),
        ("rows",),
        _intervals,
    ),
    "distance": _Family(
        "the least number of edges (rows of two nodes, usable both ways) from node 1 to node "
        "`nodes`, or -1 where there is no way; nodes are numbered from 1",
        ("nodes", "edges"),
        ("int", "rows"),
        _edges,
    ),
    "components": _Family(
        "the number of connected components of the graph of the given number of nodes, numbered "
        "from 1, and undirected edges (rows of two nodes)",
        ("nodes", "edges"),
        ("int", "rows"),
        _edges,
    ),
    "fewest_coins": _Family(
        "the least number of coins that add up to amount, each value usable any number of times, "
        "or -1 where they cannot",
        ("coins", "amount"),
        ("ints", "int"),
        lambda rng, size: (rng.sample(range(2, 12), 3), rng.randint(1, 8 * size)),
    ),
    "longest_rise": _Family(
        "the length of the longest strictly increasing subsequence (not necessarily contiguous)",
        ("numbers",),
        ("ints",),
        lambda rng, size: (_ints(rng, size),),
    ),
    "best_stretch": _Family(
        "the largest sum of a contiguous, non-empty stretch of the numbers",
        ("numbers",),
        ("ints",),
        lambda rng, size: (_ints(rng, size, -20, 20),),
    ),
}
_EASY = (
    *("sum_above", "second_largest", "sort_by_last_digit", "common_divisor", "count_vowels"),
    *("is_palindrome", "row_sums", "best_stretch"),
)
_READERS = {
    "int": "{name} = int(input())",
    "ints": "{name} = list(map(int, input().split()))",
    "text": "{name} = input()",
    "rows": "{name} = [list(map(int, input().split())) for _ in range(int(input()))]",
}
_FORMATS = {
    "int": "an integer",
    "ints": "integers with spaces between",
    "text": "a text",
    "rows": "the number of rows, then each row as integers with spaces between",
}


def _input_text(kinds: tuple[str, ...], arguments: tuple) -> str:
    lines = []
    for kind, value in zip(kinds, arguments, strict=True):
        if kind == "rows":
            lines += [str(len(value)), *(" ".join(map(str, row)) for row in value)]
        else:
            lines.append(" ".join(map(str, value)) if kind == "ints" else str(value))
    return "\n".join(lines) + "\n"


def _output_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes\n" if value else "no\n"
    return (" ".join(map(str, value)) if isinstance(value, list) else str(value)) + "\n"


def _program(family: str, io: str, *, right: bool = True) -> str:
    """Source of a whole solution (or of the wrong one) of a family."""
    function = getattr(solutions, family if right else f"{family}_wrong")
    text = source(function).replace(f"def {function.__name__}(", "def solve(", 1)
    if io == "function":
        return text
    chosen = _FAMILIES[family]
    readers = [
        _READERS[kind].format(name=name)
        for name, kind in zip(chosen.names, chosen.kinds, strict=True)
    ]
    show = (
        f"value = solve({', '.join(chosen.names)})\n"
        "if isinstance(value, bool):\n"
        '    print("yes" if value else "no")\n'
        "elif isinstance(value, list):\n"
        "    print(*value)\n"
        "else:\n"
        "    print(value)"
    )
    return "\n".join([text, "\n", *readers, show])


def _cases(rng: Rng, family: str, size: int) -> list[tuple]:
    """Arguments of the tests; at least one tells the wrong solution from the right one."""
    right, wrong = getattr(solutions, family), getattr(solutions, f"{family}_wrong")
    cases: list[tuple] = []
    while len(cases) < _CASES - 1:
        cases.append(_FAMILIES[family].draw(rng, size))
    while True:
        cases.append(_FAMILIES[family].draw(rng, size))
        if any(_output_text(right(*c)) != _output_text(wrong(*c)) for c in cases):
            return cases


def _statement(family: str, io: str, example: tuple, result: Any) -> str:
    chosen = _FAMILIES[family]
    if io == "function":
        call = f"solve({', '.join(map(repr, example))})"
        return (
            f"Write a Python function solve({', '.join(chosen.names)}) that returns "
            f"{chosen.statement}.\nExample: {call} returns {result!r}."
        )
    formats = "; ".join(
        f"{name}: {_FORMATS[kind]}" for name, kind in zip(chosen.names, chosen.kinds, strict=True)
    )
    yes = " Print yes or no." if isinstance(result, bool) else ""
    several = " Print them with spaces between." if isinstance(result, list) else ""
    return (
        f"Write a Python program that prints {chosen.statement}.{yes}{several}\n"
        f"Input, each on a line of its own: {formats}.\n"
        f"Example input:\n{_input_text(chosen.kinds, example)}"
        f"Example output:\n{_output_text(result)}"
    ).rstrip()


@dataclasses.dataclass(frozen=True)
class ProgramSettings(Settings):
    """io: programs read stdin and write stdout, or are a function; "both" draws one."""

    io: Literal["stdio", "function", "both"] = "both"


def _item(
    question: str, truth: dict, program: str, meta: dict[str, Any], settings: Settings
) -> Item:
    return Item(
        question=question,
        truth=json.dumps(truth),
        value=program,
        wrap=_FENCE,
        ask="Put the program in a ```python fence.",
        data_source="codegen__generated",
        # Without a fence the whole response is the program.
        meta=meta | ({"bare_code": True} if settings.form == "bare" else {}),
    )


def _make(rng: Rng, settings: ProgramSettings) -> Item:
    io = rng.choice(("stdio", "function")) if settings.io == "both" else settings.io
    if settings.level == "tiny":
        return _tiny(rng, settings, io)
    family = settings.choose(rng, _EASY if settings.level == "easy" else tuple(_FAMILIES))
    function, chosen = getattr(solutions, family), _FAMILIES[family]
    cases = _cases(rng, family, _SIZE[settings.level])
    results = [function(*case) for case in cases]
    if io == "function":
        asserts = [
            f"assert solve({', '.join(map(repr, case))}) == {result!r}"
            for case, result in zip(cases, results, strict=True)
        ]
        truth = {"functional": "\n".join(asserts)}
    else:
        truth = {
            "inputs": [_input_text(chosen.kinds, case) for case in cases],
            "outputs": [_output_text(result) for result in results],
        }
    meta = {"family": family, "io": io, "wrong": _program(family, io, right=False)}
    if io == "function":
        meta["entry_point"] = "solve"
    question = _statement(family, io, cases[0], results[0])
    return _item(question, truth, _program(family, io), meta, settings)


# For small models: one expression of n, printed or as a function. (words, expression, function)
_TINY: dict[str, Callable[[int, int], tuple[str, str, Callable[[int], int]]]] = {
    "add": lambda a, b: (f"add {a}", f"n+{a}", lambda n: n + a),
    "subtract": lambda a, b: (f"subtract {a}", f"n-{a}", lambda n: n - a),
    "times": lambda a, b: (f"times {a}", f"n*{a}", lambda n: n * a),
    "times_add": lambda a, b: (f"times {b}, add {a}", f"n*{b}+{a}", lambda n: n * b + a),
    "times_subtract": lambda a, b: (f"times {b}, subtract {a}", f"n*{b}-{a}", lambda n: n * b - a),
}


def _tiny(rng: Rng, settings: ProgramSettings, io: str) -> Item:
    family = settings.choose(rng, tuple(_TINY))
    a, b = rng.randint(1, 99), rng.randint(2, 9)
    words, expression, function = _TINY[family](a, b)
    inputs = rng.sample(range(-50, 100), _CASES)
    if io == "function":
        asserts = [f"assert f({n}) == {function(n)}" for n in inputs]
        truth = {"functional": "\n".join(asserts)}
        meta = {"entry_point": "f"}
        asked, program = f"f(n): {words}", f"f=lambda n:{expression}"
        wrong = f"{program}+1"
    else:
        truth = {
            "inputs": [f"{n}\n" for n in inputs],
            "outputs": [f"{function(n)}\n" for n in inputs],
        }
        meta = {"prefix": "n=int(input())\n"}
        asked, program = f"print n: {words}", f"print({expression})"
        wrong = f"print({expression}+1)"
    # `wrong` is one off at every input.
    meta |= {"family": family, "io": io, "wrong": wrong}
    return _item(asked, truth, program, meta, settings)


def _wrong(problem: Problem, rng: Rng) -> tuple[str, float]:
    """The wrong solution, which fails at least one of the tests (see `_cases`), or none at all."""
    return respond(problem, problem.meta["wrong"]), 0.0


GENERATORS = {"programs": Generator("code", _make, _wrong, ProgramSettings)}
