"""Replay modes as one small algebra: who records the route, and from which logits.

| mode | recorder | selection logits while recording |
|---|---|---|
| off | nobody | |
| r2 | a scoring pass of the learner under theta_old | p |
| r3 | the sampler | p |
| pr2 | the sampler | p + gamma_l h W_p |
| lookahead | the sampler | p + kappa h dW_r |
| pr2+lookahead | the sampler | p + h (gamma_l W_p + kappa dW_r) |

With both shifts W_p learns what kappa dW_r leaves. A recorded route is forced in every mini-step;
gate weights always come from the live, un-shifted router. (A frozen router, the sixth baseline, is
`optim.trainable`, not a mode.)
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from pr2jax.core.config import ConfigError
from pr2jax.core.optim import OptimConfig, OptState, adam_direction
from pr2jax.core.params import Tree, map_with_path
from pr2jax.models.config import ModelConfig, num_moe_layers
from pr2jax.models.predictor import DepthGate, depth_gates
from pr2jax.models.transformer import predictor_params, router_params

Mode = Literal["off", "r2", "r3", "pr2", "lookahead", "pr2+lookahead"]
ROUTER_PATTERN = r"(^|/)moe/router/kernel$"
PREDICTOR_PATTERN = r"(^|/)moe/predictor/kernel$"


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Routing replay (PR2, arXiv 2606.00395).

    Attributes:
      mode: see the module's table.
      features: `recorded` by the sampler as it decodes, or `recomputed` by a pass under theta_old
        that replays the logged routes.
      feature_tokens: T_c, most tokens of a response whose features are kept; 0 keeps none, which
        only a mode without a predictor can do (its flips are then not measured).
      tokens: which input positions the predictor learns from; `all` needs recomputed features,
        since the prompt is prefilled before there is a response.
      loss_weighting: `margin` weighs tokens by min(margin_max, 1 / max(margin, margin_min)).
      margin_max, margin_min: of loss_weighting: the largest weight, and the smallest margin.
      depth_gate: how the gate on h W_p falls from 1 at the first MoE layer to depth_floor at the
        last.
      depth_floor: the gate at the last MoE layer.
      kappa: mini-steps that `lookahead` extrapolates the router's next Adam step.
      keep_features: keep router features in every mode, also in those that do not need them, so
        that flips and KL of the un-shifted old route are measured in all.
      probe_every: of so many rollout batches the last two are probed (`train/probe.py`; 0: none).
    """

    mode: Mode = "pr2"
    features: Literal["recorded", "recomputed"] = "recorded"
    feature_tokens: int = 1024
    tokens: Literal["response", "all"] = "response"
    loss_weighting: Literal["none", "margin"] = "none"
    margin_max: float = 10.0
    margin_min: float = 0.01
    depth_gate: DepthGate = "none"
    depth_floor: float = 0.0
    kappa: float = 4.0
    keep_features: bool = False
    probe_every: int = 0

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        if self.tokens == "all" and self.features == "recorded":
            raise ConfigError("tokens: 'all' needs features='recomputed'")
        if self.feature_tokens < 0:
            raise ConfigError(f"feature_tokens: must be >= 0, got {self.feature_tokens}")
        if "pr2" in self.mode and self.feature_tokens == 0:
            raise ConfigError(f"feature_tokens: mode {self.mode!r} trains a predictor, so not 0")
        for key in ("keep_features", "probe_every"):
            if getattr(self, key) and self.feature_tokens == 0:
                raise ConfigError(f"feature_tokens: {key} keeps features, so not 0")
        if self.probe_every < 0:
            raise ConfigError(f"probe_every: must be >= 0, got {self.probe_every}")
        if self.margin_max <= 0 or self.margin_min <= 0:
            raise ConfigError("margin_max: margin_max and margin_min must be > 0")
        if not 0.0 <= self.depth_floor <= 1.0:
            raise ConfigError(f"depth_floor: must be in [0, 1], got {self.depth_floor}")
        if "lookahead" in self.mode and self.kappa <= 0:
            raise ConfigError(f"kappa: must be > 0, got {self.kappa}")


