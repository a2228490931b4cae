"""The one forward that the sampler and the learner share.

A stack is a list of segments, each a pattern of blocks scanned over its repeats. Recorded routes
are scan outputs, forced routes and selection shifts scan inputs, and the cache a scan carry: no
layer knows its number, so none can be bound to the wrong routes.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pr2jax.core.params import ParamSpec, fan_in, map_with_path, normal, ones
from pr2jax.core.sharding import RULES, Rules, row_sharding
from pr2jax.models.attention import (
    attention,
    attention_specs,
    cached_mask,
    packed_mask,
    resolve_impl,
)
from pr2jax.models.cache import Cache
from pr2jax.models.config import ModelConfig, Segment, num_moe_layers, segments
from pr2jax.models.layers import rms_norm, rope_tables, swiglu
from pr2jax.models.mla import mla_attention, mla_specs
from pr2jax.models.moe import (
    MoEOptions,
    Record,
    moe_layer,
    moe_specs,
    swiglu_specs,
)
from pr2jax.models.router import live_columns

__all__ = [
    "ForwardOutput",
    "Record",
    "RouterOutput",
    "forward",
    "param_specs",
    "predictor_params",
    "router_params",
    "selection_biases",
    "unstack_layers",
]


@struct.dataclass
class RouterOutput:
    """What the routers of a forward saw; L counts MoE layers from the bottom.

    logits, inputs: un-shifted router logits (fp32) and router inputs at the recorded positions.
    agreement: |used ∩ live top-k|; margin: p_(k) - p_(k+1) of the live selection scores.
    load_balance, z: the auxiliary losses of each layer; load: assignments an expert;
    entropy: of the routers' scores, in nats a token.
    """

    logits: Float[Array, "L B C E"] | None = None
    inputs: Float[Array, "L B C D"] | None = None
    agreement: Int[Array, "L B T"] | None = None
    margin: Float[Array, "L B T"] | None = None
    load_balance: Float[Array, " L"] | None = None
    z: Float[Array, " L"] | None = None
    load: Float[Array, "L E"] | None = None
    entropy: Float[Array, " L"] | None = None


@struct.dataclass
class ForwardOutput:
    """hidden is after the final norm; routes are the experts used (None for a dense model)."""

    hidden: Float[Array, "B T D"]
    cache: Cache | None
    routes: Int[Array, "L B T K"] | None
    router: RouterOutput


def _segment_name(index: int) -> str:
    return f"segment_{index}"


def _block_name(index: int) -> str:
    return f"block_{index}"


def param_specs(cfg: ModelConfig) -> dict:
    """The parameter tree of `cfg`; layers of a segment are stacked along their first axis."""
    v, d = cfg.vocab_size, cfg.d_model
    norm = lambda r: {"scale": ParamSpec((r, d), ("layers", "norm"), ones)}
    specs: dict = {
        "embed": {"table": ParamSpec((v, d), ("vocab", "embed"), normal(cfg.init_stddev))}
    }
    for i, segment in enumerate(segments(cfg)):
        blocks = {}
        for j, block in enumerate(segment.pattern):
            r = segment.repeats
            one = {
                "attention_norm": norm(r),
                "attention": (mla_specs if cfg.mla else attention_specs)(cfg, r),
                "ffn_norm": norm(r),
            }
            if block.moe:
                one["moe"] = moe_specs(cfg, r)
            else:
                one["ffn"] = swiglu_specs(cfg, r, cfg.dense_dim)
            blocks[_block_name(j)] = one
        specs[_segment_name(i)] = blocks
    specs["final_norm"] = {"scale": ParamSpec((d,), ("norm",), ones)}
    if not cfg.tie_embeddings:
        specs["lm_head"] = {"kernel": ParamSpec((d, v), ("embed", "vocab"), fan_in(-2))}
    return specs


def _stacked(params: dict, cfg: ModelConfig, *path: str) -> Float[Array, "L ..."] | None:
    """One of the router's or predictor's parameters, of all layers in depth order and of the
    experts that take part (V of E); None where the model has none."""
    parts = []
    for i, segment in enumerate(segments(cfg)):
        if not segment.num_moe:
            continue
        columns = []
        for j, block in enumerate(segment.pattern):
            if block.moe:
                leaf = params[_segment_name(i)][_block_name(j)]["moe"]
                for name in path:
                    if name not in leaf:
                        return None
                    leaf = leaf[name]
                columns.append(live_columns(leaf, cfg.moe))
        stacked = jnp.stack(columns, axis=1)
        parts.append(stacked.reshape(segment.num_moe, *stacked.shape[2:]))
    return jnp.concatenate(parts) if parts else None


def router_params(params: dict, cfg: ModelConfig) -> Float[Array, "L D E"] | None:
    """W_r of every MoE layer. Works on any tree of the parameters' structure."""
    return _stacked(params, cfg, "router", "kernel")


