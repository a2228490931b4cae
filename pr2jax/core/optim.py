"""Optimizers by parameter path: groups with their own optax chain, clip norm and on/off gate.

Every parameter belongs to one label: "frozen" (its path does not match `trainable`: no moments,
never moves), the first group whose pattern matches, or "default". A label clips by the global
norm of its own gradients, so one group's gradients never shrink another's step. Moments are fp32
and all labels read one learning-rate schedule, driven by the count of updates.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util
from jaxtyping import Array, Bool, Float, Int

from pr2jax.core.config import ConfigError
from pr2jax.core.params import Tree, map_with_path, path_str, tree_paths

DEFAULT, FROZEN = "default", "frozen"
NO_DECAY = r"(^|/)([^/]*norm[^/]*|[^/]*bias)(/|$)"

Metrics = dict[str, tuple[Array, Array]]


def _check_regex(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{key}: {pattern!r} is not a regular expression ({error})") from None


def _check_range(key: str, value: float | None, low: float, below: float = math.inf) -> None:
    if value is not None and not low <= value <= below:
        raise ConfigError(f"{key}: {value} is outside [{low}, {below}]")


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    """Parameters (`re.search(pattern, path)`) with settings of their own; None inherits.

    `clip_norm` inherits the value and still measures the group's own norm; `inf` does not clip.

    Attributes:
      pattern: regular expression, looked for in a parameter's path.
      lr_multiplier: times the schedule's learning rate.
      weight_decay, optimizer, b1, b2, eps: as in OptimConfig.
    """

    pattern: str
    lr_multiplier: float = 1.0
    clip_norm: float | None = None
    weight_decay: float | None = None
    optimizer: Literal["adamw", "sgd"] | None = None
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None

    def validate(self) -> None:
        """Raise ConfigError("key: why") for a value without meaning."""
        _check_regex("pattern", self.pattern)
        _check_range("lr_multiplier", self.lr_multiplier, 0.0)
        _check_range("clip_norm", self.clip_norm, 0.0)
        _check_range("weight_decay", self.weight_decay, 0.0)
        _check_range("b1", self.b1, 0.0, 1.0)
        _check_range("b2", self.b2, 0.0, 1.0)
        _check_range("eps", self.eps, 0.0)
        for key in ("b1", "b2", "eps"):
            if self.optimizer == "sgd" and getattr(self, key) is not None:
                raise ConfigError(f"{key}: sgd has no use for it")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (decoupled decay, Loshchilov & Hutter 2019) or plain SGD, its schedule and its groups.

    `rewarmup_at` are counts of updates at which the rate starts again from peak / rewarmup_steps
    of what the schedule says and rises for `rewarmup_steps` updates (growth, emo/schedule.py).
    `no_decay` exempts paths from weight decay (default: norms and biases). `total_steps` counts
    optimizer updates; cosine and WSD need it. `eps` is a choice: 1e-15 amplifies the rounding
    noise of parameters without signal.

    Attributes:
      learning_rate: the peak; a group multiplies it by its lr_multiplier.
      schedule: after the warm-up: constant, cosine down to the end, or wsd (constant, then a linear
        fall).
      warmup_steps: updates over which the rate rises from 0.
      decay_fraction: of wsd: the last share of total_steps, over which the rate falls.
      final_fraction: of cosine and wsd: what is left of the peak at total_steps.
      b1, b2: Adam's decay of its first and second moments.
      weight_decay: what is taken of a parameter an update, times the rate.
      clip_norm: largest global norm of a label's gradients (None: not clipped).
      trainable: parameters whose path matches (re.search) are trained; others never move.
      groups: parameters with settings of their own, by name; the first pattern that matches counts.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    total_steps: int = 0
    decay_fraction: float = 0.2
    final_fraction: float = 0.0
    rewarmup_at: tuple[int, ...] = ()
    rewarmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    no_decay: str = NO_DECAY
    clip_norm: float | None = 1.0
    trainable: str = ".*"
    groups: dict[str, ParamGroup] = dataclasses.field(default_factory=dict)

    def validate(self) -> None:
        """Raise ConfigError("key: why") for a value without meaning."""
        for key in (
            "learning_rate",
            "warmup_steps",
            "total_steps",
            "rewarmup_steps",
            "eps",
            "weight_decay",
        ):
            _check_range(key, getattr(self, key), 0)
        for key in ("decay_fraction", "final_fraction", "b1", "b2"):
            _check_range(key, getattr(self, key), 0.0, 1.0)
        _check_range("clip_norm", self.clip_norm, 0.0)
        for key in ("no_decay", "trainable"):
            _check_regex(key, getattr(self, key))
        if self.optimizer not in ("adamw", "sgd"):
            raise ConfigError(f"optimizer: {self.optimizer!r} is not adamw or sgd")
        if self.schedule not in ("constant", "cosine", "wsd"):
            raise ConfigError(f"schedule: {self.schedule!r} is not constant, cosine or wsd")
        if self.schedule != "constant" and self.total_steps <= self.warmup_steps:
            raise ConfigError(
                f"total_steps: {self.total_steps} leaves no step after the {self.warmup_steps} "
                f"of warm-up; {self.schedule} needs it"
            )
        for name in (DEFAULT, FROZEN):
            if name in self.groups:
                raise ConfigError(f"groups.{name}: the name is taken")
        for name, group in self.groups.items():
            try:
                group.validate()
            except ConfigError as error:
                raise ConfigError(f"groups.{name}.{error}") from None


@struct.dataclass
class OptState:
    """`count`: updates so far, which the schedule reads; `groups`: each label's optax state.

    A group's state (its own Adam count and moments, as a sub-tree of the parameters) stands still
    with the group while it is inactive; `count` does not, so that every group decays with the run.
    """

    count: Int[Array, ""]
    groups: dict[str, Any]


def learning_rate(cfg: OptimConfig, count: Int[Array, ""] | int) -> Float[Array, ""]:
    """Learning rate of update number `count` (0-based), before group multipliers.

    Warm-up is linear and starts at peak / warmup_steps, so no update is wasted on a rate of 0.
    cosine: from the end of warm-up to total_steps, down to final_fraction of the peak. wsd:
    constant, then linear over the last decay_fraction of total_steps (never into the warm-up).
    """
    count = jnp.asarray(count, jnp.float32)
    scale = jnp.float32(1.0)
    if cfg.schedule == "cosine":
        share = (count - cfg.warmup_steps) / (cfg.total_steps - cfg.warmup_steps)
        fall = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0.0, 1.0)))
        scale = cfg.final_fraction + (1 - cfg.final_fraction) * fall
    elif cfg.schedule == "wsd":
        length = min(cfg.decay_fraction * cfg.total_steps, cfg.total_steps - cfg.warmup_steps)
        left = (cfg.total_steps - count) / max(length, 1e-9)
        scale = cfg.final_fraction + (1 - cfg.final_fraction) * jnp.clip(left, 0.0, 1.0)
    if cfg.warmup_steps:
        scale = jnp.where(count < cfg.warmup_steps, (count + 1) / cfg.warmup_steps, scale)
    if cfg.rewarmup_steps:
        for at in cfg.rewarmup_at:
            rise = jnp.clip((count - at + 1) / cfg.rewarmup_steps, 0.0, 1.0)
            scale = scale * jnp.where(count < at, 1.0, rise)
    return cfg.learning_rate * scale


def group_settings(cfg: OptimConfig, label: str) -> ParamGroup:
    """A label's settings with everything inherited filled in."""
    group = cfg.groups.get(label, ParamGroup(pattern=".*"))
    inherited = ("clip_norm", "weight_decay", "optimizer", "b1", "b2", "eps")
    missing = {k: getattr(cfg, k) for k in inherited if getattr(group, k) is None}
    return dataclasses.replace(group, **missing)


