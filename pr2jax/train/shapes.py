"""A run's arrays by shape, type and layout alone: for compiling and for counting, without data.

Every batch is as large as the run's can get: prompts and responses of the longest length.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from pr2jax.core.optim import OptimConfig, build_optimizer
from pr2jax.core.params import Tree, abstract_params
from pr2jax.core.sharding import param_shardings, replicated, row_sharding
from pr2jax.core.state import TrainState, abstract_state
from pr2jax.core.store import as_path
from pr2jax.data.packing import PackedRows
from pr2jax.data.tokenizer import build_tokenizer
from pr2jax.models.config import num_moe_layers
from pr2jax.models.importers import gguf
from pr2jax.models.predictor import RouterFeatures
from pr2jax.models.transformer import param_specs
from pr2jax.replay.modes import plan
from pr2jax.replay.routes import route_dtype
from pr2jax.rl.batch import map_rows
from pr2jax.rl.types import LearnerBatch, policy_optim
from pr2jax.train.config import Config, with_vocab_size
from pr2jax.train.init_from import like_checkpoint
from pr2jax.train.session import check_batches

log = logging.getLogger("pr2jax")


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """What a run's programs are built from. `mesh` may be of devices that are not there, or of
    none at all (`AbstractMesh`)."""

    cfg: Config
    mesh: Mesh | AbstractMesh
    dtype: Any

    @property
    def specs(self) -> Tree:
        """The parameter tree."""
        return param_specs(self.cfg.model)

    def params(self) -> Tree:
        """The learner's parameters."""
        return abstract_params(self.specs, param_shardings(self.specs, self.mesh))


def resolved(cfg: Config) -> Config:
    """`cfg` with its model as the run would have it: of `init_from` where that is on this
    machine, else as configured; vocabulary included. Raises what a run's start raises."""
    if cfg.init_from:
        here = cfg.init_from.startswith(gguf.PACKAGE) or as_path(cfg.init_from).exists()
        if here:
            cfg = like_checkpoint(cfg)
        else:
            log.info("init_from: %s is not here; the model is taken as configured", cfg.init_from)
    if cfg.model.vocab_size:
        return cfg
    if cfg.tokenizer.untrained:
        return with_vocab_size(cfg, cfg.tokenizer.vocab_size)
    return with_vocab_size(cfg, build_tokenizer(cfg.tokenizer).vocab_size)


def make_setup(cfg: Config, mesh: Mesh | AbstractMesh, dtype: Any) -> Setup:
    """A setup of a `resolved` config. Raises ConfigError or ShardingError for what does not fit
    the mesh."""
    check_batches(cfg, mesh)
    setup = Setup(cfg, mesh, dtype)
    setup.params()
    return setup


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of (abstract) arrays on one device; what has no sharding is whole on it."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * jnp.dtype(leaf.dtype).itemsize
    return total


def whole(tree: Any, mesh) -> Any:
    """Abstract forms of small arrays, whole on every device."""
    place = replicated(mesh)
    form = lambda a: jax.ShapeDtypeStruct(np.shape(a), jnp.asarray(a).dtype, sharding=place)
    return jax.tree.map(lambda a: _struct(a, place) if hasattr(a, "shape") else form(a), tree)


