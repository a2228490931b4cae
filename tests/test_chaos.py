"""Killing real processes, and whether the comparison would see a difference."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from pr2jax import chaos
from pr2jax.core.checkpoint import Checkpointer
from pr2jax.train import audit

ROOT = Path(__file__).resolve().parent.parent

# Steps of a tenth of a second, a row each; goes on where its ledger ends.
RUN = """
import sys, time, pathlib
folder = pathlib.Path(sys.argv[-1].partition("=")[2])
(folder / "checkpoints").mkdir(exist_ok=True)
rows = folder / "ledger.jsonl"
time.sleep(0.1)
with open(rows, "a") as out:
    for step in range(len(rows.read_text().splitlines()), 12):
        time.sleep(0.05)
        print('{"step": %d}' % step, file=out, flush=True)
        (folder / "checkpoints" / str(step)).mkdir()
"""


def test_torment_kills_as_often_as_it_is_told_and_comes_through(tmp_path):
    command = [sys.executable, "-c", RUN]
    runs = chaos.torment(
        command, tmp_path, 6, random.Random(0), dict(os.environ), say=lambda line: None
    )
    trials = runs["trials"]
    assert sum(len(t.kills) for t in trials) == 6
    for trial in [runs["whole"], *trials]:
        assert len((trial.workdir / "ledger.jsonl").read_text().splitlines()) == 12
    assert all(k.orphans == 0 for t in trials for k in t.kills)


def test_a_run_that_fails_by_itself_is_told(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with pytest.raises(RuntimeError, match="exit code 1\nno such thing"):
        chaos.torment(command, tmp_path, 1, random.Random(0), dict(os.environ), say=lambda s: None)


@pytest.fixture
def parent():
    """Starts a program that prints a line, and kills it at the end."""
    started = []

    def start(code):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True, cwd=ROOT
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            process.kill()


def test_descendants_are_found_and_orphans_counted(parent):
    child = "import time; print(1, flush=True); time.sleep(60)"
    process = parent(
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True).wait()"
    )
    process.stdout.readline()
    below = chaos.processes_below(process.pid)
    assert len(below) == 1
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert chaos.wait_for_orphans(below, seconds=0.3) == list(below)
    os.kill(next(iter(below)), signal.SIGKILL)
    assert chaos.wait_for_orphans(below, seconds=10) == []


def test_verifier_workers_end_with_a_killed_trainer(parent):
    process = parent(
        "from pr2jax.tasks.pool import VerifierPool\n"
        "from pr2jax.tasks.base import Problem\n"
        "import time\n"
        "pool = VerifierPool(workers=2, timeout_s=60, verifier='tests.test_chaos:slow')\n"
        "print(1, flush=True)\n"
        "pool.score_batch([(Problem('a', 'q', 'a', 'source'), 'x')] * 2)\n"
    )
    process.stdout.readline()
    limit = time.monotonic() + 60
    while len(below := chaos.processes_below(process.pid)) < 2 and time.monotonic() < limit:
        time.sleep(0.05)
    assert len(below) == 2
    time.sleep(1.0)  # one is amid an item, or still importing: both must end
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert chaos.wait_for_orphans(below, seconds=30) == []


def slow(problem, response):
    """A verifier that is busy when its trainer is killed."""
    time.sleep(60)


def _stage(folder, value=0.0, items=("a", "b"), loss=1.0, memory=0, steps=2):
    folder.mkdir()
    state = {"step": jnp.int32(steps), "params": {"w": jnp.array([1.0, value])}}
    extra = {"position": steps, "memory": {"m": memory}, "config": {}}
    with Checkpointer(folder / "checkpoints") as checkpoints:
        checkpoints.save(steps, state, extra)
    for name, row in (
        ("metrics.jsonl", {"loss": loss, "time": time.time(), "time/sample": time.time()}),
        ("ledger.jsonl", {"items": list(items)}),
    ):
        lines = [json.dumps({"step": s + 1} | row) + "\n" for s in range(steps)]
        (folder / name).write_text("".join(lines))
    (folder / "eval_end.json").write_text(json.dumps({"metrics": loss, "seconds": time.time()}))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"value": -0.0}, ["array params/w differs"]),  # equal as numbers, not as bits
        ({"memory": 1}, ["memory in the checkpoint differs"]),
        ({"steps": 1}, ["the last checkpoint is of step 1, not 2"]),
        (
            {"loss": 1.0000001},
            ["metrics.jsonl, step 1: loss differs", "metrics.jsonl, step 2: loss differs"],
        ),
        (
            {"items": ["b", "a"]},
            ["ledger.jsonl, step 1: items differs", "ledger.jsonl, step 2: items differs"],
        ),
    ],
)
def test_a_difference_is_seen(tmp_path, changes, said):
    whole, other = _stage(tmp_path / "a"), _stage(tmp_path / "b", **changes)
    assert audit.compare_stage(whole, other) == said
    expected = ["eval_end.json differs"] if "loss" in changes else []
    assert audit.compare_files(whole, other) == expected


def test_repeated_rows_leftovers_and_missing_files_are_seen(tmp_path):
    whole, other = _stage(tmp_path / "a"), _stage(tmp_path / "b")
    with open(other / "metrics.jsonl", "a") as out:
        out.write('{"step": 2, "loss": 1.0}\n')
    (other / "checkpoints" / "3.orbax-checkpoint-tmp-1").mkdir()
    (other / ".wall.json.77").write_text("half")
    (whole / "report.html").write_text("<html>")
    assert audit.compare_stage(whole, other) == [
        "metrics.jsonl: steps [1, 2, 2]",
        "3.orbax-checkpoint-tmp-1 was left behind",
        ".wall.json.77 was left behind",
    ]
    assert audit.compare_files(whole, other) == ["report.html is missing"]


@pytest.mark.parametrize(
    ("rows", "skipped", "twice"),
    [
        ([["a", "b"], ["c", "d"]], 0, 0),
        ([["b", "a"], ["d", "c"]], 0, 0),  # within a step the order is free
        ([["a", "b"], ["b", "d"]], 1, 1),
        ([["c", "d"], ["a", "b"]], 4, 4),
        ([["a", "b", "c"], ["d"]], 0, 0),
        ([["a", "a"], ["c", "d"]], 1, 1),
    ],
)
def test_the_ledger_is_held_against_the_order(tmp_path, monkeypatch, rows, skipped, twice):
    (tmp_path / "ledger.jsonl").write_text(
        "".join(
            json.dumps({"step": i, "items": r[:1], "filtered": r[1:]}) + "\n"
            for i, r in enumerate(rows, 1)
        )
    )
    monkeypatch.setattr(audit, "expected_items", lambda *_: list("abcdefgh")[: sum(map(len, rows))])
    found = audit.account(tmp_path, tmp_path, tmp_path)
    assert found == {"items": 4, "skipped": skipped, "twice": twice}


CONFIG = """
import dataclasses
from pr2jax.core.config import to_config_dict
from pr2jax.sampler.types import SamplingParams
from tests.train import tiny

def get_config(arg=""):
    cfg = tiny.config(mode=arg)
    # Answers that contain the right one score something: random parameters have a signal.
    task = dataclasses.replace(cfg.rl_task, partial_credit=1.0)
    rl = dataclasses.replace(
        cfg.rl, steps=10, eval_every=4, filter_zero_variance=True, dynamic_sampling=True
    )
    sft = dataclasses.replace(cfg.sft, steps=40, eval_every=15)
    return to_config_dict(dataclasses.replace(cfg, rl=rl, sft=sft, rl_task=task))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sft", "rl"])
def test_killed_runs_end_as_the_one_left_alone(mode, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pr2jax.chaos", f"--config={config}:{mode}", "--kills=3"),
            *(f"--workdir={tmp_path / 'runs'}", "--seed=1", f"--json={tmp_path / 'out.json'}"),
        ],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["equal"]
    assert sum(len(t["kills"]) for t in found["trials"]) == 3
    for trial in found["trials"]:
        assert trial["differences"] == []
        assert (trial["skipped"], trial["twice"], trial["orphans"]) == (0, 0, 0)
        assert trial["updates"] > 10
