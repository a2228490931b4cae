"""Every source against the bytes that were written; what is malformed is told with its place."""

import gzip
import json
import os
import sysconfig

import numpy as np
import pytest

from pr2jax.core.config import ConfigError
from pr2jax.data import corpus
from pr2jax.data.documents import read_documents, split
from pr2jax.data.sources import STDLIB, DataError, SourceConfig, open_source

TEXTS = ["one", "zwei\nZeilen\r\n", "三 🙂 \x00 end", " \n", "tab\there", 'quote " and \\']


def rows(texts):
    return [json.dumps({"id": i, "text": t, "body": t[::-1]}) for i, t in enumerate(texts)]


def all_of(source):
    return [source[i] for i in range(len(source))]


def test_a_document_a_file_and_folders_in_order(tmp_path):
    names = ["b/2.txt", "a.md", "b/10.txt", "c/d/e.txt"]
    for name, text in zip(names, TEXTS, strict=False):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / ".hidden").write_text("no")
    by_path = {str(tmp_path / name): text for name, text in zip(names, TEXTS, strict=False)}
    source = open_source(SourceConfig(str(tmp_path)))
    assert all_of(source) == [by_path[path] for path in sorted(by_path)]
    assert [source.where(i) for i in range(4)] == sorted(by_path)
    below = open_source(SourceConfig(str(tmp_path / "**" / "*.txt")))
    assert len(below) == 3
    assert open_source(SourceConfig(str(tmp_path / "a.md")))[0] == TEXTS[1]


@pytest.mark.parametrize("mark", ["\n\n", "<|doc|>", "☃"])
def test_documents_between_separators(mark, tmp_path):
    texts = ["first\nline", "", "三\n四", "last"]
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(mark.join(texts).encode())
    source = open_source(SourceConfig(str(tmp_path), separator=mark))
    assert all_of(source) == texts * 2
    line = mark.join(["first\nline", "", ""]).count("\n") + 1
    assert source.where(6) == f"{tmp_path}/b.txt:{line}"
    with pytest.raises(IndexError):
        source[8]


@pytest.mark.parametrize("packed", [False, True])
def test_jsonl(packed, tmp_path):
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    lines = rows(TEXTS)
    data = ("\n".join([*lines[:2], "", "  ", *lines[2:]])).encode()  # no line end at the end
    path.write_bytes(gzip.compress(data) if packed else data)
    source = open_source(SourceConfig(str(path)))
    assert all_of(source) == TEXTS
    assert [source[i] for i in (4, 0, 3)] == [TEXTS[i] for i in (4, 0, 3)]
    assert source.where(2) == f"{path}:5"
    assert all_of(open_source(SourceConfig(str(path), text_field="body"))) == [
        t[::-1] for t in TEXTS
    ]


def test_parquet_over_row_groups_and_files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for name, texts in (("a", TEXTS), ("b", TEXTS[::-1])):
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    source = open_source(SourceConfig(str(tmp_path)))
    assert all_of(source) == TEXTS + TEXTS[::-1]
    assert source.where(7) == f"{tmp_path}/b.parquet:2"


@pytest.mark.parametrize("field", ["", "body"])
def test_array_record(field, tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    for name in ("a", "b"):
        writer = ArrayRecordWriter(str(tmp_path / f"{name}.array_record"), "group_size:1")
        for text, row in zip(TEXTS, rows(TEXTS), strict=True):
            writer.write((row if field else text).encode())
        writer.close()
    source = open_source(SourceConfig(str(tmp_path), text_field=field))
    expected = [t[::-1] for t in TEXTS] if field else TEXTS
    assert all_of(source) == expected * 2
    assert source.where(8) == f"{tmp_path}/b.array_record:3"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "cut', "not JSON"),
        ('["text"]', "not a JSON object but list"),
        ('{"body": "x", "id": 1}', r"no field 'text' \(it has 'body', 'id'\)"),
        ('{"text": null}', "field 'text' is NoneType, not text"),
        ('{"text": 3}', "field 'text' is int, not text"),
        (b'{"text": "\xff"}', "not JSON"),
    ],
)
def test_a_malformed_row_is_told_with_file_and_line(line, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"^mine: {path}:3: {said}"):
        read_documents({"mine": SourceConfig(str(path))})