def predictor_params(params: dict, cfg: ModelConfig) -> Float[Array, "L D E"] | None:
    """W_p of every MoE layer."""
    return _stacked(params, cfg, "predictor", "kernel")


def selection_biases(params: dict, cfg: ModelConfig) -> Float[Array, "L E"] | None:
    """The selection bias of every MoE layer."""
    return _stacked(params, cfg, "router", "selection_bias")


def _block(params, x, cache, layer, routes, shift, *, spec, cfg, shared):
    """One pre-norm block: attention, then MoE or dense feed-forward."""
    with jax.named_scope("attention"):
        h = rms_norm(x, params["attention_norm"]["scale"], cfg.norm_eps)
        y, cache = (mla_attention if cfg.mla else attention)(
            params["attention"],
            h,
            cfg=cfg,
            rope=shared["rope"],
            positions=shared["positions"],
            segment_ids=shared["segment_ids"],
            mask=shared["masks"][spec.window],
            window=spec.window,
            impl=shared["impl"],
            cache=cache,
            layer=layer,
            read_length=shared["read_length"],
            mesh=shared["options"].mesh,
            platform=shared["options"].platform,
        )
        x = x + y
    h = rms_norm(x, params["ffn_norm"]["scale"], cfg.norm_eps)
    if not spec.moe:
        with jax.named_scope("ffn"):
            return x + swiglu(params["ffn"], h), cache, None
    with jax.named_scope("moe"):
        y, taps = moe_layer(
            params["moe"],
            h,
            cfg=cfg,
            real=shared["segment_ids"] > 0,
            routes=routes,
            shift=shift,
            options=shared["options"],
        )
        return x + y, cache, taps


def _split_rows(x: Float[Array, "B T D"], mesh: Mesh | None):
    """Lays the residual stream out by rows; else it would take the embedding table's layout."""
    return x if mesh is None else lax.with_sharding_constraint(x, row_sharding(mesh, x.shape))


def _rematerialise(fn, mode: str):
    if mode == "none":
        return fn
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if mode == "dots" else None
    return jax.checkpoint(fn, policy=policy)


def _repeats(stacked: dict, reps: int) -> tuple[dict, ...]:
    return tuple(jax.tree.map(lambda a: a[r], stacked) for r in range(reps))  # noqa: B023


def product_params(params: dict, cfg: ModelConfig, dtype) -> dict:
    """The parameters with the weights of products in `dtype`, as `forward` would cast them.

    For a policy that stands still over many forwards (a rollout): each would cast them again, in
    a decode step at more cost than the products. Routers, predictors, norms, the embedding and
    the head stay as they are.
    """
    kept = ("router", "predictor", "norm", "selection_bias")
    cast = lambda path, leaf: leaf if any(k in path for k in kept) else leaf.astype(dtype)
    names = [_segment_name(i) for i in range(len(segments(cfg)))]
    return params | {name: map_with_path(cast, params[name]) for name in names}


def unstack_layers(params: dict, cfg: ModelConfig) -> dict:
    """The parameters with each layer's arrays apart, for unrolled forwards inside a loop.

    Called before a decode loop it makes the layers loop constants; otherwise every step copies
    each layer's expert weights out of the stack (11% of a decode step on CPU). `forward` takes
    either form, and runs this one unrolled.
    """
    apart = {
        _segment_name(i): _repeats(params[_segment_name(i)], segment.repeats)
        for i, segment in enumerate(segments(cfg))
    }
    return params | apart


