"""Held-out documents as rows in which every token but a document's first is a target, once."""

from __future__ import annotations

from typing import NamedTuple

from pr2jax.data.documents import Documents
from pr2jax.data.packing import Example, PackedRows, pack
from pr2jax.data.stream import encode_document
from pr2jax.data.tokenizer import Tokenizer


class HeldOut(NamedTuple):
    """Rows to score. bytes: of UTF-8 that the targets spell, so that
    bits per byte = nats / ln 2 / bytes, whatever the tokenizer."""

    name: str
    rows: PackedRows
    bytes: int
    documents: int


def held_out_rows(
    documents: Documents, tokenizer: Tokenizer, *, row_length: int, limit: int
) -> HeldOut:
    """The first documents, as many as fill about `limit` rows; the last one may be cut short.

    A document longer than a row is cut into pieces of which each repeats the token before it, as
    context: no token goes without a prediction because of where a row ended. Where the tokenizer
    has no first token, a document's own first token is no target, nor are its bytes counted.
    """
    room, examples, size, count = limit * row_length, [], 0, 0
    for i in range(len(documents)):
        text = documents[i]
        ids = encode_document(tokenizer, text)
        whole = len(ids) <= room
        ids = ids[:room]
        if len(ids) < 2:
            break
        spelled = text if whole else tokenizer.decode(ids)
        skipped = "" if tokenizer.bos_id is not None else tokenizer.decode(ids[:1])
        size += len(spelled.encode("utf-8")) - len(skipped.encode("utf-8"))
        count += 1
        room -= len(ids)
        for start in range(0, len(ids) - 1, row_length - 1):
            piece = ids[start : start + row_length]
            examples.append(Example(piece, [0] + [1] * (len(piece) - 1)))
    rows, _ = pack(examples, row_length, pad_id=tokenizer.pad_id)
    return HeldOut(documents.name, rows, size, count)
