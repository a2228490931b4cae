"""Curation as a whole: rows in, rows and reasons out, and the same after a kill."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pyarrow.parquet
import pytest

from pr2jax.benchmark.planted import Planted
from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.tasks.filters import CurateConfig
from pr2jax.tasks.rows import RowError, parse_row
from pr2jax.train.config import Config
from pr2jax.train.curate import run_curate
from tests.train.test_configs import load

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / "tests" / "train" / "curation"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(workdir):
    found = []
    for path in sorted((workdir / "data").glob("*.parquet")):
        found += pyarrow.parquet.read_table(path).to_pylist()
    return found


def reasons(workdir):
    return {
        (Path(row["row"]).name, row["reason"], Path(row.get("of", "-")).name)
        for row in lines(workdir / "dropped.jsonl")
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(question, truth="1", source="math__own", **more):
    prompt = [{"role": "user", "content": question}]
    ground = {"ground_truth": truth}
    return {"prompt": prompt, "data_source": source, "reward_model": ground} | more


def curate(workdir, **settings):
    cfg = Config(mode="curate", curate=CurateConfig(**settings))
    cfg.curate.validate()
    run_curate(cfg, str(workdir))
    return json.loads((workdir / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The smoke run of configs/curate.py: what it must do was worked out by hand."""
    workdir = tmp_path_factory.mktemp("small")
    run_curate(load("curate", "smoke"), str(workdir))
    return workdir


def test_each_rule_takes_its_row(small):
    assert reasons(small) == {
        ("first.jsonl:5", "too_easy", "-"),
        ("first.jsonl:6", "too_hard", "-"),
        ("second.parquet:1", "exact", "first.jsonl:1"),
        ("second.parquet:2", "contained", "first.jsonl:2"),
        ("second.parquet:3", "near", "first.jsonl:3"),
        ("second.parquet:4", "contaminated", "-"),
    }
    bad = [(Path(r["path"]).name, r["line"]) for r in lines(small / "malformed.jsonl")]
    assert bad == [("first.jsonl", 4), ("second.parquet", 6)]


def test_what_hit_what_is_told(small):
    [hit] = lines(small / "contamination.jsonl")
    assert hit["words"] == "a snail climbs up a wall of ten metres three metres each day"
    assert hit["item"] == "1"
    assert "which day" in hit["text"]
    assert "When does it reach" in hit["item_text"]
    [near] = lines(small / "near.jsonl")
    # 23 words and 3 marks are 24 runs of three; the first word is in one of them.
    assert near["similarity"] == pytest.approx(21 / 23, abs=1e-4)
    page = (small / "report.html").read_text(encoding="utf-8")
    assert hit["words"] in page
    assert "When does it reach" in page
    assert "Pass rates" in page


def test_summary_counts_every_row_once(small):
    summary = json.loads((small / "summary.json").read_text(encoding="utf-8"))
    counts = summary["rows"]
    assert counts["read"] == 14
    assert sum(v for k, v in counts.items() if k != "read") == 14
    for table in ("by_source", "by_file"):
        for key in counts:
            assert sum(r[key] for r in summary[table]) == counts[key]
    assert {r["domain"] for r in summary["by_source"]} == {"math", "science", "logic", "other"}
    assert summary["difficulty"]["qwen2.5_7b_pass_rate"]["rows"] == 11
    assert summary["peak_memory_bytes"] > 0


def test_rows_written_are_the_rows_read(small):
    found = rows_of(small)
    given = lines_of_inputs()
    kept = [0, 1, 2, 5, 10, 12]
    assert len(found) == len(kept)
    for row, number in zip(found, kept, strict=True):
        assert row["prompt"] == given[number]["prompt"]
        truth = given[number]["reward_model"]["ground_truth"]
        assert row["reward_model"]["ground_truth"] == str(truth)
        parse_row(load("curate", "smoke").rl_task, "row", row)
    one = pyarrow.dataset.dataset(small / "data", format="parquet")
    assert one.count_rows() == len(kept)


def lines_of_inputs():
    first = []
    for text in (SMALL / "first.jsonl").read_text().splitlines():
        try:
            first.append(json.loads(text))
        except ValueError:
            continue
    return first + pyarrow.parquet.read_table(SMALL / "second.parquet").to_pylist()


