"""Evaluation items among training rows, by shared word sequences.

The rule: words are runs of letters and digits, lower case, punctuation left out (as GPT-3,
arXiv 2005.14165, appendix C, with its n = 13). An item of at least `ngram` words leaks into a row
that has one of its n-grams (more, by `leak_share`). An item of fewer words leaks where all its
words stand in the row in a run, and one of fewer than `short_words` where they are all of the
row's. A row and an item of the same words are always a leak.

What does not count: sequences of which more than half is wording, since rows share "Put your final
answer within" and the word after it. Wording is what stands in runs of `ngram` // 2 + 1 words that
more than `common_items` items of the set have (of a small set: more than a tenth, and more than
two), or more than `common_rows` rows, whose repeats are gone by then. Nor do sequences of which
more than half are single digits: the cells of a grid ("0 0 0 3 0 0 ...") agree by chance.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt64

from pr2jax.tasks.filters import CurateConfig, TokenCodes, digest, grams, tokens, words, words_only


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


def _half(size: int) -> int:
    return size // 2 + 1


def _covered(
    codes: UInt64[np.ndarray, " N"], wording: UInt64[np.ndarray, " C"], ngram: int
) -> Bool[np.ndarray, " N"]:
    """Whether each word stands in a run of `wording`."""
    size, covered = _half(ngram), np.zeros(len(codes), bool)
    for start in np.flatnonzero(np.isin(grams(codes, size), wording)).tolist():
        covered[start : start + size] = True
    return covered


def _counts(marked: Bool[np.ndarray, " N"], size: int) -> Int[np.ndarray, " G"]:
    """How many words of each run of `size` are marked."""
    total = np.concatenate([[0], np.cumsum(marked)])
    return total[size:] - total[:-size]


class Leaks:
    """Looks for evaluation items in texts.

    Memory: 12 bytes a distinct n-gram of the items, and their texts.

    Attributes:
      common: word sequences of the items ignored as mostly wording.
      cells: word sequences of the items ignored as mostly single digits.
      unspecific: items that have nothing else, found only by the same words.
    """

    def __init__(
        self,
        items: Iterable[Item],
        cfg: CurateConfig,
        rows: Iterable[UInt64[np.ndarray, " N"]] = (),
    ):
        """rows: the token codes of all rows, which say what is common in them."""
        self.items = list(items)
        self._cfg, self._code = cfg, TokenCodes()
        self.common = self.cells = self.unspecific = 0
        self._whole: dict[bytes, list[int]] = {}
        codes = [words_only(self._code(tokens(item.text))) for item in self.items]
        wording = self._wording(codes, rows)
        digits = self._code(list("0123456789"))
        grouped: dict[int, list[tuple[int, UInt64[np.ndarray, " G"]]]] = {}
        for i, (item, said) in enumerate(zip(self.items, codes, strict=True)):
            if not len(said):
                continue
            self._whole.setdefault(digest(said.tobytes()), []).append(i)
            size = min(len(said), cfg.ngram)
            if size < cfg.short_words:
                continue
            common = 2 * _counts(_covered(said, wording[item.source], cfg.ngram), size) > size
            cells = 2 * _counts(np.isin(said, digits), size) > size
            self.common += int(common.sum())
            self.cells += int((cells & ~common).sum())
            kept = np.unique(grams(said, size)[~common & ~cells])
            self.unspecific += not len(kept)
            grouped.setdefault(size, []).append((i, kept))
        self._totals = np.zeros(len(self.items), np.int64)
        self._index = {size: self._table(found) for size, found in sorted(grouped.items())}

    def _wording(
        self,
        codes: Sequence[UInt64[np.ndarray, " N"]],
        rows: Iterable[UInt64[np.ndarray, " N"]],
    ) -> dict[str, UInt64[np.ndarray, " C"]]:
        """Of each set, the runs of a little over half of `ngram` words that many have."""
        sets: dict[str, list[np.ndarray]] = {}
        for item, said in zip(self.items, codes, strict=True):
            sets.setdefault(item.source, []).append(np.unique(grams(said, _half(self._cfg.ngram))))
        found = {}
        for name, runs in sets.items():
            limit = min(self._cfg.common_items, max(2, len(runs) // 10))
            distinct, count = np.unique(np.concatenate(runs), return_counts=True)
            found[name] = distinct[count > limit]
        said = [run for runs in sets.values() for run in runs]
        common = self._common(np.unique(np.concatenate([np.zeros(0, np.uint64), *said])), rows)
        return {name: np.union1d(runs, common) for name, runs in found.items()}

    def _common(
        self, runs: UInt64[np.ndarray, " C"], rows: Iterable[UInt64[np.ndarray, " N"]]
    ) -> UInt64[np.ndarray, " D"]:
        """Those of `runs` that more than `common_rows` rows have."""
        counts = np.zeros(len(runs), np.int64)
        for codes in rows:
            mine = np.unique(grams(words_only(codes), _half(self._cfg.ngram)))
            at = np.searchsorted(runs, mine)
            there = np.searchsorted(runs, mine, "right") > at
            counts[at[there]] += 1  # each once: both are without repeats
        return runs[counts > self._cfg.common_rows]

    def _table(
        self, found: Sequence[tuple[int, UInt64[np.ndarray, " G"]]]
    ) -> tuple[UInt64[np.ndarray, " T"], Int[np.ndarray, " T"]]:
        """(codes in order, the item of each)."""
        codes = np.concatenate([codes for _, codes in found])
        item = np.concatenate([np.full(len(codes), i, np.int32) for i, codes in found])
        self._totals += np.bincount(item, minlength=len(self.items))
        order = np.lexsort((item, codes))
        return codes[order], item[order]

    def find(self, text: str, row_codes: UInt64[np.ndarray, " N"] | None = None) -> list[Leak]:
        """Every item in `text` (as `filters.Comparable` makes it), in the items' order.

        row_codes: the codes of its tokens, where they are at hand.
        """
        codes = words_only(self._code(tokens(text)) if row_codes is None else row_codes)
        if not len(codes):
            return []
        leaks: dict[int, Leak] = {}
        spoken: list[str] | None = None
        for i in self._whole.get(digest(codes.tobytes()), ()):
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
