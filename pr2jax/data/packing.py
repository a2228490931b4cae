"""Packing of (tokens, loss mask) examples into rows, and resumable batches of them.

`loss_mask[t] == 1` says that token t is a target, predicted from position t - 1 of its segment,
as in a `Rollout`. A segment's first token is never a target: nothing precedes it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pr2jax.data.tokenizer import Tokenizer, encode_prompt


class Example(NamedTuple):
    """One sequence: tokens and, of the same length, which of them are targets (1) or not (0)."""

    tokens: Sequence[int]
    loss_mask: Sequence[int]


class PackedRows(NamedTuple):
    """Rows of packed sequences.

    tokens: the pad id where nothing stands. loss_mask: 1 on targets. segment_ids: 1..n in a row,
    0 where nothing stands. positions: from 0 within each segment, 0 where nothing stands.
    """

    tokens: Int[np.ndarray, "B T"]
    loss_mask: Float[np.ndarray, "B T"]
    segment_ids: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True)
class PackingReport:
    """What packing did: `fill` is the share of row slots that hold a token."""

    examples: int
    dropped: int
    rows: int
    fill: float


def answer_example(
    tokenizer: Tokenizer, prompt: str | Sequence[dict[str, str]], solution: str
) -> Example:
    """Prompt (text, or messages), solution and the end token; targets are the solution and the
    end."""
    head, tail = encode_prompt(tokenizer, prompt), tokenizer.encode(solution)
    tail = [*tail, tokenizer.eos_id]
    return Example([*head, *tail], [0] * len(head) + [1] * len(tail))


def assign_rows(
    lengths: Sequence[int], row_length: int, method: Literal["first_fit", "sequential"]
) -> list[list[int]]:
    """Which example goes to which row: lists of indices, in order of arrival.

    "sequential" closes a row when the next example does not fit; "first_fit" puts it into the
    first row that still has room. Every length must be in 1..row_length.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    first_open = 0  # rows before it are full: first-fit need not look at them again
    for i, n in enumerate(lengths):
        start = first_open if method == "first_fit" else max(len(rows) - 1, 0)
        row = next((r for r in range(start, len(rows)) if room[r] >= n), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_length)
        rows[row].append(i)
        room[row] -= n
        while first_open < len(rows) and room[first_open] == 0:
            first_open += 1
    return rows


def pack(
    examples: Sequence[Example],
    length: int,
    *,
    pad_id: int,
    method: Literal["first_fit", "sequential"] = "first_fit",
    overlong: Literal["error", "drop"] = "error",
) -> tuple[PackedRows, PackingReport]:
    """Packs `examples` into rows of `length` tokens, deterministically, none cut.

    Raises ValueError for an empty example, a mask of another length, a target on a first token,
    nothing to pack, or (unless `overlong` is "drop", which counts it) one longer than a row.
    """
    if method not in ("first_fit", "sequential"):
        raise ValueError(f"method {method!r} is not first_fit or sequential")
    if overlong not in ("error", "drop"):
        raise ValueError(f"overlong {overlong!r} is not error or drop")
    kept = []
    for i, example in enumerate(examples):
        n = len(example.tokens)
        if n == 0 or len(example.loss_mask) != n:
            raise ValueError(f"example {i}: {n} tokens with a mask of {len(example.loss_mask)}")
        if example.loss_mask[0]:
            raise ValueError(f"example {i}: its first token is a target, nothing predicts it")
        if n <= length:
            kept.append(example)
        elif overlong == "error":
            raise ValueError(f"example {i} has {n} tokens, a row holds {length}")
    if not kept:
        raise ValueError(f"nothing to pack: {len(examples)} examples, none fits in {length}")
    rows = assign_rows([len(e.tokens) for e in kept], length, method)
    tokens = np.full((len(rows), length), pad_id, np.int32)
    loss_mask = np.zeros((len(rows), length), np.float32)
    segment_ids = np.zeros((len(rows), length), np.int32)
    positions = np.zeros((len(rows), length), np.int32)
    for r, members in enumerate(rows):
        start = 0
        for segment, i in enumerate(members, start=1):
            stop = start + len(kept[i].tokens)
            tokens[r, start:stop] = kept[i].tokens
            loss_mask[r, start:stop] = kept[i].loss_mask
            segment_ids[r, start:stop] = segment
            positions[r, start:stop] = np.arange(stop - start)
            start = stop
    report = PackingReport(
        examples=len(examples),
        dropped=len(examples) - len(kept),
        rows=len(rows),
        fill=float((segment_ids > 0).mean()),
    )
    return PackedRows(tokens, loss_mask, segment_ids, positions), report


class BatchOrder:
    """Which items make up batch `step`, for any step, without end: a function of the seed alone.

    Every epoch visits each item once, in an order of its own (grain's shuffle); a batch may
    span two epochs. Random access makes the position of a run one number, its step.
    """

    def __init__(self, num_items: int, batch: int, seed: int):
        import grain  # here, not above: it brings JAX, which light users of this module shun

        if num_items < 1 or batch < 1:
            raise ValueError(f"{num_items} items in batches of {batch}: both must be at least 1")
        self.num_items, self.batch = num_items, batch
        self._order = grain.MapDataset.range(num_items).seed(seed).shuffle().repeat()

    def at(self, step: int) -> Int[np.ndarray, " B"]:
        """Item indices of batch `step` (from 0)."""
        first = step * self.batch
        return np.array([self._order[first + i] for i in range(self.batch)], np.int64)