def _run_segment(params, x, cache, routes, shift, *, segment: Segment, cfg, shared, unroll):
    """All repeats of a segment; routes [R*m, B, T, K] and shift [R*m, D, E] or None."""
    m, reps = segment.moe_per_repeat, segment.repeats
    fold = lambda a: None if a is None or m == 0 else a.reshape(reps, m, *a.shape[1:])
    routes, shift = fold(routes), fold(shift)

    def step(carry, inputs):
        x, cache = carry
        block_params, routes, shift, repeat = inputs
        taps, seen = [], 0
        for j, spec in enumerate(segment.pattern):
            layer = segment.first_layer + repeat * len(segment.pattern) + j
            pick = lambda a: None if a is None or not spec.moe else a[seen]  # noqa: B023
            run = _rematerialise(partial(_block, spec=spec, cfg=cfg, shared=shared), cfg.remat)
            x, cache, tap = run(
                block_params[_block_name(j)], x, cache, layer, pick(routes), pick(shift)
            )
            if tap is not None:
                taps.append(tap)
                seen += 1
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *taps) if taps else None
        return (x, cache), stacked

    if unroll or reps == 1 or isinstance(params, tuple):
        layers = params if isinstance(params, tuple) else _repeats(params, reps)
        collected = []
        for r in range(reps):
            take = lambda a: None if a is None else a[r]  # noqa: B023
            (x, cache), taps = step((x, cache), (layers[r], take(routes), take(shift), r))
            collected.append(taps)
        taps = jax.tree.map(lambda *a: jnp.stack(a), *collected) if m else None
    else:
        inputs = (params, routes, shift, jnp.arange(reps))
        (x, cache), taps = lax.scan(step, (x, cache), inputs)
    if taps is not None:
        taps = jax.tree.map(lambda a: a.reshape(reps * m, *a.shape[2:]), taps)
    return x, cache, taps


def _masks(stack: tuple[Segment, ...], positions, segment_ids, impl: str, read_length: int) -> dict:
    """What each window of the stack may see, by window; None where the kernel knows by itself."""
    windows = {block.window for segment in stack for block in segment.pattern}
    if read_length:
        return {w: cached_mask(positions, read_length, w) for w in windows}
    if impl in ("splash", "blocked"):
        return dict.fromkeys(windows)
    return {w: packed_mask(segment_ids, w) for w in windows}


def forward(
    params: dict,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    cfg: ModelConfig,
    cache: Cache | None = None,
    routes: Int[Array, "L B T K"] | None = None,
    shift: Float[Array, "L D E"] | None = None,
    record: Record | None = None,
    diagnostics: bool = False,
    stats: bool = False,
    dtype=jnp.float32,
    read_length: int | None = None,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    unroll: bool | None = None,
) -> ForwardOutput:
    """Runs the stack on packed rows, or on rows continued from a cache.

    Args:
      segment_ids: which document a token belongs to; 0 is padding, which counts in no statistic.
      positions: within the document. With a cache, also the cache index written.
      routes: experts to use instead of the router's choice, position t for input token t.
      shift: added to the selection logits as h @ shift (predicted routing), never to gates.
      record: keep router inputs and logits (for predictor losses).
      diagnostics: also agreement with the live routes, and margins.
      stats: also load-balancing and z losses and expert loads.
      dtype: of the residual stream and the products; routers and norms stay in fp32.
      read_length: how much of the cache attention reads (default: all); static.
      mesh, rules: the devices, and how the parameters lie on them.
      unroll: layers as straight code instead of a scan (default: not cfg.scan_layers).

    Raises ValueError when both `routes` and `shift` are given, or a shape does not fit.
    """
    if routes is not None and shift is not None:
        raise ValueError("routes and shift are exclusive: a forced route needs no prediction")
    count = num_moe_layers(cfg)
    for name, value in (("routes", routes), ("shift", shift)):
        if value is not None and value.shape[0] != count:
            raise ValueError(f"{name}: {value.shape[0]} layers for a model of {count} MoE layers")
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    stack = segments(cfg)
    impl = resolve_impl(cfg, platform, tokens.shape[1], dtype)
    read_length = 0 if cache is None else read_length or cache.length
    shared = {
        "rope": rope_tables(cfg, positions),
        "positions": positions,
        "segment_ids": segment_ids,
        "masks": _masks(stack, positions, segment_ids, impl, read_length),
        "impl": impl,
        "read_length": read_length,
        "options": MoEOptions(record, diagnostics, stats, mesh, rules, platform),
    }
    unroll = (not cfg.scan_layers) if unroll is None else unroll
    x = _split_rows(params["embed"]["table"][tokens].astype(dtype), mesh)
    taps = []
    for i, segment in enumerate(stack):
        own = lambda a: (
            None if a is None else a[segment.first_moe : segment.first_moe + segment.num_moe]  # noqa: B023
        )
        x, cache, tap = _run_segment(
            params[_segment_name(i)],
            x,
            cache,
            own(routes),
            own(shift),
            segment=segment,
            cfg=cfg,
            shared=shared,
            unroll=unroll,
        )
        if tap is not None:
            taps.append(tap)
    hidden = rms_norm(x, params["final_norm"]["scale"], cfg.norm_eps)
    joined = jax.tree.map(lambda *a: jnp.concatenate(a), *taps) if taps else {}
    used = joined.pop("routes", None)
    return ForwardOutput(hidden, cache, used, RouterOutput(**joined))
