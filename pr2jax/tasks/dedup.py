"""Repeats among N questions: the same, one inside another, nearly the same; never all pairs.

Questions are numbered in the order of priority. Of each pair that is found the later question
goes, unless the earlier one is already gone.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt64

_LONGEST = 32  # bytes of an anchor
_BASE = np.uint64(0x100000001B3)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_TABLE_BITS = 24
_CHUNK = 1 << 20  # bytes looked at in one go


def first_of_same(digests: UInt64[np.ndarray, "N 2"]) -> Int[np.ndarray, " N"]:
    """For each question the first one with the same digest (itself where it is the first)."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal ones stay in order
    ranked = digests[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    starts = np.flatnonzero(fresh)
    first = np.empty(len(order), np.int64)
    first[order] = order[starts[np.cumsum(fresh) - 1]] if len(order) else order
    return first


def keep_earlier(pairs: Int[np.ndarray, "M 2"], count: int) -> Int[np.ndarray, " N"]:
    """The earlier partner by which each of `count` questions goes; -1 where it stays.

    Questions are taken in order, and one goes if it is in a pair with an earlier that stayed.
    """
    partner = np.full(count, -1, np.int64)
    earlier, later = pairs.min(axis=1, initial=count), pairs.max(axis=1, initial=-1)
    order = np.lexsort((earlier, later))
    for i, j in zip(earlier[order].tolist(), later[order].tolist(), strict=True):
        if partner[j] < 0 and partner[i] < 0:
            partner[j] = i
    return partner


# --- One inside another: by anchors


def anchor_size(length: int) -> int:
    """Bytes of the anchor of a question of `length` bytes (at least 1): a power of two."""
    return min(1 << (length.bit_length() - 1), _LONGEST)


def window_codes(
    data: UInt8[np.ndarray, " B"], sizes: Sequence[int]
) -> Iterator[tuple[int, UInt64[np.ndarray, " W"]]]:
    """(size, codes of all windows of so many bytes) for `sizes`, powers of two.

    A window of 2w is two windows of w, so all sizes take one multiplication each.
    """
    codes, power, size = data.astype(np.uint64) + np.uint64(1), _BASE, 1
    while True:
        if size in sizes:
            yield size, codes * _SPREAD
        if size >= max(sizes, default=0) or len(codes) <= size:
            return
        codes = codes[:-size] * power + codes[size:]
        with np.errstate(over="ignore"):
            power = power * power
        size *= 2


def _slots(codes: UInt64[np.ndarray, " W"]) -> UInt64[np.ndarray, " W"]:
    return codes >> np.uint64(64 - _TABLE_BITS)


def _chunks(texts: Sequence[bytes]) -> Iterator[tuple[int, UInt8[np.ndarray, " B"], np.ndarray]]:
    """(first row, bytes of some rows with a byte between that no text has, their starts)."""
    first, size = 0, 0
    for i, text in enumerate(texts):
        size += len(text) + 1
        if size >= _CHUNK or i == len(texts) - 1:
            part = texts[first : i + 1]
            data = np.frombuffer(b"\xff".join(part), np.uint8)
            lengths = np.array([len(t) + 1 for t in part], np.int64)
            yield first, data, np.concatenate([[0], np.cumsum(lengths)])
            first, size = i + 1, 0


class Anchors:
    """Finds which questions hold which others.

    If s is inside t, so is every window of s. Of each question its rarest window is kept, by a
    table of counts over all texts; a text that has that window is then searched for the question
    itself, so that a pair is never found wrongly, and never missed. Texts are UTF-8, in which
    "inside" means the same as for characters. Memory: 2^24 counts, and 16 bytes a question.

    Life: `count` every text, then `choose` for every text, `freeze`, and `pairs`.
    """

    def __init__(self, sizes: Sequence[int]):
        """sizes: those that `anchor_size` gives for the questions that are looked for."""
        self.sizes = sorted(sizes)
        self._counts = np.zeros(1 << _TABLE_BITS, np.uint32)
        self._chosen: dict[int, list[tuple[int, int]]] = {size: [] for size in self.sizes}
        self._codes: dict[int, UInt64[np.ndarray, " A"]] = {}
        self._rows: dict[int, Int[np.ndarray, " A"]] = {}
        self._present: UInt8[np.ndarray, " T"] | None = None

    def count(self, texts: Sequence[bytes]) -> None:
        """Counts the windows of some texts."""
        for _, data, _ in _chunks(texts):
            for _, codes in window_codes(data, self.sizes):
                np.add.at(self._counts, _slots(codes), np.uint32(1))

    def choose(self, start: int, texts: Sequence[bytes], wanted: Bool[np.ndarray, " R"]) -> None:
        """Keeps the rarest window of the texts `wanted`, which are the questions from `start`."""
        for first, data, starts in _chunks(texts):
            for size, codes in window_codes(data, self.sizes):
                counts = self._counts[_slots(codes)]
                for i in range(len(starts) - 1):
                    length = int(starts[i + 1] - starts[i]) - 1
                    if not wanted[first + i] or anchor_size(length) != size:
                        continue
                    at = int(starts[i])
                    best = at + int(counts[at : at + length - size + 1].argmin())
                    self._chosen[size].append((start + first + i, int(codes[best])))

    def freeze(self) -> None:
        """Makes the lookup tables; the counts are given up."""
        self._counts = np.zeros(0, np.uint32)
        self._present = np.zeros(1 << _TABLE_BITS, np.uint8)
        for bit, size in enumerate(self.sizes):
            rows = np.array([row for row, _ in self._chosen[size]], np.int64)
            codes = np.array([code for _, code in self._chosen[size]], np.uint64)
            order = np.argsort(codes, kind="stable")
            self._rows[size], self._codes[size] = rows[order], codes[order]
            self._present[_slots(codes)] |= np.uint8(1 << bit)
        self._chosen = {}

    def pairs(
        self, start: int, texts: Sequence[bytes], text_of: Callable[[int], bytes]
    ) -> Int[np.ndarray, "M 2"]:
        """[s, t] for every chosen question s inside a text t != s of those from `start`."""
        found: set[tuple[int, int]] = set()
        for first, data, starts in _chunks(texts):
            for bit, (size, codes) in enumerate(window_codes(data, self.sizes)):
                here = np.flatnonzero(self._present[_slots(codes)] & np.uint8(1 << bit))
                anchors, rows = self._codes[size], self._rows[size]
                low = np.searchsorted(anchors, codes[here], "left")
                high = np.searchsorted(anchors, codes[here], "right")
                local = np.searchsorted(starts, here, "right") - 1
                for i in np.flatnonzero(high > low).tolist():
                    t = int(local[i])
                    for s in rows[low[i] : high[i]].tolist():
                        if s != start + first + t:
                            found.add((s, start + first + t))
        kept = [(s, t) for s, t in sorted(found) if text_of(s) in texts[t - start]]
        return np.array(kept, np.int64).reshape(-1, 2)


# --- Nearly the same: MinHash, bands, and then the true similarity


def choose_bands(similarity: float, permutations: int, recall: float) -> tuple[int, int]:
    """(bands, rows of a band): the most rows for which a pair of `similarity` is found.

    A pair shares a band with probability 1 - (1 - s^r)^b, which is to be at least `recall`.
    """
    for rows in range(permutations, 1, -1):
        bands = permutations // rows
        if 1.0 - (1.0 - similarity**rows) ** bands >= recall:
            return bands, rows
    return permutations, 1


def band_codes(
    shingles: Sequence[UInt64[np.ndarray, " S"]],
    salts: UInt64[np.ndarray, " N"],
    bands: int,
    rows: int,
) -> UInt64[np.ndarray, "N b"]:
    """A code of each band of each question's MinHash signature (R-MinHash, by `rensa`).

    salts: questions of other salts share no band.
    """
    from rensa import RMinHash

    if not len(shingles):
        return np.zeros((0, bands), np.uint64)
    flat = np.concatenate([np.zeros(0, np.uint64), *shingles])
    ends = np.cumsum([0, *(len(s) for s in shingles)]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        flat, ends, num_perm=bands * rows, seed=0
    )
    values = np.array(matrix.to_rows(), np.uint64).reshape(len(shingles), bands, rows)
    codes = np.broadcast_to(salts[:, None], values.shape[:2]).copy()
    for i in range(rows):
        codes = (codes ^ values[:, :, i]) * _SPREAD
        codes ^= codes >> np.uint64(29)
    return codes


def shared_groups(codes: UInt64[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """A number for each code that more than one question has; -1 for the others."""
    order = np.argsort(codes, kind="stable")
    ranked = codes[order]
    fresh = np.ones(len(codes), bool)
    fresh[1:] = ranked[1:] != ranked[:-1]
    group = np.cumsum(fresh) - 1
    sizes = np.bincount(group) if len(group) else np.zeros(0, np.int64)
    numbers = np.where(sizes > 1, np.cumsum(sizes > 1) - 1, -1)
    result = np.empty(len(codes), np.int32)
    result[order] = numbers[group]
    return result


def jaccard(a: frozenset, b: frozenset) -> float:
    """Shared shingles over all shingles of both."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if a or b else 1.0


class Near:
    """Takes questions in order, and says which earlier one that stayed each is nearly.

    groups: int32 [bands, N] of `shared_groups`. shingles_of gives a question's shingles.
    `skipped` counts comparisons left out because a band was too crowded. Only questions that
    share a band with another are ever held.
    """

    def __init__(
        self,
        groups: Int[np.ndarray, "b N"],
        shingles_of: Callable[[int], frozenset],
        threshold: float,
        crowd: int,
    ):
        self._groups, self._threshold, self._crowd = groups, threshold, crowd
        self._shingles = functools.lru_cache(maxsize=4096)(shingles_of)
        self._alone = (groups < 0).all(axis=0)
        self._members: list[dict[int, list[int]]] = [{} for _ in groups]
        self.compared = self.skipped = 0

    def find(self, row: int) -> tuple[int, float]:
        """(the most similar earlier question, its similarity), or (-1, 0.0)."""
        if self._alone[row]:
            return -1, 0.0
        candidates: set[int] = set()
        for members, group in zip(self._members, self._groups[:, row].tolist(), strict=True):
            there = members.get(group, ())
            candidates.update(there[-self._crowd :])
            self.skipped += max(len(there) - self._crowd, 0)
        if not candidates:
            return -1, 0.0
        mine, best = self._shingles(row), (-1, 0.0)
        for other in sorted(candidates):
            self.compared += 1
            similarity = jaccard(mine, self._shingles(other))
            if similarity >= self._threshold and similarity > best[1]:
                best = (other, similarity)
        return best

    def add(self, row: int) -> None:
        """`row` stays: later ones are compared with it."""
        if self._alone[row]:
            return
        for members, group in zip(self._members, self._groups[:, row].tolist(), strict=True):
            if group >= 0:
                members.setdefault(group, []).append(row)