def _chain(cfg: OptimConfig, label: str) -> optax.GradientTransformation:
    """Gradients to a descent direction; the learning rate is applied outside."""
    group = group_settings(cfg, label)
    parts = []
    if group.clip_norm is not None and math.isfinite(group.clip_norm):
        parts.append(optax.clip_by_global_norm(group.clip_norm))
    if group.optimizer == "adamw":
        parts.append(
            optax.scale_by_adam(b1=group.b1, b2=group.b2, eps=group.eps, mu_dtype=jnp.float32)
        )
    if group.weight_decay:
        mask = lambda tree: map_with_path(lambda p, _: not re.search(cfg.no_decay, p), tree)
        parts.append(optax.add_decayed_weights(group.weight_decay, mask=mask))
    return optax.chain(*parts) if parts else optax.identity()


def _labels(cfg: OptimConfig, paths: list[str]) -> dict[str, str]:
    """The label of each path. Raises ConfigError for a pattern that matches no parameter."""
    if not any(re.search(cfg.trainable, path) for path in paths):
        raise ConfigError(f"trainable: {cfg.trainable!r} matches no parameter")
    for name, group in cfg.groups.items():
        if not any(re.search(group.pattern, path) for path in paths):
            raise ConfigError(f"groups.{name}.pattern: {group.pattern!r} matches no parameter")

    def label(path):
        if not re.search(cfg.trainable, path):
            return FROZEN
        return next((n for n, g in cfg.groups.items() if re.search(g.pattern, path)), DEFAULT)

    return {path: label(path) for path in paths}


