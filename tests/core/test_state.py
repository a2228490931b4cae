"""The training state: placement, donation, and steps that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core import rng
from pr2jax.core.optim import OptimConfig, build_optimizer
from pr2jax.core.params import ParamSpec, abstract_params, init_params, normal
from pr2jax.core.sharding import MeshConfig, make_mesh, param_shardings
from pr2jax.core.state import abstract_state, all_finite, create, select_finite

SPECS = {
    "w": ParamSpec((8, 4), ("embed", "mlp"), normal(1.0)),
    "b": ParamSpec((4,), (None,), normal(1.0)),
}


def test_abstract_state_is_the_created_state():
    shardings = param_shardings(SPECS, make_mesh(MeshConfig(fsdp=4, tensor=2)))
    optimizer = build_optimizer(OptimConfig(), SPECS)
    state = create(init_params(SPECS, rng.root(0), shardings), optimizer)
    abstract = abstract_state(abstract_params(SPECS, shardings), optimizer)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)

    def same(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding == b.sharding

    jax.tree.map(same, abstract, state)
    moment = state.opt_state.groups["default"]
    assert any(x.sharding == shardings["w"] for x in jax.tree.leaves(moment))


def step(optimizer):
    def run(state, grads):
        params, opt_state, _ = optimizer.update(grads, state.opt_state, state.params)
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return select_finite(all_finite(grads), new, state)

    return jax.jit(run, donate_argnums=0)


def test_a_non_finite_step_changes_nothing_and_is_counted():
    optimizer = build_optimizer(OptimConfig(), SPECS)
    run = step(optimizer)
    state = create(init_params(SPECS, rng.root(0)), optimizer)
    good = init_params(SPECS, rng.root(1))
    history = []
    for bad in (None, np.nan, np.inf, None, np.nan):
        grads = good if bad is None else good | {"b": good["b"].at[2].set(bad)}
        before = jax.tree.map(np.array, (state.params, state.opt_state))
        state = run(state, grads)
        after = jax.tree.map(np.array, (state.params, state.opt_state))
        if bad is not None:
            jax.tree.map(np.testing.assert_array_equal, before, after)
        else:
            assert not np.array_equal(before[0]["w"], after[0]["w"])
        history.append((int(state.step), int(state.skipped), int(state.skipped_in_row)))
    assert history == [(1, 0, 0), (1, 1, 1), (1, 2, 2), (2, 2, 0), (2, 3, 1)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_all_finite(value):
    tree = {"x": jnp.ones((3, 2)), "n": jnp.arange(3)}
    assert all_finite(tree)
    assert not all_finite(tree, {"y": jnp.array([1.0, value])})
