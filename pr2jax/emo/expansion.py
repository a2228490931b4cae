"""Growth: a training state with E experts becomes one with E' (EMO, arXiv 2605.13247).

What grows is read off the two models' parameter specs: the one dimension in which they differ
(experts' weights, router and predictor columns, selection biases), and the same dimension of the
optimizer's moments. Everything else passes unchanged. The k experts a token uses stay k.

The new state is a pure function of the old one and a key, to the bit, on any mesh: draws are
integers looked up in a table of Gaussian quantiles (transcendental functions differ by an ulp
between a shard and the whole), and nothing is summed.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key
from scipy.special import ndtri

from pr2jax.core import rng
from pr2jax.core.config import ConfigError
from pr2jax.core.optim import Optimizer, OptState
from pr2jax.core.params import (
    Gaussian,
    ParamSpec,
    Tree,
    abstract_params,
    map_with_path,
    path_str,
)
from pr2jax.core.sharding import param_shardings
from pr2jax.core.state import TrainState, abstract_state
from pr2jax.models.config import ModelConfig, num_moe_layers
from pr2jax.models.transformer import param_specs

Newborn = Literal["gaussian", "gaussian_bias_reset", "copy", "copy_noise", "masked_copy"]


@dataclass(frozen=True)
class GrowthConfig:
    """How newborn experts start.

    Attributes:
      init: `gaussian` draws their weights and router columns as the model's initialisation does;
        `gaussian_bias_reset` also sets every expert's selection bias to 0 (the paper's);
        `copy` copies experts in turn (newborn E + i is i mod E), `copy_noise` multiplies every
        copied weight by 1 + noise z with z normal (the bias and the predictor are copied as they
        are); `masked_copy` copies, and the newborns stay out of selection, softmax, losses and
        statistics until they are unmasked, so growth leaves the function as it is.
      noise: of `copy_noise`.
      router_scale: times the standard deviation of Gaussian router columns (the paper does not
        say theirs).
      optimizer: `reset` starts every moment at zero (the paper's), `keep` only the newborns',
        `copy` gives these their sources' (with Gaussian newborns too, whose sources are the
        experts they would have been copies of). The count of updates always goes on.
    """

    init: Newborn = "gaussian_bias_reset"
    noise: float = 0.01
    router_scale: float = 1.0
    optimizer: Literal["reset", "keep", "copy"] = "reset"

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        for key in ("noise", "router_scale"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key}: must be >= 0, got {getattr(self, key)}")

    @property
    def copies(self) -> bool:
        """Whether newborns start as copies."""
        return self.init in ("copy", "copy_noise", "masked_copy")


def grown_config(cfg: ModelConfig, experts: int, *, masked: bool = False) -> ModelConfig:
    """`cfg` with `experts` experts, the newborns masked or not.

    Raises ConfigError("experts: why"): there are no experts, fewer would be left, old newborns
    are still masked, or experts stand in groups (whose members growth would change).
    """
    if not num_moe_layers(cfg):
        raise ConfigError("experts: a dense model has none that could grow; upcycle it first")
    moe = cfg.moe
    if moe.masked:
        raise ConfigError(f"experts: {moe.masked} are still masked; unmask them before growing")
    if experts < moe.num_experts:
        raise ConfigError(f"experts: a pool of {moe.num_experts} cannot shrink to {experts}")
    if moe.num_groups > 1 and experts != moe.num_experts:
        raise ConfigError(f"experts: those of {moe.num_groups} groups cannot grow")
    newborn = experts - moe.num_experts if masked else 0
    return dataclasses.replace(
        cfg, moe=dataclasses.replace(moe, num_experts=experts, masked=newborn)
    )


def unmasked_config(cfg: ModelConfig) -> ModelConfig:
    """`cfg` with every expert taking part; parameters are the same."""
    return dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, masked=0))


def growing(old: ModelConfig, new: ModelConfig) -> dict[str, tuple[int, ParamSpec]]:
    """{path: (dimension that grows, its new spec)} of the parameters that growth changes.

    Raises ConfigError where the models differ in more than their number of experts.
    """
    flat = lambda cfg: traverse_util.flatten_dict(param_specs(cfg), sep="/")
    before, after = flat(old), flat(new)
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise ConfigError(f"experts: the grown model differs at {odd[0]}")
    found = {}
    for path, spec in after.items():
        pairs = zip(before[path].shape, spec.shape, strict=True)
        axes = [axis for axis, (a, b) in enumerate(pairs) if a != b]
        if axes and (len(axes) > 1 or spec.shape[axes[0]] != new.moe.num_experts):
            raise ConfigError(f"experts: the grown model differs at {path}")
        if axes:
            found[path] = (axes[0], spec)
    return found


@functools.cache
def _quantiles() -> np.ndarray:
    """Standard normal quantiles at (i + 1/2) / 2^16, float64; the last is 4.3."""
    return ndtri((np.arange(1 << 16) + 0.5) / (1 << 16))


def draw(
    table: Float[np.ndarray, "65536"], key: Key[Array, ""], shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """Entries of `table`, drawn evenly: looked up, hence the same to the bit on every mesh."""
    return jnp.asarray(table)[jax.random.bits(key, shape, jnp.uint16).astype(jnp.int32)]


def _sources(old: Array, count: int, axis: int) -> Array:
    """What newborns are copies of, in turn."""
    return jnp.take(old, np.arange(count) % old.shape[axis], axis=axis)


def _grown_leaf(path: str, old: Array, axis: int, spec: ParamSpec, options: GrowthConfig, key):
    """One parameter with its newborns behind."""
    count = spec.shape[axis] - old.shape[axis]
    is_bias = path.endswith("selection_bias")
    if options.init == "gaussian_bias_reset" and is_bias:
        return jnp.zeros(spec.shape, old.dtype)
    shape = (*spec.shape[:axis], count, *spec.shape[axis + 1 :])
    drawn = isinstance(spec.init, Gaussian)  # neither biases nor predictors are
    if options.copies:
        newborn = _sources(old, count, axis)
        if options.init == "copy_noise" and drawn:
            factors = (1.0 + options.noise * _quantiles()).astype(np.float32)
            newborn = newborn * draw(factors, key, shape)
    elif drawn:
        scale = options.router_scale if "/router/" in path else 1.0
        values = (scale * spec.init.stddev(spec.shape) * _quantiles()).astype(np.float32)
        newborn = draw(values, key, shape)
    else:
        newborn = jnp.zeros(shape)
    return jnp.concatenate([old, newborn.astype(old.dtype)], axis=axis)


def expand_params(
    params: Tree, old: ModelConfig, new: ModelConfig, options: GrowthConfig, key: Key[Array, ""]
) -> Tree:
    """Parameters of `new` out of those of `old`; pure, to be run under jit.

    A newborn's draws depend on the key, the parameter's path and their own place only.
    Raises ConfigError as `growing`.
    """
    grows = growing(old, new)

    def grow(path: str, leaf: Array) -> Array:
        if path not in grows:
            return leaf
        return _grown_leaf(path, leaf, *grows[path], options, rng.named(key, path))

    return map_with_path(grow, params)


def _expand_moments(
    opt_state: OptState, old: ModelConfig, new: ModelConfig, options: GrowthConfig
) -> OptState:
    """The optimizer's state with its moments grown: newborns' at zero, or their sources'."""
    grows = growing(old, new)

    def grow(path: str, leaf: Array) -> Array:
        # "groups/LABEL/INDEX/mu/PARAMETER PATH"
        parts = path.split("/")
        tails = ("/".join(parts[i:]) for i in range(len(parts)))
        found = next((grows[t] for t in tails if t in grows), None)
        if found is None or not leaf.ndim:
            return leaf
        axis, spec = found
        count = spec.shape[axis] - leaf.shape[axis]
        newborn = _sources(leaf, count, axis)
        if options.optimizer == "keep":
            newborn = jnp.zeros_like(newborn)
        return jnp.concatenate([leaf, newborn], axis=axis)

    return map_with_path(grow, opt_state)


