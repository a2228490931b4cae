"""Zebra, ordering and graph puzzles in Guru's shapes, each with one solution.

"logic__zebra_puzzle_generated", "logic__ordering_puzzle_generated" and
"logic__graph_logical_generated".
"""

import dataclasses
import functools
import itertools
import json
import random

from pr2jax.tasks.base import Problem
from pr2jax.tasks.generated.items import Generator, Item, Settings, respond

_ANSWER = "<answer>{}</answer>"

# --- Zebra -------------------------------------------------------------------------------------

_ATTRIBUTES = {
    "Name": ("Ann", "Bob", "Cleo", "Dan"),
    "Colour": ("red", "blue", "green", "white"),
    "Pet": ("cat", "dog", "fish", "horse"),
    "Drink": ("tea", "milk", "water", "juice"),
}
# (houses, attributes): at most 4!**3 = 13,824 arrangements to go through.
_SIZES = {"tiny": ((2, 2),), "easy": ((3, 2),), "medium": ((3, 3), (4, 2)), "hard": ((4, 3),)}

_Arrangement = dict[str, int]  # value -> its house, from 0; no two attributes share a value
_Clue = tuple[str, int, str, int, str]  # kind, attribute and value, attribute and value


def _holds(clue: _Clue, arrangement: _Arrangement) -> bool:
    kind, _, a, j, b = clue
    left = arrangement[a]
    if kind == "at":
        return left == j
    right = arrangement[b]
    if kind == "same":
        return left == right
    if kind == "next":
        return abs(left - right) == 1
    return left + 1 == right if kind == "just left" else left < right


def _clue_text(clue: _Clue, names: list[str]) -> str:
    kind, i, a, j, b = clue
    first = f"The house of {names[i]} {a}"
    if kind == "at":
        return f"{first} is number {j + 1}."
    second = f"the house of {names[j]} {b}"
    words = {
        "same": "is also",
        "next": "is next to",
        "just left": "is directly left of",
        "left": "is somewhere left of",
    }
    return f"{first} {words[kind]} {second}."


def _true_clues(solution: _Arrangement, names: list[str], houses: int) -> list[_Clue]:
    """Every clue of these kinds that is true."""
    places = [(i, v) for i, name in enumerate(names) for v in _ATTRIBUTES[name][:houses]]
    clues: list[_Clue] = [("at", i, value, solution[value], "") for i, value in places]
    for (i, a), (j, b) in itertools.permutations(places, 2):
        if i < j:
            clues.append(("same", i, a, j, b))
        if houses > 2:  # of two houses, all are neighbours
            clues.append(("next", i, a, j, b))
        clues.append(("just left", i, a, j, b))
        clues.append(("left", i, a, j, b))
    return [clue for clue in clues if _holds(clue, solution)]


@functools.lru_cache(maxsize=8)
def arrangements(names: tuple[str, ...], houses: int) -> list[_Arrangement]:
    """All there are of the first `houses` values of each attribute."""
    orders = [itertools.permutations(_ATTRIBUTES[name][:houses]) for name in names]
    return [
        {value: house for order in chosen for house, value in enumerate(order)}
        for chosen in itertools.product(*orders)
    ]


def _zebra(rng: random.Random, settings: Settings) -> Item:
    """Clues are added, each of which excludes something, until one arrangement is left."""
    houses, attributes = rng.choice(_SIZES[settings.level])
    names = ["Name", *sorted(rng.sample(list(_ATTRIBUTES)[1:], attributes - 1))]
    left = arrangements(tuple(names), houses)
    solution = rng.choice(left)
    clues = _true_clues(solution, names, houses)
    rng.shuffle(clues)
    # Fewer giveaways the harder it is: positions come last.
    if settings.level in ("medium", "hard"):
        clues.sort(key=lambda clue: clue[0] == "at")
    used = []
    for clue in clues:
        still = [arrangement for arrangement in left if _holds(clue, arrangement)]
        if len(still) < len(left):
            used.append(clue)
            left = still
        if len(left) == 1:
            break
    values = "; ".join(f"{name}: {', '.join(_ATTRIBUTES[name][:houses])}" for name in names)
    lines = [f"{n}. {_clue_text(clue, names)}" for n, clue in enumerate(used, start=1)]
    question = (
        f"There are {houses} houses in a row, numbered from left to right. Each has one value of "
        f"each attribute, no two the same. {values}.\n" + "\n".join(lines)
    )
    header = ["House", *names]
    rows = [[str(house + 1)] for house in range(houses)]
    for name in names:
        for value in sorted(_ATTRIBUTES[name][:houses], key=solution.get):
            rows[solution[value]].append(value)
    truth = {"header": header, "rows": rows}
    ask = (
        "Put the table within <answer> and </answer> as a JSON object with the keys "
        f'"header" ({json.dumps(header)}) and "rows" (a list for each house, as text).'
    )
    meta = {"clues": [list(clue) for clue in used]}
    text = json.dumps(truth)
    source = "logic__zebra_puzzle_generated"
    return Item(question, text, text, _ANSWER, ask, data_source=source, meta=meta)


