"""Expert parallelism: tokens go round the devices, experts stay.

Each device holds some of the experts whole (but for the fsdp and tensor axes) and some of the rows.
Rows are gathered over the expert axes, every device computes what its own experts owe to each of
them, and the parts are summed, in fp32, where the rows came from. Nothing is dropped; what a device
computes follows the assignments to its experts (experts.py). Gathered are N D values a device in
the products' type, scattered N D in fp32, with N the tokens of the whole ring.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pr2jax.core.sharding import Rules, mesh_axes, row_axes
from pr2jax.models.experts import ExpertWeights, apply_experts


def _gather_embed(weights: ExpertWeights, axes: tuple[str, ...]) -> ExpertWeights:
    """The device's experts with d_model whole; gradients are scattered back by the transpose."""
    if not axes:
        return weights
    along = lambda w, axis: lax.all_gather(w, axes, axis=axis, tiled=True)
    return ExpertWeights(along(weights.gate, 1), along(weights.up, 1), along(weights.down, 2))


def ring_experts(
    x: Float[Array, "B T D"],
    weights: ExpertWeights,
    gates: Float[Array, "B T K"],
    ids: Int[Array, "B T K"],
    *,
    mesh: Mesh,
    rules: Rules,
    impl: str,
    block: int = 0,
) -> Float[Array, "B T D"]:
    """`apply_experts` over a mesh, in fp32.

    Rows are split over `row_axes`; where an expert axis is not among them (few rows), its devices
    have the same rows and their parts are summed in place.

    Args:
      rules: how the weights lie: "experts", "expert_embed" and "mlp".
    """
    rows = row_axes(mesh, x.shape[0])
    experts, embed, hidden = (mesh_axes(mesh, rules, n) for n in ("experts", "expert_embed", "mlp"))
    passed = tuple(a for a in experts if a in rows)
    same_rows = (*(a for a in experts if a not in rows), *hidden)
    num_experts = weights.gate.shape[0]

    def local(x, weights, gates, ids):
        weights = _gather_embed(weights, embed)
        own = weights.gate.shape[0]
        gather = lambda a: lax.all_gather(a, passed, axis=0, tiled=True) if passed else a
        flat = lambda a: a.reshape(-1, a.shape[-1])
        all_x, all_gates, all_ids = gather(x), gather(gates), gather(ids)
        if experts:
            all_ids = all_ids - lax.axis_index(experts) * own
            all_ids = jnp.where((all_ids >= 0) & (all_ids < own), all_ids, own)
        y = apply_experts(
            flat(all_x),
            weights,
            flat(all_gates),
            flat(all_ids),
            impl=impl,
            block=block,
            share=own / num_experts,
        ).reshape(all_x.shape)
        if passed:
            y = lax.psum_scatter(y, passed, scatter_dimension=0, tiled=True)
        return lax.psum(y, same_rows) if same_rows else y

    some = lambda names: names or None
    act = PartitionSpec(some(rows))
    into = PartitionSpec(some(experts), some(embed), some(hidden))
    down = PartitionSpec(some(experts), some(hidden), some(embed))
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(act, ExpertWeights(into, into, down), act, act),
        out_specs=act,
        check_vma=False,
    )(x, weights, gates, ids)
