"""Damage to any file of a checkpoint is found and named, and the previous good step is used."""

import json
import logging
import random
import shutil
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core import manifest
from pr2jax.core.checkpoint import (
    Checkpointer,
    CheckpointError,
    DamagedCheckpoint,
    read_arrays,
    restore_params,
)
from pr2jax.core.optim import OptimConfig, ParamGroup, build_optimizer
from pr2jax.core.params import ParamSpec, abstract_params, normal
from pr2jax.core.state import abstract_state

OLD = Path(__file__).parent / "data" / "checkpoint_37b816c.tar.xz"
SHAPE = {"params": {"x": jax.ShapeDtypeStruct((40, 30), jnp.float32)}}


def _state(step):
    values = np.random.default_rng(step).standard_normal((40, 30)).astype(np.float32)
    return {"params": {"x": jnp.asarray(values)}}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Steps 2, 4 and 6, all whole."""
    folder = tmp_path_factory.mktemp("good") / "checkpoints"
    with Checkpointer(folder) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(step, _state(step), {"position": step})
    return folder


@pytest.fixture
def copy(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "checkpoints"))


def _files(step: Path) -> list[Path]:
    return sorted(p for p in step.rglob("*") if p.is_file())


def _damage(path: Path, draw: random.Random, how: str) -> None:
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    if how == "truncate":
        path.write_bytes(content[:at])
    else:
        content[at] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def test_every_file_is_listed_with_its_size(good):
    for step in (2, 4, 6):
        listed = json.loads((good / str(step) / manifest.NAME).read_text())["files"]
        files = [p for p in _files(good / str(step)) if p.name != manifest.NAME]
        assert {str(p.relative_to(good / str(step))) for p in files} == listed.keys()
        assert {p.stat().st_size for p in files} == {size for size, _ in listed.values()}
        assert manifest.verify(good / str(step))


def test_thirty_random_flips_and_truncations_are_each_detected(good, tmp_path, caplog):
    """Of the latest step, or of the latest two; the run goes on from the one before."""
    draw = random.Random(0)
    victims = set()
    for trial in range(30):
        folder = Path(shutil.copytree(good, tmp_path / str(trial)))
        hit = (6, 4) if trial % 5 == 0 else (6,)
        named = []
        for step in hit:
            victim = draw.choice([p for p in _files(folder / str(step)) if p.stat().st_size])
            _damage(victim, draw, "flip" if trial % 2 else "truncate")
            named.append(str(victim))
            victims.add(str(victim.relative_to(folder / str(step))))
        caplog.clear()
        with Checkpointer(folder) as checkpoints, caplog.at_level(logging.WARNING, "pr2jax"):
            step, state, extra = checkpoints.restore_whole(SHAPE)
            assert (step, extra) == (6 - 2 * len(hit), {"position": step})
            np.testing.assert_array_equal(state["params"]["x"], _state(step)["params"]["x"])
            told = [r.getMessage() for r in caplog.records if r.name == "pr2jax"]
            assert all(m.startswith(f"{n}: damaged: ") for m, n in zip(told, named, strict=True))
            assert checkpoints.steps() == [s for s in (2, 4, 6) if s <= step]
        assert sorted(p.name for p in (folder / "damaged").iterdir()) == sorted(map(str, hit))
        shutil.rmtree(folder)
    assert len(victims) >= 10  # it was not one kind of file


@pytest.mark.parametrize("how", ["missing", "longer"])
def test_a_missing_and_a_longer_file(copy, how):
    victim = max(_files(copy / "6" / "state"), key=lambda p: p.stat().st_size)
    if how == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes() + b"\0")
    with Checkpointer(copy, read_only=True) as checkpoints:
        for read in (lambda: checkpoints.restore(SHAPE), lambda: checkpoints.params(SHAPE)):
            with pytest.raises(DamagedCheckpoint, match=f"^{victim}: damaged: "):
                read()
    with pytest.raises(DamagedCheckpoint, match=f"^{victim}: damaged: "):
        read_arrays(copy)
    with pytest.raises(DamagedCheckpoint, match=f"^{victim}: damaged: "):
        restore_params(copy, SHAPE["params"])


def test_the_same_step_can_be_saved_and_damaged_again(copy):
    for _ in range(2):
        (copy / "6" / "record" / "metadata").write_text("{}")
        with Checkpointer(copy) as checkpoints:
            assert checkpoints.restore_whole(SHAPE)[0] == 4
            assert checkpoints.save(6, _state(6), {"position": 6})
        assert manifest.verify(copy / "6")
    assert sorted(p.name for p in (copy / "damaged").iterdir()) == ["6", "6.1"]


def test_with_no_whole_step_nothing_is_moved_and_nothing_begins_anew(copy):
    victims = [_files(copy / str(step))[-1] for step in (2, 4, 6)]
    for victim in victims:
        victim.write_bytes(b"")
    for _ in range(2):  # a second start must not take the folder for a new one
        with (
            Checkpointer(copy) as checkpoints,
            pytest.raises(DamagedCheckpoint, match=f"^{copy}: no checkpoint here is whole: ") as e,
        ):
            checkpoints.restore_whole(SHAPE)
        assert all(str(victim) in str(e.value) for victim in victims)
    with Checkpointer(copy.parent / "new") as checkpoints:
        assert checkpoints.restore_whole(SHAPE) is None


def test_another_model_is_no_damage(copy):
    wanted = {"params": {"x": jax.ShapeDtypeStruct((40, 31), jnp.float32)}}
    with Checkpointer(copy) as checkpoints:
        with pytest.raises(CheckpointError, match="has shape") as error:
            checkpoints.restore_whole(wanted)
        assert not isinstance(error.value, DamagedCheckpoint)
        assert checkpoints.steps() == [2, 4, 6]


# ---------------------------------------------------------------- without a manifest


def test_a_step_whose_writer_was_killed_gets_its_manifest_when_it_is_read(copy):
    (copy / "6" / manifest.NAME).unlink()
    with Checkpointer(copy) as checkpoints:
        assert checkpoints.restore_whole(SHAPE)[0] == 6
    assert manifest.verify(copy / "6")


def test_without_a_manifest_record_and_arrays_still_tell(copy):
    for step in (4, 6):
        (copy / str(step) / manifest.NAME).unlink()
    record = copy / "6" / "record" / "metadata"
    record.write_text(record.read_text().replace('"position": 6', '"position": 5'))
    data = max((p for p in _files(copy / "4" / "state")), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with Checkpointer(copy) as checkpoints:
        assert checkpoints.restore_whole(SHAPE)[0] == 2
    assert sorted(p.name for p in (copy / "damaged").iterdir()) == ["4", "6"]


def test_large_files_are_listed_by_size_alone(copy, monkeypatch):
    monkeypatch.setattr(manifest, "HASHED_BYTES", 100)
    manifest.write(copy / "6")
    listed = json.loads((copy / "6" / manifest.NAME).read_text())["files"]
    assert all((hashed is None) == (size > 100) for size, hashed in listed.values())
    data = max(_files(copy / "6" / "state" / "d"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert manifest.verify(copy / "6")
    with (
        Checkpointer(copy) as checkpoints,
        pytest.raises(DamagedCheckpoint),  # the array's fingerprint, or what reads it
    ):
        checkpoints.restore(SHAPE)


# ---------------------------------------------------------------- other versions


def test_a_later_schema_is_told(copy):
    path = copy / "6" / manifest.NAME
    found = json.loads(path.read_text())
    del found["digest"]
    found["schema"] = 9
    path.write_text(json.dumps(found | {"digest": manifest.digest(found)}))
    with (
        Checkpointer(copy) as checkpoints,
        pytest.raises(CheckpointError, match=f"^{path}: of schema 9, .* reads 1$") as error,
    ):
        checkpoints.restore_whole(SHAPE)
    assert not isinstance(error.value, DamagedCheckpoint)
    path.unlink()
    record = copy / "6" / "record" / "metadata"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"schema": 2}))
    with (
        Checkpointer(copy) as checkpoints,
        pytest.raises(CheckpointError, match="of schema 2, .* reads 1$") as error,
    ):
        checkpoints.restore_whole(SHAPE)
    assert not isinstance(error.value, DamagedCheckpoint)


def test_a_checkpoint_kept_from_an_earlier_commit(tmp_path):
    """data/make_checkpoint.py says how it was made: leaf i holds i, i + 1, i + 2, ..."""
    with tarfile.open(OLD) as packed:
        packed.extractall(tmp_path, filter="data")
    assert "schema" not in json.loads((tmp_path / "7" / "record" / "metadata").read_text())
    specs = {
        "block": {
            "w": ParamSpec((16, 8), ("embed", "mlp"), normal(1.0)),
            "half": ParamSpec((8, 4), ("embed", None), normal(1.0), jnp.bfloat16),
        },
        "bias": ParamSpec((5,), (None,), normal(1.0)),
    }
    optimizer = build_optimizer(OptimConfig(groups={"g": ParamGroup("bias")}), specs)
    wanted = abstract_state(abstract_params(specs), optimizer)
    with Checkpointer(tmp_path, best_metric="acc") as checkpoints:
        step, state, extra = checkpoints.restore_whole(wanted)
        assert (step, checkpoints.best_step()) == (7, 7)
    assert extra == {
        "config": {"mode": "sft"},
        "position": 7,
        "seconds": 1.25,
        "memory": {"mismatch": 0.1},
    }
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for i, leaf in enumerate(jax.tree.leaves(state)):
        counted = (i + np.arange(leaf.size)).reshape(leaf.shape)
        np.testing.assert_array_equal(np.asarray(leaf, np.float64), counted)
    assert manifest.verify(tmp_path / "7")
