"""Questions about small tables in markdown ("table__generated").

Kinds of question as in HiTab (arXiv 2108.06712) and MultiHiertt (arXiv 2206.01347): lookup, sums,
means, differences, ratios, changes in percent, extremes, lists; from "hard" on, headers have two
levels in both directions.
"""

import dataclasses
import math
import random
from fractions import Fraction

from pr2jax.tasks.base import Problem
from pr2jax.tasks.generated.items import BOXED, Generator, Item, Settings, number_text, respond

_ROWS = ("Oslo", "Lima", "Cairo", "Quito", "Delhi", "Seoul", "Turin", "Porto", "Accra", "Hanoi")
_GROUPS = ("North", "South", "East", "West")
_COLUMNS = ("Sales", "Costs", "Staff", "Orders", "Visits", "Returns")
_YEARS = ("2019", "2020", "2021", "2022")


@dataclasses.dataclass(frozen=True)
class _Table:
    """rows, columns: labels; a two-level label is "GROUP, NAME". cells[i][j]: integers."""

    rows: list[str]
    columns: list[str]
    cells: list[list[int]]
    deep: bool

    def column(self, j: int) -> list[int]:
        return [row[j] for row in self.cells]

    def markdown(self) -> str:
        """The table; with deep headers two header lines, and a group is written once."""
        if not self.deep:
            lines = [["", *self.columns], ["---"] * (len(self.columns) + 1)]
            lines += [
                [label, *map(str, row)] for label, row in zip(self.rows, self.cells, strict=True)
            ]
        else:
            tops, names = _once(self.columns)
            lines = [["", "", *tops], ["---"] * (len(self.columns) + 2), ["", "", *names]]
            groups, labels = _once(self.rows)
            lines += [
                [group, label, *map(str, row)]
                for group, label, row in zip(groups, labels, self.cells, strict=True)
            ]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _once(labels: list[str]) -> tuple[list[str], list[str]]:
    """Groups, each named where it starts only, and names of two-level labels."""
    pairs = [label.split(", ") for label in labels]
    groups = [g if i == 0 or pairs[i - 1][0] != g else "" for i, (g, _) in enumerate(pairs)]
    return groups, [name for _, name in pairs]


def _table(rng: random.Random, level: str) -> _Table:
    if level == "hard":
        groups = rng.sample(_GROUPS, 2)
        names = rng.sample(_ROWS, 6)
        rows = [f"{groups[i // 3]}, {name}" for i, name in enumerate(names)]
        years, columns = sorted(rng.sample(_YEARS, 2)), rng.sample(_COLUMNS, 2)
        columns = [f"{year}, {name}" for year in years for name in columns]
    else:
        size = {"easy": (3, 2), "medium": (6, 3)}[level]
        rows, columns = rng.sample(_ROWS, size[0]), rng.sample(_COLUMNS, size[1])
    top = 99 if level == "easy" else 999
    # No two cells are equal, so every extreme is one cell.
    values = rng.sample(range(2, top + 1), len(rows) * len(columns))
    cells = [values[i : i + len(columns)] for i in range(0, len(values), len(columns))]
    return _Table(rows, columns, cells, level == "hard")


Answer = Fraction | str | list[str]


def _lookup(rng: random.Random, t: _Table) -> tuple[str, Answer]:
    i, j = rng.randrange(len(t.rows)), rng.randrange(len(t.columns))
    return f"What is {t.columns[j]} of {t.rows[i]}?", Fraction(t.cells[i][j])


def _total(rng: random.Random, t: _Table) -> tuple[str, Answer]:
    j = rng.randrange(len(t.columns))
    return f"What is the sum of {t.columns[j]} over all rows?", Fraction(sum(t.column(j)))


def _mean(rng: random.Random, t: _Table) -> tuple[str, Answer]:
    j = rng.randrange(len(t.columns))
    value = Fraction(sum(t.column(j)), len(t.rows))
    return f"What is the mean of {t.columns[j]} over all rows?", value


def _difference(rng: random.Random, t: _Table) -> tuple[str, Answer]:
    j = rng.randrange(len(t.columns))
    a, b = rng.sample(range(len(t.rows)), 2)
    question = f"By how much is {t.columns[j]} of {t.rows[a]} above that of {t.rows[b]}?"
    return f"{question} (Negative where it is below.)", Fraction(t.cells[a][j] - t.cells[b][j])


def _ratio(rng: random.Random, t: _Table) -> tuple[str, Answer]:
    j = rng.randrange(len(t.columns))
    a, b = rng.sample(range(len(t.rows)), 2)
    question = f"What is {t.columns[j]} of {t.rows[a]} divided by that of {t.rows[b]}?"
    return f"{question} Give at least four digits.", Fraction(t.cells[a][j], t.cells[b][j])


