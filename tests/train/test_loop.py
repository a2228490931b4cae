"""Resuming, stopping and diverging: the loop around real trainers."""

import copy
import dataclasses
import functools
import os
import signal

import jax
import numpy as np
import pytest

from pr2jax.core.metrics import read_jsonl
from pr2jax.tasks.registry import build_task
from pr2jax.train.evaluator import Evaluator
from pr2jax.train.loop import Interrupted, TrainingDiverged, run
from pr2jax.train.rl import RLTrainer
from pr2jax.train.session import open_session
from pr2jax.train.sft import SFTTrainer
from tests.train import tiny


@functools.cache
def _compiled(kind, session):
    task = build_task(session.cfg.rl_task)
    if kind == "sft":
        return SFTTrainer(session, task.train, steps=4, evaluator=None)
    return RLTrainer(session, task.train, Evaluator(session, task.held_out))


def _trainer(kind, session):
    """A trainer to change at will; its programs are compiled once for the module."""
    return copy.copy(_compiled(kind, session))


def _train(session, kind, folder, stop_at=None):
    trainer = _trainer(kind, session)
    if stop_at is not None:
        inner = trainer.step

        def step(state, index):
            if index + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            return inner(state, index)

        trainer.step = step
    return run(
        trainer,
        trainer.initial_state(session.initial_params()),
        workdir=folder,
        options=session.cfg.loop,
        config=session.config_json,
        best_metric="eval/pass@1",
    )


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    with open_session(
        tiny.config(), tmp_path_factory.mktemp("session"), jax.devices()[:1]
    ) as session:
        yield session


@pytest.fixture(scope="module")
def uninterrupted(session, tmp_path_factory):
    """(outcome, folder) of a run of a kind that was never stopped, made once."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(f"whole_{kind}")
        return _train(session, kind, folder), folder

    return make


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_resumed_equals_never_stopped(session, uninterrupted, kind, tmp_path):
    whole, folder = uninterrupted(kind)
    with pytest.raises(Interrupted, match="stopped at step 3 of 4"):
        _train(session, kind, tmp_path / "parts", stop_at=3)
    resumed = _train(session, kind, tmp_path / "parts")
    assert resumed.steps == whole.steps == 4
    if kind == "sft":  # restored arrays are no other program's
        assert _compiled(kind, session)._step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    a, b = (read_jsonl(path) for path in (folder, tmp_path / "parts"))
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for key in ("loss", "grad_norm") + (("reward", "eval/pass@1") if kind == "rl" else ()):
        assert [row.get(key) for row in a] == [row.get(key) for row in b]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    session, uninterrupted, tmp_path, caplog
):
    whole, folder = uninterrupted("rl")
    with pytest.raises(Interrupted):
        _train(session, "rl", tmp_path / "parts", stop_at=3)
    checkpoints = tmp_path / "parts" / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} == {"2", "3"}
    victim = max((checkpoints / "3" / "state").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 3] ^= 16
    victim.write_bytes(content)
    with caplog.at_level("WARNING", "pr2jax"):
        resumed = _train(session, "rl", tmp_path / "parts")
    assert f"{victim}: damaged: " in caplog.text
    assert (checkpoints / "damaged" / "3").is_dir()
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    for name in ("metrics.jsonl", "ledger.jsonl"):
        a, b = (read_jsonl(path / name) for path in (folder, tmp_path / "parts"))
        lines = (tmp_path / "parts" / name).read_text().count("\n")
        assert len(a) == len(b) == lines
        assert [row["step"] for row in a] == [row["step"] for row in b]
        for key in ("items", "reward", "loss", "grad_norm"):
            assert [row.get(key) for row in a] == [row.get(key) for row in b]
    # The journal still had the batch of the step that was done again.
    replayed = {r["step"]: r.get("journal/replayed") for r in read_jsonl(tmp_path / "parts")}
    assert (replayed[3], replayed[4]) == (1.0, 0.0)


def test_a_finished_run_does_nothing_more(session, tmp_path):
    first = _train(session, "sft", tmp_path)
    again = _train(session, "sft", tmp_path)
    assert again.seconds == first.seconds
    jax.tree.map(np.testing.assert_array_equal, first.state, again.state)


def test_non_finite_steps_are_skipped_then_stop_the_run(session, tmp_path):
    trainer = _trainer("sft", session)
    params = session.initial_params()
    params["final_norm"]["scale"] = params["final_norm"]["scale"] * np.nan
    state = trainer.initial_state(params)
    kept = jax.tree.map(np.asarray, state.opt_state)
    trainer.max_skipped_in_row = 3
    with pytest.raises(TrainingDiverged, match="3 steps in a row"):
        run(
            trainer,
            state,
            workdir=tmp_path,
            options=session.cfg.loop,
            config=session.config_json,
        )
    rows = read_jsonl(tmp_path)
    assert [row["skipped"] for row in rows] == [1.0, 1.0, 1.0]
    trainer.steps = 3  # the checkpoint it left can be read, and holds what was before
    left = run(
        trainer,
        trainer.initial_state(session.initial_params()),
        workdir=tmp_path,
        options=session.cfg.loop,
        config=session.config_json,
    )
    assert int(left.state.skipped) == 3
    jax.tree.map(np.testing.assert_array_equal, left.state.opt_state, kept)


def test_wall_time_budget_stops_early(session, tmp_path):
    trainer = _trainer("sft", session)
    trainer.steps = 10**6
    outcome = run(
        trainer,
        trainer.initial_state(session.initial_params()),
        workdir=tmp_path,
        options=dataclasses.replace(session.cfg.loop, checkpoint_every=0),
        config=session.config_json,
        max_seconds=0.2,
        start=7,
    )
    assert 7 < outcome.steps < 10**6
    assert outcome.seconds >= 0.2