def _fp32(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _norm(tree: Tree) -> Float[Array, ""]:
    return jnp.asarray(optax.tree.norm(tree), jnp.float32)


class Optimizer:
    """Built by `build_optimizer`; pure `init` and `update`, to be called inside jit.

    `labels`: path -> label. `trained`: the labels that hold trainable parameters.
    """

    def __init__(self, cfg: OptimConfig, labels: Mapping[str, str]):
        self.cfg = cfg
        self.labels = dict(labels)
        present = set(self.labels.values()) - {FROZEN}
        self.trained = tuple(name for name in (DEFAULT, *cfg.groups) if name in present)
        self._chains = {name: _chain(cfg, name) for name in self.trained}

    def _split(self, tree: Tree) -> dict[str, Tree]:
        flat = traverse_util.flatten_dict(tree, sep="/")
        if flat.keys() != self.labels.keys():
            odd = sorted(flat.keys() ^ self.labels.keys())
            raise ValueError(f"tree differs from the optimizer's parameters at {odd[:3]}")
        parts: dict[str, dict[str, Any]] = {}
        for path, leaf in flat.items():
            parts.setdefault(self.labels[path], {})[path] = leaf
        return {k: traverse_util.unflatten_dict(v, sep="/") for k, v in parts.items()}

    def init(self, params: Tree) -> OptState:
        """Zero moments (fp32, whatever the parameters' dtype) for the trained labels."""
        parts = self._split(params)
        groups = {name: self._chains[name].init(_fp32(parts[name])) for name in self.trained}
        return OptState(count=jnp.zeros((), jnp.int32), groups=groups)

    def update(
        self,
        grads: Tree,
        opt_state: OptState,
        params: Tree,
        active: Mapping[str, Bool[Array, ""] | bool] | None = None,
    ) -> tuple[Tree, OptState, Metrics]:
        """One update: (new params, new state, metrics).

        Where `active[label]` is False (it may be traced) that label's parameters and its
        optimizer state come back bit-unchanged, whatever its gradients hold: a zero gradient
        would not do, since momentum still moves parameters. Labels not named are active.
        Metrics as (value, weight): `learning_rate`, `grad_norm` and `grad_norm/LABEL` (before
        clipping; trained and active parameters only), `update_norm`.
        Raises ValueError for an `active` label that trains nothing.
        """
        active = dict(active or {})
        if unknown := sorted(active.keys() - set(self.trained)):
            raise ValueError(f"active names {unknown}; trained labels are {list(self.trained)}")
        rate = learning_rate(self.cfg, opt_state.count)
        one = jnp.float32(1.0)
        grads_of, params_of = self._split(grads), self._split(params)
        new_params, new_groups, metrics = dict(params_of), {}, {}
        grad_squares = update_squares = jnp.float32(0.0)
        for name in self.trained:
            old, old_state = params_of[name], opt_state.groups[name]
            gradient, values = _fp32(grads_of[name]), _fp32(old)
            direction, state = self._chains[name].update(gradient, old_state, values)
            step = rate * group_settings(self.cfg, name).lr_multiplier
            updates = jax.tree.map(lambda d, step=step: -step * d, direction)
            new = jax.tree.map(lambda p, v, u: (v + u).astype(p.dtype), old, values, updates)
            on = one
            if name in active:
                flag = jnp.asarray(active[name])
                on = flag.astype(jnp.float32)
                new, state = jax.tree.map(
                    lambda a, b, flag=flag: jnp.where(flag, a, b), (new, state), (old, old_state)
                )
            # where, not a product: an inactive group's gradients may hold NaN.
            norm = jnp.where(on > 0, _norm(gradient), 0.0)
            grad_squares += norm**2
            update_squares += jnp.where(on > 0, _norm(updates), 0.0) ** 2
            metrics[f"grad_norm/{name}"] = (norm, on)
            new_params[name], new_groups[name] = new, state
        metrics["grad_norm"] = (jnp.sqrt(grad_squares), one)
        metrics["update_norm"] = (jnp.sqrt(update_squares), one)
        metrics["learning_rate"] = (rate, one)
        return (
            self._join(new_params, params),
            OptState(count=opt_state.count + 1, groups=new_groups),
            metrics,
        )

    def _join(self, parts: dict[str, Tree], like: Tree) -> Tree:
        flat = {}
        for part in parts.values():
            flat |= traverse_util.flatten_dict(part, sep="/")
        return map_with_path(lambda path, _: flat[path], like)

    def abstract_state(self, params: Tree) -> OptState:
        """Shapes of `init(params)`; moments take the sharding of their parameter, if it has one.

        `params`: arrays or `jax.ShapeDtypeStruct`. Scalars are left without a sharding.
        """
        sharding_of = {
            path_str(path): getattr(leaf, "sharding", None)
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        }

        def place(path, leaf):
            # "groups/LABEL/INDEX/mu/PARAMETER PATH": the longest parameter path that ends it.
            parts = path.split("/")
            tails = ("/".join(parts[i:]) for i in range(len(parts)))
            sharding = next((sharding_of[t] for t in tails if t in sharding_of), None)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return map_with_path(place, jax.eval_shape(self.init, params))


def build_optimizer(cfg: OptimConfig, params_or_specs: Tree) -> Optimizer:
    """The optimizer of a parameter tree (arrays, abstract arrays or specs: only paths are read).

    Raises ConfigError for a bad setting, or a group or `trainable` pattern that matches nothing.
    """
    cfg.validate()
    return Optimizer(cfg, _labels(cfg, tree_paths(params_or_specs)))


def adam_direction(
    cfg: OptimConfig, opt_state: OptState, params: Tree, pattern: str
) -> dict[str, Array]:
    """The step Adam takes next if the gradient equals its running mean: {path: step, fp32}.

    -learning_rate * m_hat / (sqrt(v_hat) + eps) of the parameters matching `pattern`, without
    weight decay; zero for frozen parameters and before the first update. `opt_state` is that of
    `build_optimizer(cfg, params)`. This is dW of 'lookahead' routing.
    Raises ConfigError when nothing matches, or where a match is trained by SGD (no momentum).
    """
    optimizer = build_optimizer(cfg, params)
    flat = traverse_util.flatten_dict(params, sep="/")
    chosen = [path for path in flat if re.search(pattern, path)]
    if not chosen:
        raise ConfigError(f"adam_direction: {pattern!r} matches no parameter")
    rate = learning_rate(cfg, opt_state.count)
    directions: dict[str, Array] = {}
    for label in sorted({optimizer.labels[path] for path in chosen}):
        paths = [path for path in chosen if optimizer.labels[path] == label]
        if label == FROZEN:
            directions |= {p: jnp.zeros(flat[p].shape, jnp.float32) for p in paths}
            continue
        group = group_settings(cfg, label)
        if group.optimizer != "adamw":
            raise ConfigError(f"optimizer: {paths[0]} is trained by {group.optimizer}, not adamw")
        adam = _adam_state(opt_state.groups[label])
        mu = traverse_util.flatten_dict(adam.mu, sep="/")
        nu = traverse_util.flatten_dict(adam.nu, sep="/")
        # count = 0 has m = v = 0; any positive correction turns that into a zero step.
        count = jnp.maximum(adam.count, 1).astype(jnp.float32)
        for path in paths:
            m_hat, v_hat = mu[path] / (1 - group.b1**count), nu[path] / (1 - group.b2**count)
            step = m_hat / jnp.where(adam.count > 0, jnp.sqrt(v_hat) + group.eps, 1.0)
            directions[path] = -rate * group.lr_multiplier * step
    return directions


def _adam_state(group_state: Any) -> optax.ScaleByAdamState:
    is_adam: Callable[[Any], bool] = lambda s: isinstance(s, optax.ScaleByAdamState)
    return next(s for s in jax.tree.leaves(group_state, is_leaf=is_adam) if is_adam(s))
