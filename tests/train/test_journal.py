"""The journal's files: to the bit, whole or not at all."""

import logging
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.train.journal import Journal


def _arrays():
    draw = np.random.default_rng(0)
    return {
        "tokens": draw.integers(0, 99, (3, 5)).astype(np.int32),
        "routes": draw.integers(0, 255, (2, 3, 5, 2)).astype(np.uint8),
        "wide": draw.integers(0, 2**16, (2, 3)).astype(np.uint16),
        "logits": np.array([[np.nan, -0.0, np.inf, 1e-40]], np.float32),
        "inputs": np.asarray(jnp.array([1.0, -0.0, 3e38, np.nan], jnp.bfloat16)),
        "mask": np.array([True, False]),
        "none": np.zeros((0, 4), np.float32),
        "scalar": np.float32(1.5),
        "turned": np.arange(6, dtype=np.int8).reshape(2, 3).T,
    }


META = {"reasons": ["right", "naïve ∑"], "position": 12, "seconds": 0.1}


def _equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape)
        assert a[name].tobytes() == b[name].tobytes(), name


def test_an_entry_comes_back_to_the_bit(tmp_path):
    size = Journal(tmp_path, "run").write(7, _arrays(), META)
    journal = Journal(tmp_path, "run")
    arrays, meta = journal.read(7)
    _equal(arrays, _arrays())
    assert meta == META
    assert journal.steps() == [7]
    assert journal.size() == size
    assert (tmp_path / "step_000007.p0.batch").stat().st_size == size
    assert journal.read(8) is None


def test_a_damaged_entry_is_told_and_removed(tmp_path, caplog):
    journal = Journal(tmp_path, "run")
    journal.write(1, _arrays(), META)
    path = tmp_path / "step_000001.p0.batch"
    whole = path.read_bytes()
    middle = whole.index(_arrays()["tokens"].tobytes())
    flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
    cuts = [whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    zeros = whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)
    for damaged in [flipped, zeros, b"not a journal", *cuts]:
        path.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "pr2jax"):
            assert journal.read(1) is None
        assert "step_000001.p0.batch is damaged" in caplog.text
        assert not path.exists()


def test_every_flipped_bit_is_seen(tmp_path):
    journal = Journal(tmp_path, "run")
    arrays = {"tokens": np.arange(6, dtype=np.int32)}
    journal.write(1, arrays, {"n": 1})
    path = tmp_path / "step_000001.p0.batch"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :]
        )
        assert journal.read(1) is None


def test_another_runs_entry_is_told_and_removed(tmp_path, caplog):
    Journal(tmp_path, "one").write(3, _arrays(), META)
    with caplog.at_level(logging.WARNING, "pr2jax"):
        assert Journal(tmp_path, "two").read(3) is None
    assert "is of a run with other settings" in caplog.text
    assert Journal(tmp_path, "one").read(3) is None  # gone


def test_an_entry_under_another_step_is_not_it(tmp_path):
    journal = Journal(tmp_path, "run")
    journal.write(3, _arrays(), META)
    (tmp_path / "step_000003.p0.batch").rename(tmp_path / "step_000004.p0.batch")
    assert journal.read(4) is None


def test_unfinished_files_are_cleaned_and_other_processes_left_alone(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    torn = tmp_path / f".step_000001.p0.batch.{gone.pid}"
    torn.write_bytes(b"half")
    (tmp_path / "step_000002.p1.batch").write_bytes(b"process 1's")
    journal = Journal(tmp_path, "run")
    assert not torn.exists()
    assert journal.steps() == []
    journal.trim(10)
    assert (tmp_path / "step_000002.p1.batch").exists()


def test_a_write_that_fails_leaves_the_old_entry(tmp_path):
    journal = Journal(tmp_path, "run")
    journal.write(1, _arrays(), META)
    with pytest.raises(TypeError):
        journal.write(1, _arrays(), {"not json": object()})
    _equal(journal.read(1)[0], _arrays())
    assert len(list(tmp_path.iterdir())) == 1


def test_trim_keeps_what_a_checkpoint_may_need(tmp_path):
    journal = Journal(tmp_path, "run")
    for step in range(6):
        journal.write(step, {"x": np.arange(step)}, {})
    journal.trim(before=4)
    assert journal.steps() == [4, 5]