@dataclasses.dataclass(frozen=True)
class ReplayPlan:
    """What a mode asks of the run.

    Attributes:
      recorder: whose routes the learner forces.
      predictor: whether W_p shifts the sampler's selection and is trained.
      lookahead: kappa, or 0.0.
      features: most tokens of a response whose router features are kept, or 0.
      depth_gate, depth_floor: the gate gamma_l on h W_p.
    """

    recorder: Literal["none", "scoring", "sampler"]
    predictor: bool = False
    lookahead: float = 0.0
    features: int = 0
    depth_gate: DepthGate = "none"
    depth_floor: float = 0.0

    @property
    def shifted(self) -> bool:
        """Whether the sampler selects from shifted logits."""
        return self.predictor or self.lookahead > 0.0


def plan(cfg: ReplayConfig) -> ReplayPlan:
    """The plan of a mode."""
    if cfg.mode in ("off", "r2", "r3"):
        recorder = {"off": "none", "r2": "scoring", "r3": "sampler"}[cfg.mode]
        return ReplayPlan(recorder, features=cfg.feature_tokens if cfg.keep_features else 0)
    return ReplayPlan(
        "sampler",
        predictor="pr2" in cfg.mode,
        lookahead=cfg.kappa if "lookahead" in cfg.mode else 0.0,
        features=cfg.feature_tokens,
        depth_gate=cfg.depth_gate,
        depth_floor=cfg.depth_floor,
    )


def check_model(cfg: ReplayConfig, model_cfg: ModelConfig) -> None:
    """Raises ConfigError where the model has no routes to replay, or no predictor to train."""
    for key in ("keep_features", "probe_every"):
        if getattr(cfg, key) and num_moe_layers(model_cfg) == 0:
            raise ConfigError(f"replay.{key}: the model is dense, it has no routers to measure")
    if cfg.mode == "off":
        return
    if num_moe_layers(model_cfg) == 0:
        raise ConfigError(f"replay.mode: {cfg.mode!r} replays routes, and the model is dense")
    if plan(cfg).predictor and not model_cfg.moe.predictor:
        raise ConfigError(f"replay.mode: {cfg.mode!r} needs model.moe.predictor=True")


def gates(todo: ReplayPlan, model_cfg: ModelConfig) -> Float[Array, " L"]:
    """gamma_l of every MoE layer."""
    return depth_gates(todo.depth_gate, num_moe_layers(model_cfg), todo.depth_floor)


def selection_shift(
    todo: ReplayPlan,
    params: Tree,
    model_cfg: ModelConfig,
    optim_cfg: OptimConfig,
    opt_state: OptState,
) -> Float[Array, "L D E"] | None:
    """S such that the sampler selects from p + h S; None where the mode does not shift.

    Computed at the start of a rollout, from the parameters and optimizer state of that moment.
    """
    if not todo.shifted:
        return None
    ahead = lookahead_shift(todo, params, model_cfg, optim_cfg, opt_state)
    shift = jnp.float32(0.0) if ahead is None else ahead
    if todo.predictor:
        w_p = predictor_params(params, model_cfg).astype(jnp.float32)
        shift = shift + gates(todo, model_cfg)[:, None, None] * w_p
    return shift


def lookahead_shift(
    todo: ReplayPlan,
    params: Tree,
    model_cfg: ModelConfig,
    optim_cfg: OptimConfig,
    opt_state: OptState,
) -> Float[Array, "L D E"] | None:
    """The part kappa dW_r of `selection_shift`, which W_p need not learn; None without one."""
    if not todo.lookahead:
        return None
    steps = adam_direction(optim_cfg, opt_state, params, ROUTER_PATTERN)
    moved = map_with_path(lambda path, leaf: steps.get(path, leaf), params)
    return todo.lookahead * router_params(moved, model_cfg)