def _change(rng: random.Random, t: _Table) -> tuple[str, Answer]:
    i = rng.randrange(len(t.rows))
    a, b = rng.sample(range(len(t.columns)), 2)
    old, new = t.cells[i][a], t.cells[i][b]
    question = f"By how many percent of {t.columns[a]} does {t.columns[b]} of {t.rows[i]} differ"
    return (
        f"{question} from it? Give the number alone, at least four digits, negative where it "
        "is less.",
        Fraction(100 * (new - old), old),
    )


def _argmax(rng: random.Random, t: _Table) -> tuple[str, Answer]:
    j = rng.randrange(len(t.columns))
    word, choose = rng.choice((("highest", max), ("lowest", min)))
    i = t.column(j).index(choose(t.column(j)))
    return f"Which row has the {word} {t.columns[j]}?", t.rows[i].split(", ")[-1]


def _above(rng: random.Random, t: _Table) -> tuple[str, Answer]:
    j = rng.randrange(len(t.columns))
    ordered = sorted(t.column(j))
    bound = ordered[rng.randrange(len(ordered) - 1)]
    names = [r.split(", ")[-1] for r, v in zip(t.rows, t.column(j), strict=True) if v > bound]
    question = f"Which rows have {t.columns[j]} above {bound}?"
    return f"{question} Write | between several.", names


def _group_sum(rng: random.Random, t: _Table) -> tuple[str, Answer]:
    j = rng.randrange(len(t.columns))
    group = rng.choice([row.split(", ")[0] for row in t.rows])
    values = [v for r, v in zip(t.rows, t.column(j), strict=True) if r.startswith(group + ",")]
    return f"What is the sum of {t.columns[j]} over {group}?", Fraction(sum(values))


_FAMILIES = {
    "lookup": _lookup,
    "sum": _total,
    "argmax": _argmax,
    "difference": _difference,
    "mean": _mean,
    "ratio": _ratio,
    "change": _change,
    "list": _above,
    "group_sum": _group_sum,
}
_BY_LEVEL = {
    "tiny": ("lookup", "sum", "argmax"),
    "easy": ("lookup", "sum", "argmax", "difference"),
    "medium": tuple(_FAMILIES)[:-1],
    "hard": tuple(_FAMILIES),
}


def _tiny(rng: random.Random, family: str) -> tuple[str, Answer, list[str]]:
    """Two or three one-letter columns over one row of numbers."""
    names = sorted(rng.sample("abcdef", rng.choice((2, 3))))
    values = rng.sample(range(2, 60), len(names))
    table = f"|{'|'.join(names)}|\n|{'|'.join(map(str, values))}|\n"
    if family == "lookup":
        i = rng.randrange(len(names))
        return f"{table}{names[i]}?", Fraction(values[i]), names
    if family == "sum":
        return f"{table}sum?", Fraction(sum(values)), names
    word, choose = rng.choice((("max", max), ("min", min)))
    return f"{table}{word}?", names[values.index(choose(values))], names


def _make(rng: random.Random, settings: Settings) -> Item:
    family = settings.choose(rng, _BY_LEVEL[settings.level])
    if settings.level == "tiny":
        question, answer, labels = _tiny(rng, family)
    else:
        table = _table(rng, settings.level)
        text, answer = _FAMILIES[family](rng, table)
        question = f"{table.markdown()}\n\n{text}"
        labels = [row.split(", ")[-1] for row in table.rows]
    value = "|".join(answer) if isinstance(answer, list) else answer
    value = value if isinstance(value, str) else number_text(value)
    return Item(
        question=question,
        truth=value,
        value=value,
        wrap=BOXED[0],
        ask=BOXED[1],
        data_source="table__generated",
        meta={"family": family, "labels": labels},
    )


def _wrong(problem: Problem, rng: random.Random) -> tuple[str, float]:
    """A number at least 5% and 1 off (the tolerance is 0.1%), another label, or another set."""
    labels, answer = problem.meta["labels"], problem.answer
    parts = answer.split("|")
    if problem.meta["family"] == "list":
        # One label in or out: as sets, and so as sorted lists, never equal.
        changed = set(parts) ^ {rng.choice(labels)}
        return respond(problem, "|".join(sorted(changed)) or "none"), 0.0
    if answer in labels:
        return respond(problem, rng.choice([name for name in labels if name != answer])), 0.0
    value = float(answer)
    off = rng.choice((-1, 1)) * (1 + abs(value) * rng.uniform(0.05, 0.5))
    if value.is_integer():
        off = math.copysign(math.ceil(abs(off)), off)
    return respond(problem, number_text(value + off)), 0.0


GENERATORS = {"tables": Generator("tabular", _make, _wrong)}