def test_the_earlier_set_wins(tmp_path):
    long = "How many days does it take the snail to climb out of the well?"
    one = write(tmp_path / "one.jsonl", [row(long), row("Name the largest prime below 100 please")])
    two = write(
        tmp_path / "two.jsonl", [row(f"Now: {long.upper()}"), row("largest prime below 100")]
    )
    assert curate(tmp_path / "a", inputs=(one, two))["rows"]["contained"] == 2
    assert {r["prompt"][0]["content"] for r in rows_of(tmp_path / "a")} == {
        *(long, "Name the largest prime below 100 please")
    }
    curate(tmp_path / "b", inputs=(two, one))
    assert {r["prompt"][0]["content"] for r in rows_of(tmp_path / "b")} == {
        *(f"Now: {long.upper()}", "largest prime below 100")
    }


def test_rates_of_rows_decide_and_rows_without_stay(tmp_path):
    words = ("alpha", "beta", "gamma", "delta")
    rates = ({"w": 0.9, "s": 1}, {"w": 0.85, "s": 0.00001}, {"w": 0.5, "s": 0.5}, {})
    given = [row(f"What is the {w} of it?", **r) for w, r in zip(words, rates, strict=True)]
    path = write(tmp_path / "a.jsonl", given)
    settings = {"difficulty": "columns", "weak_column": "w", "strong_column": "s"}
    summary = curate(tmp_path / "run", inputs=(path,), **settings)
    assert reasons(tmp_path / "run") == {
        ("a.jsonl:1", "too_easy", "-"),
        ("a.jsonl:2", "too_hard", "-"),
    }
    assert [r["w"] for r in rows_of(tmp_path / "run")] == [0.5, None]
    assert summary["difficulty"] == {
        "w": {"rows": 3, "mean": pytest.approx(0.75)},
        "s": {"rows": 3, "mean": pytest.approx(0.50000333)},
    }
    bad = write(tmp_path / "bad.jsonl", [row("What is it?", w=2.0), row("Who is it?")])
    with pytest.raises(RowError, match=r"bad\.jsonl: 1 of 2 .*w is 2\.0, not a share"):
        curate(tmp_path / "bad", inputs=(bad,), **settings)


def test_malformed_rows_are_an_error_from_a_share_on(tmp_path):
    given = [row("What is it?"), {"prompt": "x"}, row("Who is it?", truth=None)]
    path = write(tmp_path / "a.jsonl", given)
    with pytest.raises(RowError, match=r"a\.jsonl: 2 of 3 rows are malformed.*a\.jsonl:2: data_so"):
        curate(tmp_path / "run", inputs=(path,))
    # The work is there: only the limit is another.
    assert curate(tmp_path / "run", inputs=(path,), max_bad_share=0.7)["rows"]["malformed"] == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "curate.inputs: "),
        ({"inputs": ("/nowhere.jsonl",)}, r"curate.inputs\[0\]: no file /nowhere.jsonl"),
        ({"against": ("/nowhere.jsonl",)}, r"curate.against\[0\]: no file /nowhere.jsonl"),
        ({"against": ("nobody/knows",)}, r"curate.against\[0\]: nobody/knows: name: "),
    ],
)
def test_what_cannot_be_read_is_named(settings, said, tmp_path):
    path = write(tmp_path / "a.jsonl", [row("What is it?")])
    with pytest.raises(ConfigError, match=said):
        curate(tmp_path / "run", **({"inputs": (path,)} | settings if settings else {}))


def test_init_from_is_refused_and_settings_are_checked(tmp_path):
    cfg = dataclasses.replace(load("curate", "smoke"), init_from="x")
    with pytest.raises(ConfigError, match="init_from"):
        run_curate(cfg, str(tmp_path))
    with pytest.raises(ConfigError, match=r"^curate\.near: 2\.0"):
        from_config_dict(Config, {"mode": "curate", "curate": {"near": 2.0}})


# --- What was planted, and kills


