"""The training state: plain arrays only, so that it can be donated, sharded and checkpointed."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int

from pr2jax.core.hosts import Global
from pr2jax.core.optim import Optimizer, OptState
from pr2jax.core.params import Tree
from pr2jax.core.sharding import replicated


@struct.dataclass
class TrainState:
    """What an optimizer step changes. `step` counts applied updates, `skipped` those refused.

    `step + skipped` updates were attempted; `skipped_in_row` of them just now, one after another.
    """

    step: Global[Int[Array, ""]]
    params: Global[Any]
    opt_state: Global[OptState]
    skipped: Global[Int[Array, ""]]
    skipped_in_row: Global[Int[Array, ""]]


def _build(params: Tree, optimizer: Optimizer) -> TrainState:
    # A buffer each: one shared zero could not be donated three times.
    step, skipped, in_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, optimizer.init(params), skipped, in_row)


def _mesh(params: Tree) -> Mesh | None:
    found = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params)]
    return next((s.mesh for s in found if isinstance(s, NamedSharding)), None)


def create(params: Tree, optimizer: Optimizer) -> TrainState:
    """Step 0 around `params`, which are used as they are (not copied).

    Where parameters lie on a mesh their moments are made there, with the same sharding, and the
    counters are replicated.
    """
    build = lambda p: _build(p, optimizer).replace(params=None)
    shardings = None
    if _mesh(params) is not None:
        abstract = abstract_state(params, optimizer).replace(params=None)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.jit(build, out_shardings=shardings)(params)
    first = jax.tree.leaves(params)[0]
    if shardings is None and first.committed:
        # What does not depend on the parameters' values would not be committed with them, and the
        # first step would be another program than the second.
        state = jax.device_put(state, first.sharding)
    return state.replace(params=params)


def abstract_state(params: Tree, optimizer: Optimizer) -> TrainState:
    """The state's shapes, dtypes and shardings, for `Checkpointer.restore` and compile checks.

    `params`: arrays, or `abstract_params(specs, shardings)`; without shardings there are none.
    """
    state = jax.eval_shape(lambda p: _build(p, optimizer), params)
    state = state.replace(params=params, opt_state=optimizer.abstract_state(params))
    mesh = _mesh(params)
    scalar = None if mesh is None else replicated(mesh)

    def place(leaf):
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or scalar)

    return jax.tree.map(place, state)


def all_finite(*trees: Any) -> Bool[Array, ""]:
    """Whether every floating-point number in the trees is finite."""
    leaves = [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def select_finite(ok: Bool[Array, ""], new_state: TrainState, old_state: TrainState) -> TrainState:
    """`new_state` where `ok`, else `old_state` bit for bit, with the skip counted."""
    kept = jax.tree.map(lambda new, old: jnp.where(ok, new, old), new_state, old_state)
    return kept.replace(
        skipped=old_state.skipped + jnp.where(ok, 0, 1),
        skipped_in_row=jnp.where(ok, 0, old_state.skipped_in_row + 1),
    )