def expand(
    state: TrainState,
    old: ModelConfig,
    new: ModelConfig,
    options: GrowthConfig,
    key: Key[Array, ""],
    optimizer: Optimizer,
    mesh: Mesh | None = None,
) -> TrainState:
    """The state of `new` out of `state`, that of `old`, laid out for `mesh` as `new` lies on it.

    `optimizer`: that of the new parameters. Counters go on. Old and new state are there at once.
    Raises ConfigError as `growing`, ShardingError where the mesh does not divide the new pool.
    """
    specs = param_specs(new)
    shardings = None if mesh is None else param_shardings(specs, mesh)
    abstract = abstract_state(abstract_params(specs, shardings), optimizer)

    def build(state: TrainState) -> TrainState:
        params = expand_params(state.params, old, new, options, key)
        if options.optimizer == "reset":
            moments = optimizer.init(params).replace(count=state.opt_state.count)
        else:
            moments = _expand_moments(state.opt_state, old, new, options)
        return state.replace(params=params, opt_state=moments)

    places = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, abstract)
    grown = jax.jit(build, out_shardings=places)(state)
    _check_shapes(grown, abstract)
    return grown


def _check_shapes(state: TrainState, abstract: Any) -> None:
    """A grown state must be one that the new model's own checkpoints restore into."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(abstract), strict=True)
    for (path, leaf), wanted in pairs:
        if leaf.shape != wanted.shape or leaf.dtype != wanted.dtype:
            raise AssertionError(f"{path_str(path)} grew to {leaf.shape}, not {wanted.shape}")