PLANTED = Planted(2400, seed=3, items=40)
SHARD = 150


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(inputs, evaluation sets, the folder of a run that nobody stopped)."""
    folder = tmp_path_factory.mktemp("planted")
    inputs, sets = PLANTED.write(folder / "data")
    settings = {"inputs": tuple(inputs), "against": tuple(sets.values()), "shard_rows": SHARD}
    curate(folder / "run", **settings)
    return settings, folder / "run"


def test_what_was_planted_is_found(planted):
    _, workdir = planted
    found = PLANTED.compare(
        lines(workdir / "dropped.jsonl"), lines(workdir / "contamination.jsonl")
    )
    for kind, counts in found["planted"].items():
        assert counts["planted"] > 10
        assert counts["found"] >= (0.95 if kind == "near" else 1) * counts["planted"]
    assert found["fresh_dropped"] == 0
    assert found["false_hits"] == {"clean": 0, "leaked_but_not_planted": 0}
    partners = {r["row"]: r for r in lines(workdir / "dropped.jsonl") if "of" in r}
    assert all(
        PLANTED.number(r["of"]) == PLANTED.partner(PLANTED.number(where))
        for where, r in partners.items()
        if r["reason"] == "near"
    )


def fingerprint(workdir):
    names = [*sorted((workdir / "data").iterdir()), *sorted(workdir.glob("*.jsonl"))]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in names}


@pytest.mark.slow
def test_a_killed_run_goes_on_and_writes_the_same_bytes(planted, tmp_path):
    settings, whole = planted
    program = (
        "import json, sys\n"
        "from pr2jax.train.config import Config\n"
        "from pr2jax.tasks.filters import CurateConfig\n"
        "from pr2jax.train.curate import run_curate\n"
        "s = json.loads(sys.argv[1])\n"
        "s = {k: tuple(v) if isinstance(v, list) else v for k, v in s.items()}\n"
        "run_curate(Config(mode='curate', curate=CurateConfig(**s)), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", program, json.dumps(settings), str(tmp_path)]
    stages = tmp_path / "stages"
    parts = PLANTED.rows // SHARD
    made: dict[Path, int] = {}
    for seen in (
        stages / "read" / "part-00003.npz",
        stages / "contamination" / "part-00005.jsonl",
    ):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 120
        while not seen.exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        # Amid a stage, and with what was there before untouched.
        there = len(list(seen.parent.glob(f"part-*{seen.suffix}")))
        assert there < parts
        for path, at in made.items():
            assert path.stat().st_mtime_ns == at
        made = {p: p.stat().st_mtime_ns for p in stages.rglob("part-*") if p.suffix != ".json"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path) == fingerprint(whole)
    for path, at in made.items():
        assert path.stat().st_mtime_ns == at
    assert not [name for name in os.listdir(tmp_path / "data") if name.startswith(".")]


def test_other_settings_begin_anew_where_they_matter(planted, tmp_path):
    settings, _ = planted
    settings = settings | {"inputs": settings["inputs"][:1], "shard_rows": 500}
    before = curate(tmp_path, **settings)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "stages").rglob("part-*")}
    after = curate(tmp_path, **settings | {"ngram": 40})
    assert before["rows"]["contaminated"] > 0 == after["rows"]["contaminated"]
    assert len(rows_of(tmp_path)) == after["rows"]["kept"]
    for path, at in times.items():
        same = path.stat().st_mtime_ns == at
        assert same == (path.parent.name in ("read", "contained", "near"))


@pytest.mark.slow
def test_rates_are_measured_with_models(tmp_path):
    from tests.train.test_configs import main

    done = main("--config=configs/sft.py:smoke", f"--workdir={tmp_path / 'model'}")
    assert done.returncode == 0, done.stderr
    given = [row(f"{a} + {b} =", str(a + b)) for a in range(3, 8) for b in range(4)]
    given.append(row("1 + " * 60 + "1 =", "61"))
    path = write(tmp_path / "sums.jsonl", given)
    arguments = [
        "--config=configs/curate.py",
        f"--config.curate.inputs=('{path}',)",
        "--config.curate.near=0.0",
        "--config.curate.difficulty=models",
        f"--config.curate.weak={tmp_path / 'model'}",
        f"--config.curate.strong={tmp_path / 'model'}",
        "--config.curate.samples=4",
        "--config.curate.batch=8",
        "--config.curate.too_hard=0.0",
        "--config.sampler.slots=16",
        "--config.sampler.max_prompt=32",
        "--config.sampler.max_tokens=4",
        "--config.eval.sampling.max_tokens=4",
    ]
    done = main(*arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "run" / "summary.json").read_text())["rows"]
    assert counts["too_long"] == 1
    # Two steps of training add nothing up: almost all are too hard, none too easy.
    assert counts["too_hard"] + counts["kept"] == 20
    rates = [r["weak_pass_rate"] for r in rows_of(tmp_path / "run")]
    assert all(rate in (0.0, 0.25, 0.5, 0.75, 1.0) for rate in rates)
    # A part that is lost is measured again, the same.
    lost = tmp_path / "run" / "stages" / "difficulty" / "weak-000001.npz"
    with np.load(lost) as found:
        before = dict(found)
    lost.unlink()
    done = main(*arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    with np.load(lost) as found:
        np.testing.assert_array_equal(found["rates"], before["rates"])
