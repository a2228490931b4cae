"""The Mixture-of-Experts layer: route, dispatch, combine; and what it tells about its routes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pr2jax.core.params import ParamSpec, fan_in, zeros
from pr2jax.core.sharding import Rules
from pr2jax.models import router
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.models.experts import BY_PLATFORM, ExpertWeights, apply_experts
from pr2jax.models.layers import swiglu
from pr2jax.models.ring import ring_experts


@struct.dataclass
class Record:
    """Which router inputs and logits a forward returns.

    positions: rows' token indices to keep, [B, C]; None keeps every token (C = T).
    inputs: whether the router inputs are kept beside the logits.
    """

    positions: Int[Array, "B C"] | None = None
    inputs: bool = struct.field(pytree_node=False, default=True)


class MoEOptions(NamedTuple):
    """What a forward asks of each MoE layer, the same for all of them."""

    record: Record | None
    diagnostics: bool
    stats: bool
    mesh: Mesh | None
    rules: Rules
    platform: str


def swiglu_specs(cfg: ModelConfig, repeats: int, width: int) -> dict:
    """Parameters of `repeats` stacked dense SwiGLU layers."""
    r, d = repeats, cfg.d_model
    down = fan_in(-2, scale=(2 * cfg.num_layers) ** -0.5)
    return {
        "gate": ParamSpec((r, d, width), ("layers", "embed", "mlp"), fan_in(-2)),
        "up": ParamSpec((r, d, width), ("layers", "embed", "mlp"), fan_in(-2)),
        "down": ParamSpec((r, width, d), ("layers", "mlp", "embed"), down),
    }


def moe_specs(cfg: ModelConfig, repeats: int) -> dict:
    """Parameters of `repeats` stacked MoE layers. The predictor starts at zero (PR2, Eq. 4)."""
    moe = cfg.moe
    r, d, e, f = repeats, cfg.d_model, moe.num_experts, moe.expert_dim
    down = fan_in(-2, scale=(2 * cfg.num_layers) ** -0.5)
    wide = ("layers", "experts", "expert_embed", "mlp")
    specs = {
        "router": {"kernel": ParamSpec((r, d, e), ("layers", None, None), fan_in(-2))},
        "experts": {
            "gate": ParamSpec((r, e, d, f), wide, fan_in(-2)),
            "up": ParamSpec((r, e, d, f), wide, fan_in(-2)),
            "down": ParamSpec((r, e, f, d), ("layers", "experts", "mlp", "expert_embed"), down),
        },
    }
    if moe.selection_bias:
        specs["router"]["selection_bias"] = ParamSpec((r, e), ("layers", None), zeros)
    if moe.predictor:
        specs["predictor"] = {"kernel": ParamSpec((r, d, e), ("layers", None, None), zeros)}
    if moe.shared_dim:
        specs["shared"] = swiglu_specs(cfg, repeats, moe.shared_dim)
    return specs


def resolve_experts(moe: MoEConfig, platform: str, expert_axis: int) -> str:
    """The grouped matmul (experts.IMPLEMENTATIONS) on `platform`, experts over `expert_axis`
    devices."""
    if moe.impl != "auto":
        return moe.impl
    impl = BY_PLATFORM[platform]
    # Over several devices: blocks' work follows the assignments, batched does the worst case's.
    return "blocks" if impl == "batched" and expert_axis > 1 else impl


def dispatch(
    x: Float[Array, "B T D"],
    weights: ExpertWeights,
    gates: Float[Array, "B T K"],
    ids: Int[Array, "B T K"],
    moe: MoEConfig,
    options: MoEOptions,
) -> Float[Array, "B T D"]:
    """Sends tokens to their experts, on whatever device those are, and combines in fp32."""
    mesh = options.mesh
    impl = resolve_experts(moe, options.platform, 1 if mesh is None else mesh.shape["expert"])
    if mesh is not None:
        return ring_experts(
            x, weights, gates, ids, mesh=mesh, rules=options.rules, impl=impl, block=moe.block_size
        )
    flat = lambda a: a.reshape(-1, a.shape[-1])
    y = apply_experts(flat(x), weights, flat(gates), flat(ids), impl=impl, block=moe.block_size)
    return y.reshape(x.shape)


def _at(values: Float[Array, "B T X"], positions: Int[Array, "B C"] | None):
    if positions is None:
        return values
    return jnp.take_along_axis(values, positions[..., None], axis=1)


def moe_layer(
    params: dict,
    x: Float[Array, "B T D"],
    *,
    cfg: ModelConfig,
    real: Bool[Array, "B T"],
    routes: Int[Array, "B T K"] | None,
    shift: Float[Array, "D E"] | None,
    options: MoEOptions,
) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
    """y = sum over the used experts, and the layer's taps (a dict of arrays).

    The used experts are `routes` where given, else the top-k of logits shifted by x @ `shift`
    (PR2, Eq. 4-6), else the live top-k. Gates are always those of the un-shifted logits.
    Taps: `routes`; `inputs` and `logits` at recorded positions; `agreement` and `margin`
    (diagnostics); `load_balance`, `z`, `load` and `entropy` (stats).
    """
    moe = cfg.moe
    known = {name: router.live_columns(leaf, moe) for name, leaf in params["router"].items()}
    bias = known.get("selection_bias")
    logits = router.project(x, known["kernel"])
    if routes is not None:
        ids = routes.astype(jnp.int32)
    elif shift is not None:
        ids = router.select(logits + router.project(x, shift), bias, moe)
    else:
        ids = router.select(logits, bias, moe)
    gates = router.gates(logits, ids, moe)
    weights = ExpertWeights(*(params["experts"][n].astype(x.dtype) for n in ExpertWeights._fields))
    wanted = jnp.where(real[..., None], ids, moe.num_experts)  # padding goes to no expert
    y = dispatch(x, weights, gates, wanted, moe, options)
    if "shared" in params:
        y = y + swiglu(params["shared"], x).astype(jnp.float32)

    taps = {"routes": ids}
    record = options.record
    if record is not None:
        taps["logits"] = _at(logits, record.positions)
    if record is not None and record.inputs:
        taps["inputs"] = _at(x, record.positions)
    if options.diagnostics:
        choice = jax.lax.stop_gradient(router.selection_scores(logits, bias, moe))
        taps["agreement"] = router.agreement(ids, jax.lax.top_k(choice, moe.top_k)[1])
        taps["margin"] = router.margin(choice, moe.top_k)
    if options.stats:
        taps["load_balance"], taps["z"], taps["load"] = router.router_stats(logits, ids, real, moe)
        taps["entropy"] = router.router_entropy(logits, real, moe)
    return y.astype(x.dtype), taps