def _struct(array: Any, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def by_rows(tree: Any, mesh, axis: int = 0) -> Any:
    """Abstract forms whose dimension `axis` is split over the batch axes, as far as those do."""
    return jax.tree.map(lambda a: _struct(a, row_sharding(mesh, a.shape, axis)), tree)


def packed_rows(setup: Setup, rows: int, length: int) -> PackedRows:
    """A batch of packed rows."""
    ints = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    floats = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    return by_rows(PackedRows(ints, floats, ints, ints), setup.mesh)


def training_state(setup: Setup, optim: OptimConfig) -> TrainState:
    """Parameters, moments and counters."""
    return abstract_state(setup.params(), build_optimizer(optim, setup.specs))


def learner_state(setup: Setup) -> TrainState:
    """The RL learner's."""
    return training_state(setup, policy_optim(setup.cfg.rl.optim, setup.cfg.model))


def row_length(cfg: Config) -> int:
    """Tokens of the longest row that the learner can get."""
    bucket = cfg.rl.length_bucket
    return -(-(cfg.sampler.max_prompt + cfg.rl.sampling.max_tokens) // bucket) * bucket


def feature_places(cfg: Config) -> int:
    """Positions of a response whose router features are kept."""
    tokens = plan(cfg.replay).features
    most = cfg.rl.sampling.max_tokens if cfg.replay.features == "recorded" else row_length(cfg) - 1
    return min(tokens, most) if num_moe_layers(cfg.model) else 0


def features(setup: Setup, rows: int) -> RouterFeatures | None:
    """Router features of `rows` responses, rows split over the mesh; None where none are kept."""
    model, places = setup.cfg.model, feature_places(setup.cfg)
    if not places:
        return None
    layers = num_moe_layers(model)
    make = lambda shape, dtype, axis: by_rows(jax.ShapeDtypeStruct(shape, dtype), setup.mesh, axis)
    return RouterFeatures(
        positions=make((rows, places), jnp.int32, 0),
        mask=make((rows, places), jnp.bool_, 0),
        logits=make((layers, rows, places, model.moe.live), jnp.float32, 1),
        inputs=make((layers, rows, places, model.d_model), jnp.bfloat16, 1),
    )


def shift(setup: Setup) -> jax.ShapeDtypeStruct | None:
    """What selection is shifted by; None in a mode that does not."""
    model = setup.cfg.model
    if not plan(setup.cfg.replay).shifted:
        return None
    shape = (num_moe_layers(model), model.d_model, model.moe.live)
    return whole(jax.ShapeDtypeStruct(shape, jnp.float32), setup.mesh)


def learner_batch(setup: Setup, rows: int, *, with_features: bool = True) -> LearnerBatch:
    """`rows` rows of the learner, cut into micro-batches, as `put_batch` lays them out."""
    cfg, todo = setup.cfg, plan(setup.cfg.replay)
    length, moe = row_length(cfg), setup.cfg.model.moe
    array = lambda dtype: jax.ShapeDtypeStruct((rows, length), dtype)
    sampled = recorded = None
    if num_moe_layers(cfg.model):
        shape = (num_moe_layers(cfg.model), rows, length, moe.top_k)
        sampled = jax.ShapeDtypeStruct(shape, route_dtype(moe.num_experts))
        recorded = jax.ShapeDtypeStruct(shape, np.uint16)
    routes = {"sampler": sampled, "scoring": recorded, "none": None}[todo.recorder]
    ahead = shift(setup) if todo.lookahead else None
    batch = LearnerBatch(
        tokens=array(jnp.int32),
        lengths=jax.ShapeDtypeStruct((rows,), jnp.int32),
        loss_mask=array(jnp.float32),
        old_logprobs=array(jnp.float32),
        behavior_logprobs=array(jnp.float32),
        ref_logprobs=array(jnp.float32) if cfg.rl.kl_coef else None,
        advantages=jax.ShapeDtypeStruct((rows,), jnp.float32),
        routes=routes,
        features=features(setup, rows) if with_features else None,
        logged=sampled if todo.recorder != "sampler" else None,
        shift=shift(setup),
        lookahead=ahead,
    )
    micro = cfg.rl.micro_batch

    def cut(x, axis):
        shape = (rows // micro, *x.shape[:axis], micro, *x.shape[axis + 1 :])
        return by_rows(jax.ShapeDtypeStruct(shape, x.dtype), setup.mesh, axis + 1)

    return map_rows(cut, batch)


def learner_buffers(setup: Setup) -> dict[str, int]:
    """Bytes a chip that a rollout batch takes while it is learned from: its mini-batches are cut
    out of it, features included, and put on the devices one at a time."""
    cfg = setup.cfg
    mini = device_bytes(learner_batch(setup, cfg.rl.mini_rows))
    kept = features(setup, cfg.rl.rows)
    return {
        "mini-batch": mini,
        "router features, cut into mini-batches": device_bytes(kept),
    }
