"""Documents of a source, read through once: which are empty, and which are held out."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int, UInt64

from pr2jax.data.sources import DataError, Source, SourceConfig, open_source


@dataclasses.dataclass(frozen=True)
class Documents:
    """Documents of one source that hold any text.

    ids: their indices in the source. digests: 64 bits of a hash of each. bytes: of UTF-8 text.
    empty: how many documents were left out, holding nothing but white space.
    """

    name: str
    source: Source
    ids: Int[np.ndarray, " N"]
    digests: UInt64[np.ndarray, " N"]
    bytes: int
    empty: int

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> str:
        return self.source[int(self.ids[index])]

    def where(self, index: int) -> str:
        """The place of document `index`."""
        return self.source.where(int(self.ids[index]))

    def fingerprint(self) -> str:
        """Of all texts and their order."""
        return hashlib.blake2b(self.digests.tobytes(), digest_size=8).hexdigest()

    def subset(self, chosen: np.ndarray) -> Documents:
        """Those at the positions `chosen` (`bytes` and `empty` stay those of the whole)."""
        return dataclasses.replace(self, ids=self.ids[chosen], digests=self.digests[chosen])


def read_documents(sources: Mapping[str, SourceConfig]) -> list[Documents]:
    """Opens every source and reads every document once, so that a malformed one is told at the
    start and not hours later.

    Raises ConfigError ("NAME.key: why") or DataError ("NAME: place: why").
    """
    found = []
    for name, cfg in sources.items():
        try:
            found.append(_read(name, open_source(cfg)))
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        except ValueError as error:
            raise type(error)(f"{name}.{error}") from None
    return found


def _read(name: str, source: Source) -> Documents:
    ids, digests, size = [], [], 0
    for i in range(len(source)):
        text = source[i]
        if not text.strip():
            continue
        data = text.encode("utf-8")
        size += len(data)
        ids.append(i)
        digests.append(hashlib.blake2b(data, digest_size=8).digest())
    if not ids:
        raise DataError(f"all of its {len(source)} documents are empty")
    return Documents(
        name=name,
        source=source,
        ids=np.array(ids, np.int64),
        digests=np.frombuffer(b"".join(digests), np.uint64),
        bytes=size,
        empty=len(source) - len(ids),
    )


def split(documents: Documents, share: float) -> tuple[Documents, Documents]:
    """(to train on, held out): at least one each, the held-out ones by the smallest hashes.

    By the hash of the text, so that the copies of a document fall on the same side and documents
    added later move few others. Raises DataError where there are fewer than two different ones.
    """
    different = np.unique(documents.digests)
    if len(different) < 2:
        raise DataError(
            f"{documents.name}: {len(different)} document(s) leave nothing to hold out; "
            "give more files, or the separator between documents"
        )
    count = min(max(math.ceil(share * len(different)), 1), len(different) - 1)
    held = documents.digests <= different[count - 1]
    inside, out = np.flatnonzero(~held), np.flatnonzero(held)
    # In order of their hash: the first few are a fair sample whatever the files' order was.
    out = out[np.argsort(documents.digests[out], kind="stable")]
    return documents.subset(inside), documents.subset(out)
