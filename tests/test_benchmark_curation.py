"""The planted rows that curation is held against, and the command around them."""

import itertools
import json

import pytest

from pr2jax.benchmark import __main__ as cli
from pr2jax.benchmark import curation
from pr2jax.benchmark.planted import REASONS, SHARES, SIMILARITY, Planted
from pr2jax.benchmark.sides import BenchmarkError

SET = Planted(1500, seed=1, items=30)
ROWS = {kind: [i for i in range(SET.rows) if SET.kind(i) == kind] for kind in ("fresh", *SHARES)}


def norm(text):
    return " ".join(text.lower().split())


def shingles(text):
    tokens, word = [], ""
    for c in [*norm(text), " "]:
        if c.isalnum():
            word += c
            continue
        tokens += [word] * bool(word) + [c] * (c != " ")
        word = ""
    return {tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)}


def test_each_kind_is_what_it_says():
    for kind, rows in ROWS.items():
        assert rows
        for row in rows[:20]:
            text = norm(SET.text(row))
            if kind in ("fresh", "leak"):
                continue
            base = norm(SET.text(SET.partner(row)))
            assert SET.kind(SET.partner(row)) == "fresh"
            assert (text == base) == (kind == "exact")
            assert kind != "inside" or text in base
            assert kind != "around" or base in text
            if kind == "near":
                a, b = shingles(text), shingles(base)
                assert len(a & b) / len(a | b) >= SIMILARITY


def test_leaks_are_of_the_leaked_set_alone():
    runs = lambda text: {
        tuple(w[i : i + 13]) for w in [norm(text).split()] for i in range(len(w) - 12)
    }
    leaked, clean = (
        set(itertools.chain.from_iterable(runs(SET.item(name, i)) for i in range(SET.items)))
        for name in ("leaked", "clean")
    )
    for row in ROWS["leak"]:
        assert runs(SET.text(row)) & leaked
    # Instructions are common to all, as they are in real sets: that is what the rule must see.
    assert any(runs(SET.text(row)) & clean for row in ROWS["fresh"])


def test_rows_are_found_again_where_they_stand(tmp_path):
    small = Planted(50, items=3)
    paths, sets = small.write(tmp_path)
    numbers = [small.number(f"{path}:{i + 1}") for path, n in zip(paths, (20, 15, 15), strict=True)
               for i in range(n)]  # fmt: skip
    assert numbers == list(range(50))
    assert set(sets) == {"leaked", "clean"}
    line = (tmp_path / "second.jsonl").read_text().splitlines()[4]
    assert json.loads(line) == small.row(24)


def reasons_all_right():
    first = {kind: rows[0] for kind, rows in ROWS.items()}
    del first["fresh"]
    where = {i: f"first.parquet:{i + 1}" for i in range(600)}
    where |= {i: f"second.jsonl:{i - 599}" for i in range(600, 1050)}
    where |= {i: f"third.parquet:{i - 1049}" for i in range(1050, 1500)}
    dropped = [
        {"row": where[row], "reason": REASONS[kind][0]}
        for kind, rows in ROWS.items()
        if kind != "fresh"
        for row in rows
    ]
    return where, dropped


def test_what_is_missed_or_made_up_is_told():
    where, dropped = reasons_all_right()
    hits = [{"row": where[row], "set": "x/leaked.jsonl"} for row in ROWS["leak"]]
    found = SET.compare(iter(dropped), iter(hits))
    curation._check(found)
    assert found["fresh_dropped"] == 0
    assert found["planted"]["near"] == {
        "planted": len(ROWS["near"]),
        "found": len(ROWS["near"]),
        "dropped_otherwise": 0,
    }
    with pytest.raises(BenchmarkError, match="exact"):
        curation._check(SET.compare(iter(d for d in dropped if d["reason"] != "exact"), iter(hits)))
    clean = {"row": where[ROWS["fresh"][0]], "set": "x/clean.jsonl"}
    with pytest.raises(BenchmarkError, match="called a leak"):
        curation._check(SET.compare(iter(dropped), iter([*hits, clean])))
    false = clean | {"set": "x/leaked.jsonl"}
    assert SET.compare(iter(dropped), iter([false]))["false_hits"]["leaked_but_not_planted"] == 1


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert cli.main(["curate", "--smoke", f"--json={file}"]) == 0
    assert "hits in the clean set: 0" in capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report["command"] == "curate"
    found = report["curation"]
    assert found["rows"] == 2000
    assert sum(v for k, v in found["dropped"].items() if k != "read") == 2000
    assert found["peak_rss_bytes"] > 1e8
