"""Small functions whose printed source is exactly what runs: steps that simulation chains.

`source` reads it with `inspect`, so text and behaviour cannot part.
"""

import inspect
from collections.abc import Callable


def reverse(xs):
    return xs[::-1]


def rotate(xs):
    return xs[1:] + xs[:1]


def swap_pairs(xs):
    ys = list(xs)
    for i in range(0, len(ys) - 1, 2):
        ys[i], ys[i + 1] = ys[i + 1], ys[i]
    return ys


def running_sum(xs):
    total, ys = 0, []
    for x in xs:
        total += x
        ys.append(total)
    return ys


def gaps(xs):
    ys = [xs[0]]
    for i in range(1, len(xs)):
        ys.append(xs[i] - xs[i - 1])
    return ys


def negate(xs):
    return [-x for x in xs]


def double_plus_one(xs):
    return [2 * x + 1 for x in xs]


def add_index(xs):
    return [x + i for i, x in enumerate(xs)]


def evens_first(xs):
    return [x for x in xs if x % 2 == 0] + [x for x in xs if x % 2]


def clip(xs):
    return [min(max(x, -9), 9) for x in xs]


def squares(xs):
    return [x * x for x in xs]


def unique(xs):
    ys = []
    for x in xs:
        if x not in ys:
            ys.append(x)
    return ys


def order(xs):
    return sorted(xs)


def drop_smallest(xs):
    return [x for x in xs if x != min(xs)] or xs


# Each of these has exactly one input for every output of the same length (over the integers), so a
# chain of them has too.
INVERTIBLE: dict[str, Callable[[list[int]], list[int]]] = {
    f.__name__: f
    for f in (reverse, rotate, swap_pairs, running_sum, gaps, negate, double_plus_one, add_index)
}
STEPS: dict[str, Callable[[list[int]], list[int]]] = INVERTIBLE | {
    f.__name__: f for f in (evens_first, clip, squares, unique, order, drop_smallest)
}


def source(function: Callable) -> str:
    """The text of a function."""
    return inspect.getsource(function).rstrip()


def chain(names: list[str], xs: list[int]) -> list[int]:
    """The steps one after another."""
    for name in names:
        xs = STEPS[name](xs)
    return xs


def program(names: list[str]) -> str:
    """Source that defines the steps and `f(xs)`, which does them in their order."""
    call = "xs"
    for name in names:
        call = f"{name}({call})"
    parts = [source(STEPS[name]) for name in dict.fromkeys(names)]
    return "\n\n\n".join([*parts, f"def f(xs):\n    return {call}"])