def _zebra_wrong(problem: Problem, rng: random.Random) -> tuple[str, float]:
    """In one column two houses' values are swapped, or the last house is left out."""
    truth = json.loads(problem.answer)
    rows = truth["rows"]
    if rng.random() < 0.3:
        del rows[-1]
        # The other rows are right as they are.
        return respond(problem, json.dumps(truth)), len(rows) / (len(rows) + 1)
    column = rng.randrange(1, len(truth["header"]))
    a, b = rng.sample(range(len(rows)), 2)
    rows[a][column], rows[b][column] = rows[b][column], rows[a][column]
    cells = len(rows) * len(truth["header"])
    # Values of a column are distinct, so both cells are wrong now, and no other is.
    return respond(problem, json.dumps(truth)), (cells - 2) / cells


# --- Ordering ----------------------------------------------------------------------------------

_PEOPLE = ("Ada", "Ben", "Cem", "Dora", "Eli", "Fay", "Gus", "Hal", "Ida", "Jon")


def _ordering(rng: random.Random, settings: Settings) -> Item:
    """Every pair of neighbours is compared, so only one order fits; harder ones add others."""
    tiny = settings.level == "tiny"
    count = {"tiny": 3, "easy": 4, "medium": 6, "hard": 9}[settings.level]
    order = rng.sample("abcdefgh" if tiny else _PEOPLE, count)
    pairs = [(i, i + 1) for i in range(count - 1)]
    more = [pair for pair in itertools.combinations(range(count), 2) if pair not in pairs]
    pairs += rng.sample(more, {"tiny": 0, "easy": 0, "medium": 2, "hard": 5}[settings.level])
    rng.shuffle(pairs)
    clues = []
    for i, j in pairs:
        a, b = order[i], order[j]
        if tiny:
            clues.append(rng.choice((f"{a}<{b}", f"{b}>{a}")))
        else:
            clues.append(rng.choice((f"{a} arrives before {b}.", f"{b} arrives after {a}.")))
    value = json.dumps(order, separators=(",", ":")) if tiny else json.dumps(order)
    if tiny:
        question = f"{' '.join(clues)} sort"
    else:
        people = ", ".join(sorted(order))
        question = f"{people} arrive one after another. {' '.join(clues)} In which order?"
    ask = 'Put the order, first to last, within <answer> and </answer>: <answer>["A", "B"]</answer>'
    source = "logic__ordering_puzzle_generated"
    return Item(question, json.dumps(order), value, _ANSWER, ask, data_source=source)


def _ordering_wrong(problem: Problem, rng: random.Random) -> tuple[str, float]:
    """Two names swapped, or one left out: another list, since the names are distinct."""
    order = json.loads(problem.answer)
    if rng.random() < 0.2:
        order.pop(rng.randrange(len(order)))
    else:
        a, b = rng.sample(range(len(order)), 2)
        order[a], order[b] = order[b], order[a]
    return respond(problem, json.dumps(order)), 0.0


# --- Graph -------------------------------------------------------------------------------------


def _follow(arrows: dict[str, str], start: str, steps: int) -> str:
    """The nodes met, start and end included."""
    path = start
    for _ in range(steps):
        path += arrows[path[-1]]
    return path


def _graph(rng: random.Random, settings: Settings) -> Item:
    """One arrow leaves each node: where do `steps` of them lead, or which word do they spell?"""
    tiny = settings.level == "tiny"
    level = settings.level
    family = settings.choose(rng, ("end",) if tiny else ("end", "word"))
    count = {"tiny": 4, "easy": 5, "medium": 10, "hard": 20}[level]
    low, high = {"tiny": (2, 3), "easy": (2, 4), "medium": (4, 8), "hard": (8, 16)}[level]
    nodes = rng.sample("abcdefgh" if tiny else "abcdefghijklmnopqrstuvwxyz", count)
    arrows = {node: rng.choice([n for n in nodes if n != node]) for node in nodes}
    start, steps = rng.choice(nodes), rng.randint(low, high)
    path = _follow(arrows, start, steps)
    value = path[-1] if family == "end" else path
    listed = rng.sample(nodes, count)
    if tiny:
        question = f"{' '.join(f'{n}>{arrows[n]}' for n in listed)} {start}+{steps}?"
    else:
        edges = ", ".join(f"{n} -> {arrows[n]}" for n in listed)
        asked = (
            f"At which node are you after {steps} arrows?"
            if family == "end"
            else f"Which word do the letters of the nodes spell, from {start} on, over {steps} "
            "arrows?"
        )
        question = f"Arrows between nodes: {edges}. Start at {start}. {asked}"
    ask = "Put the answer, one word in small letters, within <answer> and </answer>."
    meta = {"family": family, "nodes": "".join(sorted(nodes))}
    source = "logic__graph_logical_generated"
    return Item(question, value, value, _ANSWER, ask, data_source=source, meta=meta)


def _graph_wrong(problem: Problem, rng: random.Random) -> tuple[str, float]:
    """The last letter is another node's."""
    *start, last = problem.answer
    other = rng.choice([n for n in problem.meta["nodes"] if n != last])
    return respond(problem, "".join([*start, other])), 0.0


@dataclasses.dataclass(frozen=True)
class _NoFamilies(Settings):
    """Settings of a generator with one kind of question."""

    def validate(self) -> None:
        """Raises ConfigError naming the key."""
        self.choose(random.Random(0), ("all",))


GENERATORS = {
    "zebra": Generator("logic", _zebra, _zebra_wrong, _NoFamilies),
    "ordering": Generator("logic", _ordering, _ordering_wrong, _NoFamilies),
    "graph": Generator("logic", _graph, _graph_wrong),
}