def test_other_malformed_files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def fails(name, said, **settings):
        with pytest.raises(ConfigError, match=rf"^s(: |\.).*{said}"):
            read_documents({"s": SourceConfig(str(tmp_path / name), **settings)})

    (tmp_path / "latin.txt").write_bytes("ok\nna\xefve".encode("latin-1"))
    fails("latin.txt", "latin.txt: line 2 of it is not UTF-8")
    (tmp_path / "no.jsonl.gz").write_bytes(b"plain")
    fails("no.jsonl.gz", "not a gzip file")
    (tmp_path / "no.parquet").write_bytes(b"plain")
    fails("no.parquet", "not a parquet file")
    (tmp_path / "no.array_record").write_bytes(b"plain" * 20000)
    fails("no.array_record", "not an ArrayRecord file")
    table = pyarrow.table({"text": ["a", None], "n": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "null.parquet")
    fails("null.parquet", "null.parquet:2: its text is null")
    fails("null.parquet", r"no column 'body' \(it has 'text', 'n'\)", text_field="body")
    fails("null.parquet", "column 'n' is int64, not text", text_field="n")
    fails("nowhere", "path: no file")
    fails("latin.txt", "text_field: a text file has no fields", text_field="x")
    fails("null.parquet", "separator: only for text files", separator="\n")
    fails("", "holds .* say format")
    (tmp_path / "blank.txt").write_text(" \n\t")
    fails("blank.txt", "all of its 1 documents are empty")


def test_empty_documents_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(rows(TEXTS)))
    (found,) = read_documents({"a": SourceConfig(str(tmp_path / "a.jsonl"))})
    kept = [t for t in TEXTS if t.strip()]
    assert [found[i] for i in range(len(found))] == kept
    assert found.empty == 1
    assert found.bytes == sum(len(t.encode()) for t in kept)
    assert found.where(3) == f"{tmp_path}/a.jsonl:5"


def test_held_out_documents_are_never_trained_on_nor_their_copies(tmp_path):
    texts = [f"document {i % 40}" for i in range(100)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    cfg = SourceConfig(str(tmp_path / "a.txt"), separator="\n")
    (found,) = read_documents({"a": cfg})
    train, held = split(found, 0.1)
    inside, out = {train[i] for i in range(len(train))}, {held[i] for i in range(len(held))}
    assert not inside & out
    assert len(out) == 4
    assert len(train) + len(held) == 100
    (tmp_path / "a.txt").write_text("\n".join(["new", *reversed(texts)]))
    again = split(read_documents({"a": cfg})[0], 0.1)[1]
    assert len({again[i] for i in range(len(again))} & out) >= 3
    (tmp_path / "a.txt").write_text("same\nsame")
    with pytest.raises(DataError, match=r"^a: 1 document\(s\) leave nothing to hold out"):
        split(read_documents({"a": cfg})[0], 0.1)


def test_the_embedded_corpus(tmp_path):
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    (tmp_path / "site-packages").mkdir()
    for name in ("pkg/m.py", "pkg/test/t.py", "site-packages/x.py", "a.txt", "b.so"):
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"\xff")
    found = [os.path.relpath(p, tmp_path) for p in corpus.stdlib_files(str(tmp_path))]
    assert found == ["a.txt", "pkg/m.py"]
    with pytest.raises(ConfigError, match="no sources"):
        corpus.stdlib_files(str(tmp_path / "pkg" / "test" / "nothing"))
    source = open_source(SourceConfig(STDLIB))
    files = [source.where(i) for i in range(len(source))]
    assert os.path.join(sysconfig.get_path("stdlib"), "argparse.py") in files
    assert not any("/site-packages/" in f or "/test/" in f for f in files)
    assert files == [*dict.fromkeys(files)]
    i = files.index(os.path.join(sysconfig.get_path("stdlib"), "json", "decoder.py"))
    assert source[i].encode() == np.fromfile(files[i], np.uint8).tobytes()
