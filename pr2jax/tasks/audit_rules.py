"""Rules of puzzles that have many solutions: does another problem's answer happen to solve it?

Written from the rules in the questions, independently of reasoning-gym's verifiers, which are what
is audited.
"""

import json
from collections.abc import Callable
from typing import Any

from pr2jax.tasks.base import Problem

_MOVES = {"R": (0, 1), "L": (0, -1), "U": (-1, 0), "D": (1, 0)}


def also_right(problem: Problem, answer: str) -> bool:
    """Whether `answer` solves the problem by the rules; False where one answer alone is right."""
    rules = _RULES.get(problem.data_source.removeprefix("reasoning_gym/"))
    return rules is not None and rules(problem.meta["entry"]["metadata"], answer)


def jugs(metadata: dict[str, Any], answer: str) -> bool:
    """Whether after these moves of water a jug holds the target."""
    puzzle = metadata["puzzle"]
    capacity = dict(zip("ABCDEFGHIJ", puzzle["jug_capacities"], strict=False))
    held = dict.fromkeys(capacity, 0)
    for move in json.loads(answer):
        kind, jugs_named = move.split()
        if kind == "pour":
            source, goal = jugs_named.split("->")
        else:
            source = goal = jugs_named
        if not {source, goal} <= capacity.keys():
            return False
        if kind == "fill":
            held[source] = capacity[source]
        elif kind == "empty":
            held[source] = 0
        else:
            poured = min(held[source], capacity[goal] - held[goal])
            held[source] -= poured
            held[goal] += poured
    return puzzle["target"] in held.values()


def sokoban(metadata: dict[str, Any], answer: str) -> bool:
    """Whether every box stands on a goal after these steps; one that is blocked does nothing."""
    rows = [line.split() for line in metadata["gamestr"].strip().splitlines()]
    at = {(i, j): mark for i, row in enumerate(rows) for j, mark in enumerate(row)}
    goals = {place for place, mark in at.items() if mark in "X%$"}
    boxes = {place for place, mark in at.items() if mark in "@$"}
    (here,) = (place for place, mark in at.items() if mark in "*%")
    for step in answer:
        down, right = _MOVES[step]
        there = here[0] + down, here[1] + right
        beyond = there[0] + down, there[1] + right
        if at[there] == "+" or (there in boxes and (at[beyond] == "+" or beyond in boxes)):
            continue
        if there in boxes:
            boxes = boxes - {there} | {beyond}
        here = there
    return boxes <= goals


def queens(metadata: dict[str, Any], answer: str) -> bool:
    """Whether no two queens attack each other, one stands in each row, and those given stand."""
    board = [line.split() for line in answer.splitlines()]
    places = [(i, j) for i, row in enumerate(board) for j, cell in enumerate(row) if cell == "Q"]
    given = {
        (i, j)
        for i, row in enumerate(metadata["puzzle"])
        for j, cell in enumerate(row)
        if cell == "Q"
    }
    lines = [
        {i for i, _ in places},
        {j for _, j in places},
        {i + j for i, j in places},
        {i - j for i, j in places},
    ]
    size = len(metadata["puzzle"])
    return given <= set(places) and len(places) == size and all(len(x) == size for x in lines)


_RULES: dict[str, Callable[[dict[str, Any], str], bool]] = {
    "jugs": jugs,
    "n_queens": queens,
    "sokoban": sokoban,
}
