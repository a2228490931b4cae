"""Random-access documents out of text, JSONL, parquet and ArrayRecord files.

A source has a length, `source[i]` is document i's text, and `source.where(i)` names its place
(file:line, file:row, file:record) for messages. All are safe to read from several threads.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np

from pr2jax.core.config import ConfigError
from pr2jax.core.fetch import fetched
from pr2jax.data import corpus

Format = Literal["auto", "text", "jsonl", "parquet", "array_record"]

STDLIB = "stdlib:"
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
}


class DataError(ConfigError):
    """A document that cannot be read; the message starts with its place."""


class Source(Protocol):
    """Random access to documents."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str:
        """Document `index`. Raises DataError."""
        ...

    def where(self, index: int) -> str:
        """Its file, and line, row or record (from 1) where the file holds several."""
        ...


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of documents.

    Attributes:
      path: a file, a folder (all files below it, hidden ones left out), a glob (`**` crosses
        folders), or "stdlib:", the Python standard library's sources and texts on this machine.
      format: what the files are; "auto" goes by their suffix (.jsonl, .jsonl.gz, .parquet,
        .array_record; anything else is text).
      text_field: the field or column that holds the text. Empty: "text" for jsonl and parquet,
        and in ArrayRecord the record itself (UTF-8); with a field there a record is a JSON object.
      separator: text files hold one document each, or several with this between them.
      weight: this source's share of the training rows, relative to the others' weights.
    """

    path: str = ""
    format: Format = "auto"
    text_field: str = ""
    separator: str = ""
    weight: float = 1.0

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        if self.weight <= 0:
            raise ConfigError(f"weight: must be above 0, got {self.weight}")
        if self.path == STDLIB and (self.format != "auto" or self.text_field or self.separator):
            raise ConfigError(f"path: {STDLIB} takes no format, text_field or separator")


def open_source(cfg: SourceConfig) -> Source:
    """The documents that `cfg` describes, in the order of their sorted paths.

    Text with a separator, JSONL and parquet are read once here, to find where documents begin
    (parquet's text column is copied to a temporary Arrow file, a .gz decompressed to one).
    Raises ConfigError("key: why"), or DataError naming file and line.
    """
    cfg.validate()
    if cfg.path == STDLIB:
        return _Files([TextFile(path, "") for path in corpus.stdlib_files()])
    paths = find_files(cfg.path)
    kind = _format(cfg, paths)
    if cfg.separator and kind != "text":
        raise ConfigError(f"separator: only for text files, not {kind}")
    if cfg.text_field and kind == "text":
        raise ConfigError("text_field: a text file has no fields")
    field = cfg.text_field or ("" if kind == "array_record" else "text")
    if kind == "text":
        return _Files([TextFile(path, cfg.separator) for path in paths])
    reader = {"jsonl": JsonLinesFile, "parquet": ParquetFile, "array_record": ArrayRecordFile}
    return _Files([reader[kind](path, field) for path in paths])


def find_files(path: str) -> list[str]:
    """Files meant by a path, folder or glob, sorted. Raises ConfigError("path: why")."""
    if not path:
        raise ConfigError("path: which files? (a file, a folder, a glob, or stdlib:)")
    path = fetched(os.path.expanduser(path))
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = []
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [os.path.join(folder, n) for n in names if not n.startswith(".")]
    else:
        found = glob.glob(path, recursive=True)
    found = sorted(p for p in found if os.path.isfile(p))
    if not found:
        raise ConfigError(f"path: no file at {path}")
    return found


def _format(cfg: SourceConfig, paths: Sequence[str]) -> str:
    if cfg.format != "auto":
        return cfg.format
    first: dict[str, str] = {}
    for path in paths:
        kind = next((k for end, k in _SUFFIXES.items() if path.endswith(end)), "text")
        first.setdefault(kind, path)
    if len(first) > 1:
        (a, one), (b, other) = list(first.items())[:2]
        raise ConfigError(
            f"path: {cfg.path} holds {a} ({one}) and {b} ({other}); give a glob, or say format"
        )
    return next(iter(first))


class _Files:
    """Sources one after the other."""

    def __init__(self, parts: Sequence[Source]):
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str:
        part, inside = self._place(index)
        return part[inside]

    def where(self, index: int) -> str:
        part, inside = self._place(index)
        return part.where(inside)

    def _place(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[which], int(index - (self._ends[which - 1] if which else 0))


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where}: line {line} of it is not UTF-8 text ({error.reason})") from None


class TextFile:
    """A text file as one document, or cut at every `separator` (which belongs to neither side)."""

    def __init__(self, path: str, separator: str):
        self.path = path
        self._spans: list[tuple[int, int]] | None = None
        if separator:
            mark = separator.encode("utf-8")
            with open(path, "rb") as file:
                pieces = file.read().split(mark)
            starts = np.cumsum([0] + [len(p) + len(mark) for p in pieces[:-1]]).tolist()
            self._spans = [(a, a + len(p)) for a, p in zip(starts, pieces, strict=True)]

    def __len__(self) -> int:
        return 1 if self._spans is None else len(self._spans)

    def __getitem__(self, index: int) -> str:
        with open(self.path, "rb") as file:
            if self._spans is None:
                return _decode(file.read(), self.path)
            start, stop = self._spans[index]
            file.seek(start)
            data = file.read(stop - start)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return _decode(data, self.where(index))  # which reads the file to count lines

    def where(self, index: int) -> str:
        if self._spans is None:
            return self.path
        with open(self.path, "rb") as file:
            line = file.read(self._spans[index][0]).count(b"\n") + 1
        return f"{self.path}:{line}"


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object but {type(row).__name__}")
    if field not in row:
        raise DataError(f"{where}: no field {field!r} (it has {', '.join(map(repr, row))})")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: field {field!r} is {type(row[field]).__name__}, not text")
    return row[field]


def _json_text(data: bytes, field: str, where: str) -> str:
    try:
        row = json.loads(data)
    except ValueError as error:  # of the encoding or of the JSON
        raise DataError(f"{where}: not JSON ({error})") from None
    return _field(row, field, where)


class JsonLinesFile:
    """A JSON object a line (.gz: compressed); empty lines are no documents."""

    def __init__(self, path: str, field: str):
        self.path, self.field, self._unpacked = path, field, None
        if path.endswith(".gz"):
            # Unlinked at once: it is gone when the process ends, however it ends.
            self._unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the source)
            try:
                with gzip.open(path, "rb") as packed:
                    shutil.copyfileobj(packed, self._unpacked)
            except (OSError, EOFError) as error:
                raise DataError(f"{path}: not a gzip file ({error})") from None
            self._unpacked.flush()
        spans, lines, at = [], [], 0
        with self._open() as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    spans.append((at, len(line)))
                    lines.append(number)
                at += len(line)
        self._spans = np.array(spans, np.int64).reshape(-1, 2)
        self._lines = np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> str:
        start, size = (int(n) for n in self._spans[index])
        if self._unpacked is None:
            with self._open() as file:
                file.seek(start)
                data = file.read(size)
        else:  # pread: threads share the file without sharing a position in it
            data = os.pread(self._unpacked.fileno(), size, start)
        return _json_text(data, self.field, self.where(index))

    def _open(self) -> BinaryIO:
        if self._unpacked is None:
            return open(self.path, "rb")
        self._unpacked.seek(0)  # the copy shares its position
        return open(os.dup(self._unpacked.fileno()), "rb")

    def where(self, index: int) -> str:
        return f"{self.path}:{self._lines[index]}"


class ParquetFile:
    """A parquet file's text column.

    Parquet cannot give one row without decoding its row group, so the column is copied once to a
    temporary Arrow file, which is mapped into memory.
    """

    def __init__(self, path: str, field: str):
        import pyarrow
        import pyarrow.parquet

        self.path = path
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a parquet file ({error})") from None
        names = file.schema_arrow.names
        if field not in names:
            raise DataError(f"{path}: no column {field!r} (it has {', '.join(map(repr, names))})")
        kind = file.schema_arrow.field(field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{path}: column {field!r} is {kind}, not text")
        schema = pyarrow.schema([pyarrow.field(field, kind)])
        with tempfile.TemporaryDirectory() as folder:
            copy = os.path.join(folder, "column.arrow")
            with pyarrow.ipc.new_file(copy, schema) as out:
                for batch in file.iter_batches(batch_size=4096, columns=[field]):
                    out.write_batch(pyarrow.record_batch([batch.column(0)], schema=schema))
            # The mapping outlives the file's name.
            opened = pyarrow.ipc.open_file(pyarrow.memory_map(copy))
            self._batches = [
                opened.get_batch(i).column(0) for i in range(opened.num_record_batches)
            ]
        self._ends = np.cumsum([len(batch) for batch in self._batches] or [0])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str:
        which = int(np.searchsorted(self._ends, index, side="right"))
        inside = int(index - (self._ends[which - 1] if which else 0))
        text = self._batches[which][inside].as_py()
        if text is None:
            raise DataError(f"{self.where(index)}: its text is null")
        return text

    def where(self, index: int) -> str:
        return f"{self.path}:{index + 1}"


class ArrayRecordFile:
    """An ArrayRecord file: each record is a text, or with `field` a JSON object that holds it."""

    def __init__(self, path: str, field: str):
        import grain  # brings JAX, which light users of this package shun

        self.path, self.field = path, field
        try:
            self._records = grain.sources.ArrayRecordDataSource(path)
            self._size = len(self._records)
        except Exception as error:  # the library raises what its C++ gives
            raise DataError(f"{path}: not an ArrayRecord file ({error})") from None

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> str:
        data = self._records[index]
        if self.field:
            return _json_text(data, self.field, self.where(index))
        return _decode(data, self.where(index))

    def where(self, index: int) -> str:
        return f"{self.path}:{index + 1}"
