"""Rows of the Guru schema with repeats and leaks planted in them, and where: the truth to hold
curation against.

Row i is made from (seed, i) alone, so any row can be made again and none is kept. Three files, in
order of priority. Words are drawn by Zipf's law from made-up ones; a third of the rows, and of the
evaluation items, start with common instructions, as real ones do.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of the rows after the first fifth; what is left is fresh.
SHARES = {"exact": 0.02, "inside": 0.01, "around": 0.01, "near": 0.04, "leak": 0.01}
REASONS = {
    "exact": ("exact",),
    "inside": ("contained",),
    "around": ("contained",),
    "near": ("near", "contained"),  # a word added at the end is containment
    "leak": ("contaminated",),
}
SIMILARITY = 0.8
_BATCH = 10_000
_FILES = ("first.parquet", "second.jsonl", "third.parquet")
_SOURCES = ("math__planted", "codegen__planted", "stem__planted", "logic__planted")
_INSTRUCTIONS = (
    "Solve the following problem and give a reason for every step that you take on the way.",
    "Read the text below with care, then answer the question at the end of it in one sentence.",
    "You are given a description of a task; write down the result and nothing else besides it.",
)
_TOKEN = re.compile(r"\w+|[^\w\s]")


@functools.cache
def _vocabulary() -> tuple[list[str], list[float]]:
    """20,000 words, the frequent ones short, and their cumulative weights (Zipf)."""
    parts = ["ba", "do", "ki", "lo", "me", "nu", "pra", "re", "sti", "ta", "vo", "zen", "shi", "ul"]
    made = itertools.chain.from_iterable(
        map("".join, itertools.product(parts, repeat=n)) for n in (1, 2, 3, 4)
    )
    words = list(itertools.islice(made, 20_000))
    return words, list(itertools.accumulate(1.0 / (i + 2.7) for i in range(len(words))))


@dataclasses.dataclass(frozen=True)
class Planted:
    """A set of `rows` rows by `seed`, with `items` leaked evaluation items and as many clean."""

    rows: int
    seed: int = 0
    items: int = 500

    def _random(self, *names: Any) -> random.Random:
        return random.Random(f"{self.seed}/{'/'.join(map(str, names))}")

    def kind(self, row: int) -> str:
        """ "fresh", or what of SHARES the row is."""
        draw = self._random("kind", row).random()
        if row < self.rows // 5:
            return "fresh"
        for kind, share in SHARES.items():
            if draw < share:
                return kind
            draw -= share
        return "fresh"

    def partner(self, row: int) -> int:
        """The earlier fresh row that a repeat is of."""
        rng = self._random("partner", row)
        while True:
            found = rng.randrange(row)
            if self.kind(found) == "fresh":
                return found

    def text(self, row: int) -> str:
        """The question of a row."""
        kind, rng = self.kind(row), self._random("text", row)
        if kind == "fresh":
            return _question(rng)
        if kind == "leak":
            words = self.item("leaked", rng.randrange(self.items)).split()
            # Past the instructions, which are no leak.
            start = rng.randrange(20, len(words) - 20)
            said = " ".join(words[start : start + rng.randint(13, 20)])
            return f"{_question(rng)} {said} {_sentence(rng, 8)}"
        base = self.text(self.partner(row))
        if kind == "exact":
            return "  ".join(rng.choice((str.upper, str.title, str))(base).split(" "))
        if kind == "around":
            return f"{_sentence(rng, rng.randint(2, 12))} {base} {_sentence(rng, 4)}"
        words = base.split()
        if kind == "inside":
            cut = rng.randint(1, len(words) // 3)
            start = rng.randint(0, cut)
            return " ".join(words[start : len(words) - cut + start])
        return _nearly(words, rng)

    def item(self, name: str, number: int) -> str:
        """An item of the evaluation set `name`."""
        rng = self._random(name, number)
        start = rng.choice(_INSTRUCTIONS) if rng.random() < 0.33 else _sentence(rng, 17)
        return f"{start} {_sentence(rng, 2)} {_question(rng, 40, plain=True)}"

    def write(self, folder: Path) -> tuple[list[str], dict[str, str]]:
        """Writes the rows and both evaluation sets; (files in order, {set: file})."""
        import pyarrow as pa
        import pyarrow.parquet

        folder.mkdir(parents=True, exist_ok=True)
        cuts = [0, 2 * self.rows // 5, 7 * self.rows // 10, self.rows]
        paths = [folder / name for name in _FILES]
        for path, (low, high) in zip(paths, itertools.pairwise(cuts), strict=True):
            if path.suffix == ".jsonl":
                with open(path, "w", encoding="utf-8") as file:
                    file.writelines(json.dumps(self.row(i)) + "\n" for i in range(low, high))
                continue
            writer = None
            for start in range(low, high, _BATCH):
                batch = range(start, min(start + _BATCH, high))
                table = pa.Table.from_pylist([self.row(i) for i in batch])
                writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
                writer.write_table(table)
            writer.close()
        sets = {}
        for name in ("leaked", "clean"):
            sets[name] = str(folder / f"{name}.jsonl")
            with open(sets[name], "w", encoding="utf-8") as file:
                for i in range(self.items):
                    row = {"prompt": self.item(name, i), "data_source": "math__exam"}
                    row["reward_model"] = {"ground_truth": "1"}
                    file.write(json.dumps(row) + "\n")
        return [str(path) for path in paths], sets

    def row(self, number: int) -> dict[str, Any]:
        """A row as the files hold it."""
        source = _SOURCES[number % len(_SOURCES)]
        return {
            "prompt": [{"role": "user", "content": self.text(number)}],
            "data_source": source,
            "ability": source.partition("__")[0],
            "reward_model": {"style": "rule", "ground_truth": str(number)},
            "extra_info": {"index": number, "split": "train"},
        }

    def number(self, where: str) -> int:
        """The number of the row that stands at "FILE:LINE"."""
        path, _, line = where.rpartition(":")
        first = [0, 2 * self.rows // 5, 7 * self.rows // 10]
        return first[_FILES.index(Path(path).name)] + int(line) - 1

    def compare(
        self, dropped: Iterator[dict[str, Any]], leaks: Iterator[dict[str, Any]]
    ) -> dict[str, Any]:
        """Counts of what was planted and found: {kind: {planted, found, dropped_otherwise}}, and
        what nobody planted: {"fresh_dropped", "clean_hits"}.

        dropped, leaks: the rows of dropped.jsonl and contamination.jsonl.
        """
        reasons = {self.number(row["row"]): row["reason"] for row in dropped}
        figures = {kind: {"planted": 0, "found": 0, "dropped_otherwise": 0} for kind in SHARES}
        fresh = 0
        for row in range(self.rows):
            kind, reason = self.kind(row), reasons.get(row)
            if kind == "fresh":
                fresh += reason is not None
                continue
            figures[kind]["planted"] += 1
            figures[kind]["found"] += reason in REASONS[kind]
            figures[kind]["dropped_otherwise"] += reason not in (None, *REASONS[kind])
        hits = {"clean": 0, "leaked_but_not_planted": 0}
        for hit in leaks:
            if Path(hit["set"]).stem == "clean":
                hits["clean"] += 1
            elif self.kind(self.number(hit["row"])) != "leak":
                hits["leaked_but_not_planted"] += 1
        return {"planted": figures, "fresh_dropped": fresh, "false_hits": hits}


def _sentence(rng: random.Random, count: int) -> str:
    words, weights = _vocabulary()
    return " ".join(rng.choices(words, cum_weights=weights, k=count))


def _question(rng: random.Random, least: int = 20, plain: bool = False) -> str:
    """Sentences of made-up words with numbers in them, 20 to 300 words, 60 in the middle."""
    count = max(least, min(300, int(rng.lognormvariate(4.1, 0.6))))
    words = _sentence(rng, count).split()
    for at in range(7, count, rng.randint(5, 12)):
        words[at] += rng.choice((",", ".", "?"))
    if not plain:
        for at in range(3, count, 17):
            words[at] = str(rng.randint(2, 9999))
        if rng.random() < 0.33:
            words.insert(0, rng.choice(_INSTRUCTIONS))
    return " ".join(words)


def _shingles(text: str) -> set[tuple[str, ...]]:
    tokens = _TOKEN.findall(text.lower())
    return set(itertools.pairwise(itertools.pairwise(tokens)))


def _nearly(words: list[str], rng: random.Random) -> str:
    """As many edits as keep the Jaccard similarity of three-token shingles at SIMILARITY."""
    base = _shingles(" ".join(words))
    best, edited = None, list(words)
    for _ in range(rng.randint(1, 12)):
        at = rng.randrange(len(edited))
        if any(c.isdigit() for c in edited[at]):
            continue  # another number is another problem
        edit = rng.randrange(4)
        if edit == 0:
            edited[at] = _sentence(rng, 1)
        elif edit == 1:
            edited.insert(at, _sentence(rng, 1))
        elif edit == 2:
            edited.pop(at)
        else:
            edited[at] += ","
        mine = _shingles(" ".join(edited))
        if len(base & mine) / len(base | mine) < SIMILARITY:
            break
        best = " ".join(edited)
    return best or f"{' '.join(words)}?!"
