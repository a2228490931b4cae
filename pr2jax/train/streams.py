"""A batch of documents' rows out of the parts that they are dealt into: of any number of hosts.

The documents are dealt into `parts` streams (by default one a host, at the run's first start), and
each gives its share of a batch's rows. A host reads those streams that its devices' rows come from:
so a batch is a function of documents, seed and parts, not of the hosts, and a run goes on with
fewer or more of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pr2jax.core import hosts
from pr2jax.core.config import ConfigError
from pr2jax.core.hosts import OwnHost
from pr2jax.data.packing import PackedRows
from pr2jax.data.stream import Batch, Piece, RowStream


class Streams:
    """This host's rows of every batch, and what all hosts' rows are made of.

    `make(part, parts, rows)` opens a stream of so many rows a batch.
    """

    def __init__(
        self, make: Callable[[int, int, int], RowStream], batch: int, rows: range, parts: int
    ):
        """`rows`: of a batch of `batch` rows, those that this host's devices hold.

        Raises ConfigError where the parts do not divide the batch.
        """
        self._make, self.batch, self.rows = make, batch, rows
        self._open(parts)

    def _open(self, parts: int) -> None:
        if self.batch % parts:
            raise ConfigError(f"batch: {self.batch} rows are not divided by {parts} parts")
        self.parts, self.each = parts, self.batch // parts
        mine = range(self.rows.start // self.each, -(-self.rows.stop // self.each))
        with hosts.together("opening the data"):
            self.streams = {part: self._make(part, parts, self.each) for part in mine}

    @property
    def position(self) -> int:
        """Batches read."""
        return next(iter(self.streams.values())).position

    def restart(self) -> None:
        """Goes back to the first batch."""
        for stream in self.streams.values():
            stream.restart()

    def __next__(self) -> tuple[OwnHost[PackedRows], list[list[Piece]]]:
        """This host's rows of the next batch, and the pieces of every row of the whole batch."""
        with hosts.together("reading the data"):
            found: list[Batch] = [next(stream) for stream in self.streams.values()]
        first = min(self.streams) * self.each
        pieces = [row for batch in found for row in batch.pieces]
        own = slice(self.rows.start - first, self.rows.stop - first)
        fields = zip(*(batch.rows for batch in found), strict=True)
        rows = PackedRows(*(np.concatenate(field)[own] for field in fields))
        return rows, self._of_all(first, pieces)

    def _of_all(self, first: int, pieces: list[list[Piece]]) -> list[list[Piece]]:
        if not hosts.several():
            return pieces
        whole: list[list[Piece]] = [[]] * self.batch
        for start, rows in hosts.gather([first, pieces]):
            for i, row in enumerate(rows):
                whole[start + i] = [Piece(*piece) for piece in row]
        return whole

    def state(self) -> list[str]:
        """Where every part's stream stands (of all hosts; all must call it)."""
        own = {str(part): stream.state() for part, stream in self.streams.items()}
        found: dict[str, str] = {}
        for told in hosts.gather(own):
            found |= told
        return [found[str(part)] for part in range(self.parts)]

    def restore(self, states: list[Any]) -> None:
        """Goes to where `state` was taken, in as many parts as there were."""
        if len(states) != self.parts:
            self._open(len(states))
        for part, stream in self.streams.items():
            stream.restore(states[part])
