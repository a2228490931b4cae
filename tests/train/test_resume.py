"""A run that ends anywhere and starts again ends as one that never did.

Here a fault is an exception raised inside the process, at every place where a run could be cut;
`tests/test_chaos.py` kills real processes.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import os
import subprocess
import zlib

import jax
import numpy as np
import pytest

from pr2jax.core.checkpoint import Checkpointer, CheckpointError, read_arrays
from pr2jax.core.files import remove_leftovers
from pr2jax.core.metrics import MetricWriter, read_jsonl
from pr2jax.data.packing import BatchOrder
from pr2jax.tasks.base import Verdict
from pr2jax.tasks.registry import build_task
from pr2jax.train import journal, loop
from pr2jax.train.evaluator import Evaluator
from pr2jax.train.rl import RLTrainer
from pr2jax.train.session import open_session
from pr2jax.train.sft import SFTTrainer
from tests.train import tiny


class Killed(BaseException):
    """What no handler of the project expects."""


class Pool:
    """Scores by a function of problem and response."""

    def __init__(self):
        self.stats = dict.fromkeys(("timeouts", "crashes", "memory", "errors"), 0)

    def score_batch(self, items):
        draw = [zlib.crc32(f"{problem.id} {text}".encode()) for problem, text in items]
        return [Verdict(float(d % 5 == 0), str(d)) for d in draw]

    def close(self):
        """There is nothing to stop."""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    config = tiny.config()
    # The predictor's features are in the journal; dynamic sampling makes the position state.
    config = dataclasses.replace(
        config,
        rl=dataclasses.replace(
            config.rl, filter_zero_variance=True, dynamic_sampling=True, max_refills=1, eval_every=3
        ),
    )
    folder = tmp_path_factory.mktemp("session")
    with open_session(config, folder, jax.devices()[:1]) as session:
        # A policy of random parameters solves nothing; these scores have it learn.
        session.__dict__["pool"] = Pool()
        yield session


@functools.cache
def _compiled(kind, session):
    task = build_task(session.cfg.rl_task)
    if kind == "sft":
        return SFTTrainer(session, task.train, steps=4, evaluator=None)
    return RLTrainer(session, task.train, Evaluator(session, task.held_out))


def _trainer(kind, session):
    """A trainer to change at will; its programs are compiled once for the module."""
    trainer = copy.copy(_compiled(kind, session))
    if kind == "rl":
        trainer.source = copy.copy(trainer.source)
        trainer.source.position = 0
    return trainer


def _run(trainer, session, folder):
    return loop.run(
        trainer,
        trainer.initial_state(session.initial_params()),
        workdir=folder,
        options=session.cfg.loop,
        config=session.config_json,
        best_metric="eval/pass@1",
    )


def _after(calls):
    """A function that raises Killed at its `calls`-th call (from 1)."""
    left = [calls]

    def fault():
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    return fault


def _cut(owner, name, calls, monkeypatch, late=False):
    """Has owner.name raise at a call, before it does anything or (late) once it is through."""
    inner, fault = getattr(owner, name), _after(calls)

    def cut(*args, **kwargs):
        if not late:
            fault()
        out = inner(*args, **kwargs)
        if late:
            fault()
        return out

    monkeypatch.setattr(owner, name, cut)


def _tear(owner, calls, monkeypatch):
    """Has the rows that `owner` writes end in half a line, at a call."""
    inner, fault = owner.write, _after(calls)

    def write(self, row):
        try:
            fault()
        except Killed:
            self._file.write(json.dumps(row)[:9])
            self._file.flush()
            raise
        inner(self, row)

    monkeypatch.setattr(owner, "write", write)


def _half(monkeypatch):
    """Has the third entry of the journal end in the middle, under its temporary name."""
    inner, fault = journal.replacing, _after(3)

    @contextlib.contextmanager
    def replacing(path):
        try:
            fault()
        except Killed:
            path.with_name(f".{path.name}.{_dead()}").write_bytes(b"half of it")
            raise
        with inner(path) as file:
            yield file

    monkeypatch.setattr(journal, "replacing", replacing)


PHASES = {
    "sft": ("step", "after step", "metrics row", "ledger row", "checkpoint", "after checkpoint"),
    "rl": (
        *("sample", "grade", "journal", "journal half", "learn", "mini-step", "after step"),
        *("metrics row", "ledger row", "evaluate", "checkpoint", "after checkpoint", "trim"),
    ),
}


def _inject(phase, trainer, session, patch):
    source = getattr(trainer, "source", None)
    # Step 3, the one after the first checkpoint; the ledger's and the metrics' rows take turns.
    if phase == "step":
        _cut(trainer, "_step", 3, patch)
    elif phase == "after step":
        _cut(trainer, "step", 3, patch, late=True)
    elif phase == "sample":
        _cut(source, "_make", 3, patch)
    elif phase == "grade":
        _cut(session.pool, "score_batch", 4, patch)
    elif phase == "journal":
        _cut(source, "_record", 3, patch)
    elif phase == "journal half":
        _half(patch)
    elif phase == "learn":
        _cut(trainer, "_learn", 3, patch)
    elif phase == "mini-step":
        _cut(trainer, "_mini", 6, patch)
    elif phase == "metrics row":
        _tear(loop.RowWriter, 6, patch)
    elif phase == "ledger row":
        _tear(loop.RowWriter, 5, patch)
    elif phase == "evaluate":
        _cut(trainer, "evaluate", 2, patch)
    elif phase == "checkpoint":
        _cut(Checkpointer, "save", 2, patch)
    elif phase == "after checkpoint":
        _cut(Checkpointer, "save", 1, patch, late=True)
    elif phase == "trim":
        _cut(source, "trim_journal", 1, patch)
    else:
        raise AssertionError(phase)


def _figures(row):
    timed = ("time", "tokens_per_second", "compilations")
    return {
        k: v for k, v in row.items() if k not in timed and not k.startswith(("time/", "journal/"))
    }


@functools.cache
def _whole(kind, session, folder):
    return _run(_trainer(kind, session), session, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "phase"), [(kind, phase) for kind, phases in PHASES.items() for phase in phases]
)
def test_cut_anywhere_ends_equal(session, kind, phase, tmp_path, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / f"whole_{kind}"
    whole = _whole(kind, session, folder)
    with monkeypatch.context() as patch:
        trainer = _trainer(kind, session)
        _inject(phase, trainer, session, patch)
        with pytest.raises(Killed):
            _run(trainer, session, tmp_path)
    left = tmp_path / "journal"
    there = {int(p.name[5:11]) for p in left.glob("step*")}

    trainer = _trainer(kind, session)
    sampled = []
    if kind == "rl":
        inner = trainer.source._make

        def make(state, index, shift):
            sampled.append(index)
            return inner(state, index, shift)

        trainer.source._make = make
    resumed = _run(trainer, session, tmp_path)

    start = trainer.initial_state(session.initial_params()).params
    moved = [
        np.any(a != b)
        for a, b in zip(*map(jax.tree.leaves, (start, whole.state.params)), strict=True)
    ]
    assert np.mean(moved) > 0.9  # it did learn
    assert resumed.steps == whole.steps == 4
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    for name in ("metrics.jsonl", "ledger.jsonl"):
        a, b = (
            [json.loads(line) for line in (at / name).read_text().splitlines()]
            for at in (folder, tmp_path)
        )
        assert [row["step"] for row in b] == [row["step"] for row in a]
        assert list(map(_figures, b)) == list(map(_figures, a))
    if kind == "rl":
        # What was in the journal was neither sampled nor graded again.
        assert not there & set(sampled)
        if phase in ("learn", "mini-step", "after step", "metrics row"):
            assert 2 in there
        if phase in ("sample", "grade", "journal", "journal half"):
            assert 2 not in there


def test_the_ledger_names_the_items_of_the_seeds_order(session, tmp_path):
    trainer = _trainer("sft", session)
    _run(trainer, session, tmp_path)
    rows = read_jsonl(tmp_path / loop.LEDGER)
    size = len(trainer.rows.tokens)
    order = BatchOrder(size, session.cfg.sft.batch, session.cfg.seed)
    assert [row["items"] for row in rows] == [order.at(i).tolist() for i in range(4)]


def _dead() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_is_cleaned(session, tmp_path):
    _run(_trainer("sft", session), session, tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    (tmp_path / f".metrics.jsonl.{_dead()}").write_text("half")
    torn = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp-17"
    (torn / "state").mkdir(parents=True)
    (torn / "state" / "part").write_text("half")
    _run(_trainer("sft", session), session, tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_leftovers_of_the_living_stay(tmp_path):
    mine = tmp_path / f".summary.json.{os.getpid()}"
    mine.write_text("being written")
    other = tmp_path / ".notes"
    other.write_text("the user's")
    gone = tmp_path / f".wall.json.{_dead()}"
    gone.write_text("half")
    assert remove_leftovers(tmp_path) == [gone.name]
    assert mine.exists()
    assert other.exists()


def test_without_a_checkpoint_the_first_row_is_written_once(session, tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in (0, 1):  # a process killed before its first checkpoint
            writer.write(step, {"eval/pass@1": 0.0})
    _run(_trainer("rl", session), session, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 4]


def test_the_journal_can_be_left_out(session, tmp_path):
    trainer = _trainer("rl", session)
    loop.run(
        trainer,
        trainer.initial_state(session.initial_params()),
        workdir=tmp_path,
        options=dataclasses.replace(session.cfg.loop, journal=False),
        config=session.config_json,
    )
    assert not (tmp_path / "journal").exists()
    assert "journal/replayed" not in read_jsonl(tmp_path)[-1]


def test_a_checkpoints_arrays_are_read_as_they_are(session, tmp_path):
    outcome = _run(_trainer("sft", session), session, tmp_path)
    step, arrays = read_arrays(tmp_path / "checkpoints")
    assert step == 4
    leaves = {
        "/".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path): x
        for path, x in jax.tree_util.tree_leaves_with_path(outcome.state)
    }
    assert arrays.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(arrays[path], leaf)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_arrays(tmp_path / "checkpoints", 3)
