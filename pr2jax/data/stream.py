"""Endless batches of packed rows out of a weighted mixture of documents; resumable anywhere.

The life of a document: shuffled among the others of its source, anew each epoch; this host's
slice of that order; tokens, with the first token where the tokenizer has one and the end token;
joined to the documents before it and cut into rows of fixed length (no slot stays empty). Rows of
the sources are then mixed by weight, so weights are shares of tokens, whatever the documents'
lengths. A cut document's pieces are segments of their own: no attention crosses a row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pr2jax.data.documents import Documents
from pr2jax.data.packing import PackedRows
from pr2jax.data.tokenizer import Tokenizer

# Documents read and tokenized ahead, by how many threads, for each source.
_AHEAD, _THREADS = 16, 2


class Piece(NamedTuple):
    """Tokens start..stop of a document, as one segment of a row; `epoch` of its source."""

    source: str
    document: int
    epoch: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.source}/{self.epoch}/{self.document}:{self.start}-{self.stop}"


@dataclasses.dataclass(frozen=True)
class Batch:
    """This host's rows of a batch and, row by row, the pieces that they are made of."""

    rows: PackedRows
    pieces: list[list[Piece]]

    @property
    def cut(self) -> int:
        """Segments that begin inside a document."""
        return sum(piece.start > 0 for row in self.pieces for piece in row)


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """A document's tokens: the first token where the tokenizer has one, the text, the end."""
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*first, *tokenizer.encode(text), tokenizer.eos_id]


class RowStream:
    """Batches of a mixture of sources, a function of the documents, the seed and the shard.

    Args:
      sources, weights: documents to train on, and the share of rows from each.
      batch: this host's rows a batch.
      shard: (index of this host, number of hosts): each reads every n-th document of the shuffled
        order, in each epoch another part.

    Raises ValueError where a source has fewer documents than there are hosts.
    """

    def __init__(
        self,
        sources: Sequence[Documents],
        weights: Sequence[float],
        tokenizer: Tokenizer,
        *,
        row_length: int,
        batch: int,
        seed: int,
        shard: tuple[int, int] = (0, 1),
    ):
        import grain  # here, not above: it brings JAX, which light users of this package shun

        self.sources, self.shard = list(sources), shard
        rows = []
        for number, documents in enumerate(self.sources):
            if len(documents) < shard[1]:
                raise ValueError(
                    f"{documents.name}: {len(documents)} documents for {shard[1]} hosts"
                )
            pieces = self._tokens(number, documents, tokenizer, seed)
            rows.append(
                grain.experimental.ConcatThenSplitIterDataset(
                    pieces, length_struct={"tokens": row_length, "origin": row_length}
                )
            )
        mixed = rows[0] if len(rows) == 1 else grain.IterDataset.mix(rows, list(weights))
        self._batches = mixed.batch(batch, drop_remainder=True)
        self.restart()

    def _tokens(self, number: int, documents: Documents, tokenizer: Tokenizer, seed: int):
        """Tokens of this host's documents without end, each with where it came from."""
        import grain

        index, count = self.shard
        own = len(range(index, len(documents), count))

        def tokens(i: int, document: int) -> dict[str, np.ndarray]:
            try:
                ids = encode_document(tokenizer, documents[document])
            except ValueError as error:  # a character that the tokenizer has not
                raise ValueError(f"{documents.where(document)}: {error}") from None
            origin = np.empty((len(ids), 4), np.int64)
            origin[:, :3] = number, document, i // own
            origin[:, 3] = np.arange(len(ids))
            return {"tokens": np.array(ids, np.int32), "origin": origin}

        order = grain.MapDataset.range(len(documents)).seed(_seed(seed, documents.name)).shuffle()
        return (
            order[index::count]
            .repeat()
            .map_with_index(tokens)
            .to_iter_dataset(grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD))
        )

    def restart(self) -> None:
        """Goes back to the first batch."""
        self.position = 0
        self._iterator = iter(self._batches)

    def __next__(self) -> Batch:
        found = next(self._iterator)
        self.position += 1
        segments = found["tokens_segment_ids"]
        positions = found["tokens_positions"]
        rows = PackedRows(
            tokens=found["tokens"],
            # Whatever has a token before it in its segment is a target.
            loss_mask=(positions > 0).astype(np.float32),
            segment_ids=segments,
            positions=positions,
        )
        pieces = [self._pieces(*row) for row in zip(found["origin"], positions, strict=True)]
        return Batch(rows, pieces)

    def _pieces(self, origin: np.ndarray, positions: np.ndarray) -> list[Piece]:
        starts = np.flatnonzero(positions == 0).tolist()
        found = []
        for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True):
            source, document, epoch, first = origin[start].tolist()
            name = self.sources[source].name
            found.append(Piece(name, document, epoch, first, first + stop - start))
        return found

    def state(self) -> str:
        """Where the stream stands, as JSON of some hundred characters a source."""
        return json.dumps({"position": self.position, "grain": self._iterator.get_state()})

    def restore(self, state: str) -> None:
        """Goes to where `state` was taken: the next batches are the same, bit for bit."""
        found = json.loads(state)
        self._iterator.set_state(_restorable(found["grain"]))
        self.position = found["position"]


def _restorable(value: Any) -> Any:
    """JSON turned pairs into lists; grain's packing tells "no remainder" by the tuple (-1, -1)."""
    if isinstance(value, dict):
        return {k: _restorable(v) for k, v in value.items()}
    if isinstance(value, list):
        made = [_restorable(v) for v in value]
        return tuple(made) if all(isinstance(v, int) for v in made) else made
    return value


def _seed(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1  # 31 bits: grain's shuffle takes no more
