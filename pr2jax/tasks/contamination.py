"""Evaluation items among training rows, by shared word sequences.

The rule: words are runs of letters and digits, lower case, punctuation left out (as GPT-3,
arXiv 2005.14165, appendix C, with its n = 13). An item of at least `ngram` words leaks into a row
that has one of its n-grams (more, by `leak_share`). An item of fewer words leaks where all its
words stand in the row in a run, and one of fewer than `short_words` where they are all of the
row's. A row and an item of the same words are always a leak. What more than `common_items` items
of one set say is the set's wording and counts for nothing; nor does a sequence of which more than
half are single digits: the cells of a grid ("0 0 0 3 0 0 ...") agree by chance.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64

from pr2jax.tasks.filters import CurateConfig, TokenCodes, grams, tokens, words, words_only


@dataclasses.dataclass(frozen=True)
class Item:
    """An item of an evaluation set: its set, its name there, its question, the text compared."""

    source: str
    ident: str
    question: str
    text: str


@dataclasses.dataclass(frozen=True)
class Leak:
    """An item found in a row: the first words shared, how many sequences of how many.

    rule: "ngram", "whole item" (a short one), or "same words".
    """

    item: Item
    words: str
    shared: int
    of: int
    rule: str

    def to_json(self) -> dict[str, Any]:
        """JSON-able: set, item, rule, words, shared, of, item_text."""
        return {
            "set": self.item.source,
            "item": self.item.ident,
            "rule": self.rule,
            "words": self.words,
            "shared": self.shared,
            "of": self.of,
            "item_text": self.item.question,
        }


class Leaks:
    """Looks for evaluation items in texts.

    Memory: 12 bytes a distinct n-gram of the items, and their texts.

    Attributes:
      common: word sequences ignored as a set's wording.
      cells: word sequences of the items ignored as mostly single digits.
      unspecific: items that have nothing else, found only by the same words.
    """

    def __init__(self, items: Iterable[Item], cfg: CurateConfig):
        self.items = list(items)
        self._cfg, self._code = cfg, TokenCodes()
        self.common = self.cells = self.unspecific = 0
        digits = self._code(list("0123456789"))
        self._whole: dict[int, list[int]] = {}
        grouped: dict[int, list[tuple[int, UInt64[np.ndarray, " G"]]]] = {}
        for i, item in enumerate(self.items):
            codes = words_only(self._code(tokens(item.text)))
            if not len(codes):
                continue
            self._whole.setdefault(int(grams(codes, len(codes))[0]), []).append(i)
            size = min(len(codes), cfg.ngram)
            if size >= cfg.short_words:
                single = np.concatenate([[0], np.cumsum(np.isin(codes, digits))])
                wordy = 2 * (single[size:] - single[:-size]) <= size
                self.cells += int((~wordy).sum())
                grouped.setdefault(size, []).append((i, np.unique(grams(codes, size)[wordy])))
        self._totals = np.zeros(len(self.items), np.int64)
        self._index = {size: self._table(found) for size, found in sorted(grouped.items())}

    def _table(self, found: Sequence[tuple[int, UInt64[np.ndarray, " G"]]]):
        """(codes in order, the item of each), without what is common in its set."""
        codes = np.concatenate([codes for _, codes in found])
        item = np.concatenate([np.full(len(codes), i, np.int32) for i, codes in found])
        sets = {name: n for n, name in enumerate(sorted({i.source for i in self.items}))}
        of_set = np.array([sets[i.source] for i in self.items], np.int64)[item]
        order = np.lexsort((item, of_set, codes))
        codes, item, of_set = codes[order], item[order], of_set[order]
        fresh = np.ones(len(codes), bool)
        fresh[1:] = (codes[1:] != codes[:-1]) | (of_set[1:] != of_set[:-1])
        group = np.cumsum(fresh) - 1
        common = np.bincount(group) > self._cfg.common_items
        self.common += int(common.sum())
        kept = ~common[group]
        codes, item = codes[kept], item[kept]
        totals = np.bincount(item, minlength=len(self.items))
        self._totals += totals
        self.unspecific += sum(not totals[i] for i, _ in found)
        return codes, item

    def find(self, text: str, row_codes: UInt64[np.ndarray, " N"] | None = None) -> list[Leak]:
        """Every item in `text` (as `filters.Comparable` makes it), in the items' order.

        row_codes: the codes of its tokens, where they are at hand.
        """
        codes = words_only(self._code(tokens(text)) if row_codes is None else row_codes)
        if not len(codes):
            return []
        leaks: dict[int, Leak] = {}
        spoken: list[str] | None = None
        for i in self._whole.get(int(grams(codes, len(codes))[0]), ()):
            spoken = spoken or words(text)
            if words(self.items[i].text) == spoken:
                told = " ".join(spoken[: self._cfg.ngram])
                leaks[i] = Leak(self.items[i], told, 1, 1, "same words")
        for size, (table, item) in self._index.items():
            mine = grams(codes, size)
            low = np.searchsorted(table, mine, "left")
            hit = np.flatnonzero(np.searchsorted(table, mine, "right") > low)
            if not len(hit):
                continue
            spoken = spoken or words(text)
            for i, at, shared in self._confirm(table, item, mine, hit, spoken, size):
                enough = max(1, self._cfg.leak_share * self._totals[i])
                if i not in leaks and shared >= enough:
                    rule = "ngram" if size == self._cfg.ngram else "whole item"
                    told = " ".join(spoken[at : at + size])
                    leaks[i] = Leak(self.items[i], told, shared, int(self._totals[i]), rule)
        return [leaks[i] for i in sorted(leaks)]

    def _confirm(
        self,
        table: UInt64[np.ndarray, " G"],
        item: Int[np.ndarray, " G"],
        mine: UInt64[np.ndarray, " R"],
        hit: Int[np.ndarray, " H"],
        spoken: list[str],
        size: int,
    ) -> list[tuple[int, int, int]]:
        """(item, first place in the row, sequences shared) by the words, not by their codes."""
        seen: set[tuple[str, ...]] = set()
        claims: dict[int, list[int]] = {}
        for at in hit.tolist():
            said = tuple(spoken[at : at + size])
            if said in seen:
                continue
            seen.add(said)
            low, high = (np.searchsorted(table, mine[at], side) for side in ("left", "right"))
            for i in item[low:high].tolist():
                claims.setdefault(i, []).append(at)
        found = []
        for i, places in claims.items():
            theirs = words(self.items[i].text)
            runs = {tuple(theirs[k : k + size]) for k in range(len(theirs) - size + 1)}
            shared = [at for at in places if tuple(spoken[at : at + size]) in runs]
            if shared:
                found.append((i, shared[0], len(shared)))
        return found
