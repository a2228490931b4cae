"""Checkpoints: bit-equal on any mesh, atomic, and never silently wrong."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pr2jax.core import rng
from pr2jax.core.checkpoint import (
    Checkpointer,
    CheckpointError,
    DamagedCheckpoint,
    read_checkpoint,
    restore_params,
)
from pr2jax.core.optim import OptimConfig, ParamGroup, build_optimizer
from pr2jax.core.params import ParamSpec, abstract_params, init_params, normal
from pr2jax.core.sharding import MeshConfig, make_mesh, param_shardings
from pr2jax.core.state import abstract_state, create

SPECS = {
    "block": {
        "w": ParamSpec((16, 8), ("embed", "mlp"), normal(1.0)),
        "half": ParamSpec((8, 4), ("embed", None), normal(1.0), jnp.bfloat16),
    },
    "bias": ParamSpec((5,), (None,), normal(1.0)),
}
OPTIMIZER = build_optimizer(OptimConfig(groups={"g": ParamGroup("bias")}), SPECS)
MESHES = {
    "8": lambda: make_mesh(MeshConfig(fsdp=8)),
    "4x2": lambda: make_mesh(MeshConfig(fsdp=4, tensor=2)),
    "2 of 8": lambda: make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]),
    "1": lambda: make_mesh(MeshConfig(), jax.devices()[:1]),
}


def make_state(mesh=None, seed=0):
    shardings = None if mesh is None else param_shardings(SPECS, mesh)
    state = create(init_params(SPECS, rng.root(seed), shardings), OPTIMIZER)
    # Moments that are not zero, so that they prove something.
    moments = jax.tree.map(
        lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), state.opt_state
    )
    return state.replace(opt_state=moments, step=state.step + 7)


def abstract(mesh=None):
    shardings = None if mesh is None else param_shardings(SPECS, mesh)
    return abstract_state(abstract_params(SPECS, shardings), OPTIMIZER)


def bits_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


# ---------------------------------------------------------------- round trips


@pytest.fixture(scope="module")
def saved_on_8(tmp_path_factory):
    directory = tmp_path_factory.mktemp("eight")
    state = make_state(MESHES["8"]())
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(7, state, {"position": [3, 4], "rng": 2**40, "config": {"a": None}})
    return directory, state


@pytest.mark.parametrize("name", list(MESHES))
def test_eight_devices_restore_anywhere_bit_equal(saved_on_8, name):
    directory, state = saved_on_8
    target = abstract(MESHES[name]())
    with Checkpointer(directory) as checkpointer:
        restored, extra = checkpointer.restore(target)
    bits_equal(restored, state)
    assert extra == {"position": [3, 4], "rng": 2**40, "config": {"a": None}}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(lambda x, t: x.sharding == t.sharding or pytest.fail("sharding"), restored, target)


def test_a_process_with_one_device_reads_it(saved_on_8):
    """Not merely one of eight: the other seven do not exist there."""
    directory, state = saved_on_8
    code = """
        import sys, jax, numpy as np
        sys.path.insert(0, sys.argv[2])
        import test_checkpoint as t
        assert jax.device_count() == 1
        with t.Checkpointer(sys.argv[1]) as c:
            state, _ = c.restore(t.abstract())
        w = np.asarray(state.params["block"]["w"])
        print(w.tobytes().hex(), int(state.step))
    """
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(root)}
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(directory), str(Path(__file__).parent)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.split() == [np.asarray(state.params["block"]["w"]).tobytes().hex(), "7"]


def test_saved_values_are_those_of_the_call_even_if_donated(tmp_path):
    state = make_state()
    before = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 99, s), donate_argnums=0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        state = overwrite(state)
        restored, _ = checkpointer.restore(abstract())
    bits_equal(restored, before)


def test_restore_params_alone_and_cast(saved_on_8):
    directory, state = saved_on_8
    shardings = param_shardings(SPECS, MESHES["4x2"]())
    params = restore_params(directory, abstract_params(SPECS, shardings))
    bits_equal(params, state.params)
    half = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
        abstract_params(SPECS, shardings),
    )
    cast = restore_params(directory, half)
    assert {x.dtype for x in jax.tree.leaves(cast)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(
        cast["block"]["w"], np.asarray(state.params["block"]["w"]).astype(jnp.bfloat16)
    )


# ---------------------------------------------------------------- which steps are kept


def tiny(value):
    return {"params": {"x": jnp.full((3,), float(value))}}


TINY = {"params": {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}}


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 1)])
def test_latest_and_best_are_kept(tmp_path, mode, best):
    scores = {1: 0.1, 2: 0.9, 3: float("nan"), 4: None, 5: 0.4, 6: 0.5}
    with Checkpointer(tmp_path, keep=2, best_metric="acc", best_mode=mode) as checkpointer:
        for step, score in scores.items():
            metrics = None if score is None else {"acc": score, "loss": 1.0}
            assert checkpointer.save(step, tiny(step), {"n": step}, metrics)
        assert checkpointer.latest_step() == 6
        assert checkpointer.best_step() == best
        assert checkpointer.steps() == [best, 5, 6]
    # A new process knows the best too, and so does a job that only reads.
    with Checkpointer(tmp_path, keep=2, best_metric="acc", best_mode=mode) as checkpointer:
        assert checkpointer.best_step() == best
        restored, extra = checkpointer.restore(TINY, best)
        assert extra == {"n": best}
        np.testing.assert_array_equal(restored["params"]["x"], [best] * 3)
    np.testing.assert_array_equal(restore_params(tmp_path, TINY["params"])["x"], [best] * 3)
    np.testing.assert_array_equal(restore_params(tmp_path, TINY["params"], "latest")["x"], [6] * 3)
    assert read_checkpoint(tmp_path) == (best, {"n": best}, {"acc": scores[best], "loss": 1.0})


def test_saving_a_step_again_or_backwards(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.best_step() is None
        assert checkpointer.latest_step() is None
        assert checkpointer.save(4, tiny(4), {})
        assert not checkpointer.save(4, tiny(5), {})
        with pytest.raises(CheckpointError, match="step 4 is there, later than 3"):
            checkpointer.save(3, tiny(3), {})
        np.testing.assert_array_equal(checkpointer.restore(TINY)[0]["params"]["x"], [4] * 3)


# ---------------------------------------------------------------- interruption


def test_keyboard_interrupt_while_saving_leaves_the_last_good_step(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tiny(1), {})
        checkpointer.wait()
        monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", boom)
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save(2, tiny(2), {})
        assert checkpointer.latest_step() == 1
        monkeypatch.undo()
        # The handler's own last save goes through, at that very step.
        assert checkpointer.save(2, tiny(22), {})
        np.testing.assert_array_equal(checkpointer.restore(TINY)[0]["params"]["x"], [22] * 3)


async def boom(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_process_killed_while_writing_leaves_the_last_good_step(tmp_path):
    code = """
        import os, sys
        import jax, jax.numpy as jnp
        from orbax.checkpoint._src.handlers import composite_checkpoint_handler as h
        from pr2jax.core.checkpoint import Checkpointer
        c = Checkpointer(sys.argv[1])
        c.save(1, {"params": {"x": jnp.full((3,), 1.0)}}, {})
        c.wait()
        h.CompositeCheckpointHandler.finalize = lambda *a, **k: os._exit(9)
        c.save(2, {"params": {"x": jnp.full((3,), 2.0)}}, {})
        c.wait()
    """
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    assert subprocess.run(command, env=env, capture_output=True).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2  # the half-written one is there, under another name
    np.testing.assert_array_equal(restore_params(tmp_path, TINY["params"])["x"], [1] * 3)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 1
        assert checkpointer.save(2, tiny(2), {})
        assert checkpointer.latest_step() == 2


# ---------------------------------------------------------------- damage and misuse


def test_missing(tmp_path):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(CheckpointError, match=f"^{nowhere}: no such directory"):
        restore_params(nowhere, TINY["params"])
    assert not nowhere.exists()
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match=f"^{tmp_path}: no checkpoint"):
            checkpointer.restore(TINY)
        checkpointer.save(3, tiny(3), {})
        with pytest.raises(CheckpointError, match=rf"^{tmp_path}/5: no such .* \[3\]"):
            checkpointer.restore(TINY, 5)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/file: "):
        Checkpointer(tmp_path / "file")


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        path.unlink()


BIG = {"params": {"x": jax.ShapeDtypeStruct((300, 40), jnp.float32)}}


@pytest.mark.parametrize("how", ["truncated", "flipped", "deleted"])
@pytest.mark.parametrize("part", ["array", "manifest", "record"])
def test_damage_is_an_error_naming_the_path(tmp_path, how, part):
    with Checkpointer(tmp_path) as checkpointer:
        values = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float32)
        checkpointer.save(1, {"params": {"x": jnp.asarray(values)}}, {"n": 1})
        checkpointer.wait()
        checkpointer.save(2, {"params": {"x": jnp.asarray(values)}}, {"n": 2})
    if part == "array":
        files = [f for f in (tmp_path / "2" / "state").rglob("*") if f.is_file()]
        victim = max(files, key=lambda f: f.stat().st_size)
    else:
        where = {"manifest": "state/manifest.ocdbt", "record": "record/metadata"}[part]
        victim = tmp_path / "2" / where
    damage(victim, how)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(DamagedCheckpoint, match=f"^{victim}: damaged: "):
            checkpointer.restore(BIG)
        np.testing.assert_array_equal(checkpointer.restore(BIG, 1)[0]["params"]["x"], values)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"x": ((3,), "float32"), "y": ((1,), "float32")}, "has no array 'params/y'"),
        ({}, "holds 'params/x', which is not asked for"),
        ({"x": ((4,), "float32")}, r"'params/x' has shape \(3,\), not \(4,\)"),
        ({"x": ((3,), "bfloat16")}, "'params/x' is float32, not bfloat16"),
    ],
)
def test_another_state_than_asked_for(tmp_path, target, message):
    wanted = {"params": {k: jax.ShapeDtypeStruct(*v) for k, v in target.items()}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tiny(1), {})
        with pytest.raises(CheckpointError, match=f"^{tmp_path}/1: {message}"):
            checkpointer.restore(wanted)


def test_extra_must_be_json(tmp_path):
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(ValueError, match="extra cannot be written as JSON"),
    ):
        checkpointer.save(1, tiny(1), {"key": object()})
