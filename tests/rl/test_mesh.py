"""The learner on meshes with an expert axis against the same learner on one device."""

import functools

import jax
import numpy as np
import pytest

from pr2jax.core.params import map_with_path
from pr2jax.core.sharding import MeshConfig, make_mesh, param_shardings
from pr2jax.core.state import create
from pr2jax.models.transformer import param_specs
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.batch import put_batch, split_micro
from pr2jax.rl.update import _Step, accumulate, make_mini_step
from tests.rl import tiny

MODEL = tiny.MODEL
PR2 = ReplayConfig(mode="pr2", feature_tokens=4)
MESHES = {
    "2x4": MeshConfig(fsdp=2, expert=4),
    "1x8": MeshConfig(expert=8),
    "data x fsdp": MeshConfig(data=2, fsdp=4),
}


@pytest.fixture(scope="module")
def world():
    """A moved policy and the recorded rollout of the one before."""
    params = tiny.make_params(predictor=0.02)
    batch = tiny.blank_batch()
    batch = tiny.as_behavior(batch, tiny.score(params, batch, tiny.response_places(batch)))
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda x: x + 0.02 * rng.normal(size=x.shape).astype(np.float32), params)
    return moved, batch


def on(mesh, world):
    params, batch = world
    if mesh is not None:
        params = jax.device_put(params, param_shardings(param_specs(MODEL), mesh))
    return params, put_batch(split_micro(batch, 8), mesh)


def relative(a, b):
    a, b = np.float64(a), np.float64(b)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


def sums(mesh, world):
    cfg = tiny.rl_config(micro_batch=8, kl_coef=0.0, entropy_coef=0.01, z_coef=0.01)
    step = _Step(MODEL, cfg, PR2, np.float32, mesh)
    return jax.jit(functools.partial(accumulate, step=step))(*on(mesh, world))


def losses(mesh, world, steps=20):
    params, batch = on(mesh, world)
    optimizer = tiny.make_optimizer(params)
    step = make_mini_step(MODEL, tiny.rl_config(micro_batch=8), PR2, optimizer, mesh=mesh)
    state, seen = create(jax.tree.map(lambda x: x + 0, params), optimizer), []
    for i in range(steps):
        state, metrics = step(state, batch, i > 0)
        seen.append(float(metrics["loss"][0]))
    return np.array(seen)


@pytest.fixture(scope="module")
def alone(world):
    return sums(None, world)


@pytest.mark.parametrize("name", ["2x4", pytest.param("1x8", marks=pytest.mark.slow)])
def test_gradients_of_a_mini_step(world, alone, name):
    """Loss and gradients, the router's and the predictor's among them, to 1e-5 norm-wise."""
    got = sums(make_mesh(MESHES[name]), world)
    assert abs(got.loss - alone.loss) <= 1e-5 * abs(alone.loss)
    assert relative(got.predictor_grad, alone.predictor_grad) <= 1e-5
    assert np.linalg.norm(alone.predictor_grad) > 0
    errors = map_with_path(lambda path, a, b: (path, relative(a, b)), got.grads, alone.grads)
    for path, error in jax.tree.leaves(errors, is_leaf=lambda x: isinstance(x, tuple)):
        assert error <= 1e-5, path


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_twenty_steps(world, name):
    expected = losses(None, world)
    got = losses(make_mesh(MESHES[name]), world)
    assert np.ptp(expected) > 0.05  # it learns
    np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())
