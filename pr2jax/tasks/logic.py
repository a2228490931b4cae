"""Logic: zebra puzzles by cell, orderings, words on graphs, and ARC grids, as Guru has them.

Answers stand in <answer>...</answer> after </think>. Ground truths are `Problem.answer`: JSON (or
a Python literal) of {"header": [...], "rows": [[...], ...]}, of a list of names, or of a grid; a
word for graphs.
"""

import re
from typing import Any

from pr2jax.tasks import answers
from pr2jax.tasks.base import Problem, Verdict, credit, explain, normalise

NO_ANSWER = "no answer in the expected form"
_MAX_CELLS = 10_000  # of an answer's table or grid; the largest ARC grid has 900


def _truth(problem: Problem) -> Any:
    """The ground truth as data. Raises ValueError naming the problem."""
    good, value = answers.data(problem.answer)
    if not good:
        raise ValueError(f"ground truth of {problem.id} is no JSON: {problem.answer[:80]!r}")
    return value


def _cell(value: Any) -> str:
    return normalise(str(value))


def _table(value: Any) -> tuple[list[str] | None, list[list[str]]] | None:
    """(header or None, rows) of text cells in lower case; None where `value` is no table."""
    header = None
    if isinstance(value, dict):
        header, value = value.get("header"), value.get("rows")
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        return None
    if sum(map(len, value)) > _MAX_CELLS:
        return None
    header = [_cell(name) for name in header] if isinstance(header, list) else None
    return header, [[_cell(cell) for cell in row] for row in value]


def _in_order(header: list[str], answer: tuple[list[str] | None, list[list[str]]]) -> list:
    """The answer's rows with columns in the order of `header`, if its own is a permutation."""
    names, rows = answer
    if names is None or names == header or sorted(names) != sorted(header):
        return rows
    if len(set(header)) != len(header):
        return rows
    order = [names.index(name) for name in header]
    return [[row[i] if i < len(row) else "" for i in order] for row in rows]


def verify_zebra(problem: Problem, response: str) -> Verdict:
    """The share of right cells, case and spacing aside; surplus rows and columns count as wrong.

    Raises ValueError where the ground truth is no table.
    """
    truth = _table(_truth(problem))
    if truth is None or truth[0] is None or not truth[1]:
        raise ValueError(f"ground truth of {problem.id} is no table with a header")
    header, want = truth
    found = answers.stated(problem, response, ("tag",))
    if found is None:
        return Verdict(0.0, NO_ANSWER)
    good, value = answers.data(found)
    given = _table(value) if good else None
    if given is None:
        return Verdict(0.0, "the answer is no table with rows")
    rows = _in_order(header, given)
    right = sum(
        a == b
        for row, other in zip(want, rows, strict=False)
        for a, b in zip(row, other, strict=False)
    )
    height = max(len(want), len(rows))
    width = max(len(header), *map(len, rows), *map(len, want), 1)
    share = credit(problem, right / (height * width))
    return Verdict(share, "" if share == 1.0 else f"{right} of {height * width} cells are right")


def _names(value: Any) -> list[str] | None:
    if isinstance(value, list | tuple) and all(isinstance(v, str | int | float) for v in value):
        return [_cell(v) for v in value]
    return None


def verify_ordering(problem: Problem, response: str) -> Verdict:
    """1 for exactly the list of the ground truth, case and spacing aside.

    The names need no quotes. Raises ValueError where the ground truth is no list.
    """
    want = _names(_truth(problem))
    if not want:
        raise ValueError(f"ground truth of {problem.id} is no list of names")
    found = answers.stated(problem, response, ("tag",))
    if found is None:
        return Verdict(0.0, NO_ANSWER)
    good, value = answers.data(found)
    given = _names(value) if good else None
    if given is None:
        inner = found.strip()
        if inner.startswith("[") and inner.endswith("]"):
            inner = inner[1:-1]
        given = [_cell(part.strip().strip("'\"")) for part in inner.split(",")]
    return Verdict(1.0) if given == want else Verdict(0.0, explain(0.0, found, response))


def verify_word(problem: Problem, response: str) -> Verdict:
    """1 for the word of the ground truth, case, spacing and quotes aside."""
    found = answers.stated(problem, response, ("tag",))
    if found is None:
        return Verdict(0.0, NO_ANSWER)
    word = _cell(found.strip().rstrip(".").strip("'\"`"))
    if word and word == _cell(problem.answer):
        return Verdict(1.0)
    return Verdict(0.0, explain(0.0, found, response))


def grid_of(value: Any) -> list[list[int]] | None:
    """A rectangular grid of ints, None where `value` is none."""
    if not isinstance(value, list | tuple) or not value:
        return None
    rows = [list(row) for row in value if isinstance(row, list | tuple)]
    if len(rows) != len(value) or not rows[0] or sum(map(len, rows)) > _MAX_CELLS:
        return None
    if any(len(row) != len(rows[0]) for row in rows):
        return None
    return rows if all(type(cell) is int for row in rows for cell in row) else None


_ROW = re.compile(r"[\d\s,]+")


def read_grid(text: str) -> list[list[int]] | None:
    """A grid out of text: [[0, 1], [2, 3]], or a line of ints for each row; else None."""
    text = text.strip()
    start, end = text.find("["), text.rfind("]")
    if 0 <= start < end:
        good, value = answers.data(text[start : end + 1])
        if good:
            return grid_of(value)
    if len(text) > answers.LITERAL_LIMIT:
        return None
    rows = []
    for line in text.splitlines():
        line = line.replace("[", " ").replace("]", " ").strip().rstrip(",")
        if not line:
            continue
        if not _ROW.fullmatch(line):
            return None
        cells = line.replace(",", " ").split()
        if any(len(cell) > 9 for cell in cells):
            return None
        rows.append([int(cell) for cell in cells])
    return grid_of(rows)


def verify_grid(problem: Problem, response: str) -> Verdict:
    """1 for exactly the grid of the ground truth, given in <answer> or else the last fence.

    Raises ValueError where the ground truth is no grid.
    """
    want = read_grid(problem.answer)
    if want is None:
        raise ValueError(f"ground truth of {problem.id} is no grid of whole numbers")
    found = answers.stated(problem, response, ("tag",))
    if found is None:
        found = answers.last_code(response)
    if found is None:
        return Verdict(0.0, NO_ANSWER)
    given = read_grid(found)
    if given is None:
        return Verdict(0.0, "the answer is no rectangular grid of whole numbers")
    if given == want:
        return Verdict(1.0)
    shapes = f"{len(given)} x {len(given[0])} for {len(want)} x {len(want[0])}"
    if (len(given), len(given[0])) != (len(want), len(want[0])):
        return Verdict(0.0, f"wrong: a grid of {shapes}")
    wrong = sum(a != b for g, w in zip(given, want, strict=True) for a, b in zip(g, w, strict=True))
    return Verdict(0.0, f"wrong: {wrong} cells differ")
