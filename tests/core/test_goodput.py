"""All of a run's wall time is somewhere: by a fake clock, and for processes that are killed."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pr2jax.core import goodput

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


def _known(found):
    return {name: s for name, s in found["activities"].items() if s}


def test_time_belongs_to_the_innermost_activity(tmp_path):
    clock = Clock(100.0)
    ledger = goodput.Ledger(tmp_path, began=95.0, clock=clock)  # 5 s of imports
    clock.now += 3
    ledger.started()
    for step in (1, 2):
        with ledger.during("learn"):
            clock.now += 2
            with ledger.during("generate"):
                clock.now += 5
                with ledger.during("verify"):
                    clock.now += 1
                clock.now += 0.5
            clock.now += 2
        ledger.step(tmp_path / "rl", step)
        clock.now += 0.25
    with ledger.during("checkpoint"):
        clock.now += 4
        assert ledger.doing == "checkpoint"
    ledger.close()
    found = goodput.summarize(goodput.read(tmp_path))
    assert _known(found) == {
        "startup": 8.0,
        "learn": 8.0,
        "generate": 11.0,
        "verify": 2.0,
        "other": 0.5,
        "checkpoint": 4.0,
    }
    assert found["seconds"] == 33.5
    assert found["goodput"] == pytest.approx(21 / 33.5, abs=1e-4)
    assert (found["processes"], found["steps"], found["redone"]) == (1, 2, 0)


def test_compiling_is_taken_out_of_what_it_happened_in(tmp_path):
    clock = Clock(0.0)
    ledger = goodput.Ledger(tmp_path, began=0.0, clock=clock)
    trace, build = goodput._COMPILING[0], goodput._COMPILING[2]
    with ledger.during("learn"):
        clock.now += 1
        clock.now += 2
        ledger._on_duration(trace, 2.0)  # a function traced within another
        clock.now += 1
        ledger._on_duration(trace, 4.0)  # the other: 4 s with those 2
        clock.now += 10
        ledger._on_duration(build, 10.0)
        clock.now += 3
        ledger._on_duration("/jax/something/else", 3.0)
    ledger.close()
    # The outer trace began with the step: all but the run's 3 s is compiling.
    assert _known(goodput.summarize(goodput.read(tmp_path))) == {"learn": 3.0, "compile": 14.0}


def test_a_program_that_is_really_compiled(tmp_path):
    with goodput.recording(tmp_path):
        with goodput.during("learn"):
            jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)(jnp.ones((7, 11))).block_until_ready()
        found = goodput.so_far()
    assert found["activities"]["compile"] > 0
    assert sum(found["activities"].values()) == pytest.approx(found["seconds"], abs=0.01)
    assert goodput.so_far() == {}  # nothing is recorded any more


def test_steps_done_again_and_the_time_without_a_process(tmp_path):
    clock = Clock(0.0)
    first = goodput.Ledger(tmp_path, began=0.0, clock=clock)
    first.started()
    for step in (1, 2, 3):
        with first.during("learn"):
            clock.now += 10
        first.step(tmp_path, step)
    clock.now += 6  # into step 4: killed there, its last row stands at 30
    first._rows.close()
    clock.now += 14
    second = goodput.Ledger(tmp_path, began=50.0, clock=clock)
    clock.now += 5
    second.started()
    for step in (2, 3, 4):
        with second.during("data"):
            clock.now += 1
        with second.during("learn"):
            clock.now += 9
        second.step(tmp_path, step)
    second.close()
    found = goodput.summarize(goodput.read(tmp_path))
    assert _known(found) == {
        "learn": 39.0,
        "data": 1.0,
        "redo": 20.0,
        "startup": 5.0,
        "wait": 20.0,
    }
    assert found["seconds"] == 85.0
    assert (found["processes"], found["steps"], found["redone"]) == (2, 4, 2)
    # Another stage's steps are others.
    third = goodput.Ledger(tmp_path, began=clock.now, clock=clock)
    third.step(tmp_path / "rl", 1)
    third.close()
    assert goodput.summarize(goodput.read(tmp_path))["redone"] == 2


@pytest.mark.parametrize("seed", range(5))
def test_any_nesting_and_any_kills_sum_to_the_whole(tmp_path, seed):
    draw, clock = random.Random(seed), Clock(1000.0)
    names = [n for n in goodput.ACTIVITIES if n not in ("redo", "wait", "startup")]

    def work(ledger, depth):
        for _ in range(draw.randrange(4)):
            clock.now += draw.random()
            if draw.random() < 0.2:
                ledger._on_duration(draw.choice(goodput._COMPILING), draw.random())
            if depth < 4:
                with ledger.during(draw.choice(names)):
                    work(ledger, depth + 1)

    first = clock.now
    for _ in range(4):
        ledger = goodput.Ledger(tmp_path, began=clock.now, clock=clock)
        ledger.started()
        for step in range(draw.randrange(1, 6)):
            work(ledger, 0)
            ledger.step(tmp_path, step + 1)
        ledger._rows.close()  # killed
        clock.now += draw.random() * 10
    rows = goodput.read(tmp_path)
    found = goodput.summarize(rows)
    assert found["seconds"] == pytest.approx(rows[-1]["time"] - first, abs=0.01)
    assert sum(found["activities"].values()) == pytest.approx(found["seconds"], abs=0.01)
    assert min(found["activities"].values()) >= 0
    for a, b in itertools.pairwise(rows):
        assert b["began"] == a["time"] or b["process"] != a["process"]


def test_a_torn_last_line_is_dropped(tmp_path):
    ledger = goodput.Ledger(tmp_path, began=0.0, clock=Clock(1.0))
    ledger.close()
    before = goodput.read(tmp_path)
    with open(tmp_path / goodput.FILE, "a") as file:
        file.write('{"process": 1, "began"')
    assert goodput.read(tmp_path) == before
    goodput.Ledger(tmp_path, began=2.0, clock=Clock(2.0)).close()
    lines = (tmp_path / goodput.FILE).read_text().splitlines()
    assert [json.loads(line)["process"] for line in lines] == [1, 1, 2, 2]


def test_an_unknown_activity():
    with pytest.raises(ValueError, match="'sleep' is none of"), goodput.during("sleep"):
        pass


RUN = """
    import sys, time
    from pr2jax.core import goodput
    with goodput.recording(sys.argv[1]):
        goodput.started()
        step = max((r.get("step", 0) for r in goodput.read(sys.argv[1])), default=0) // 4 * 4
        print("up", flush=True)
        while step < 12:
            with goodput.during("generate"):
                time.sleep(0.03)
            with goodput.during("learn"):
                time.sleep(0.02)
            step += 1
            goodput.step_done(sys.argv[1], step)
"""


@pytest.mark.slow
def test_real_processes_that_are_killed(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    began, gap, code = time.time(), 0.0, None
    for after in (0.28, 0.33, None):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        process.stdout.readline()
        if after is not None:
            time.sleep(after)
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        process.stdout.close()
        if after is not None:
            time.sleep(0.5)
            gap += 0.5
    ended = time.time()
    assert code == 0
    found = goodput.summarize(goodput.read(tmp_path))
    seconds = found["activities"]
    assert found["processes"] == 3
    assert found["steps"] == 12
    assert 0 < found["redone"] <= 6  # up to three for each kill
    assert sum(seconds.values()) == pytest.approx(found["seconds"], abs=0.02)
    # A process's start is known to a hundredth of a second; its exit is no more recorded.
    assert ended - began - 4 < found["seconds"] < ended - began + 0.05
    assert gap - 0.05 < seconds["wait"] < gap + 0.5
    assert seconds["startup"] > 0.5  # importing JAX, three times
    assert seconds["redo"] >= 0.05 * found["redone"] - 0.01
    assert seconds["generate"] + seconds["learn"] >= 0.05 * (12 - 1)
