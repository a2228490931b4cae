"""The sampler's device programs: prefill, fan-out to slots, a chunk of decode steps, read-out.

The life of a request: its prompt is prefilled once for all requests that share it (`prefill`);
`fan_out` copies the prefix (cache and routes) to a slot and draws the first token from the
prefix's last logits; `decode_chunk` feeds each slot's newest token and draws the next until all
slots are done or the chunk is over; `read_out` hands finished rows to the host.
Slots are never reshaped: a slot that is done stays in the batch as padding until it is refilled.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from pr2jax.core.hosts import Global
from pr2jax.core.rng import named
from pr2jax.core.sharding import (
    RULES,
    Rules,
    batch_sharding,
    batch_shards,
    decode_rules,
    replicated,
)
from pr2jax.models.cache import Cache, init_cache
from pr2jax.models.config import ModelConfig, num_moe_layers
from pr2jax.models.logprobs import logits as head_logits
from pr2jax.models.predictor import RouterFeatures, reservoir_slot
from pr2jax.models.transformer import ForwardOutput, Record, forward, unstack_layers
from pr2jax.replay.routes import route_dtype
from pr2jax.sampler.sampling import Draw, sample


@struct.dataclass
class Slots:
    """The decode batch: B slots of capacity S. Updated in place from call to call.

    `keys` is each request's key data; `request` its id (seed of its feature reservoir); `row`
    its row among the features; `limit` the length at which it ends; `stopped` whether a stop id
    ended it. An empty slot is inactive with length 1.
    """

    cache: Global[Cache]
    tokens: Global[Int[Array, "B S"]]
    logprobs: Global[Float[Array, "B S"]]
    routes: Global[Int[Array, "L B S K"]] | None
    keys: Global[UInt32[Array, "B 2"]]
    request: Global[Int[Array, " B"]]
    row: Global[Int[Array, " B"]]
    prompt_length: Global[Int[Array, " B"]]
    length: Global[Int[Array, " B"]]
    limit: Global[Int[Array, " B"]]
    active: Global[Bool[Array, " B"]]
    stopped: Global[Bool[Array, " B"]]


@struct.dataclass
class Prefix:
    """P prefilled prompts of at most Q tokens: what their requests start from."""

    cache: Cache  # [N, P, H, Q, d]
    routes: Int[Array, "L P Q K"] | None
    logits: Float[Array, "P V"]  # after the last prompt token
    tokens: Int[Array, "P Q"]
    lengths: Int[Array, " P"]


@struct.dataclass
class Admission:
    """F requests entering slots; places without a request name the slot B, which is dropped."""

    slot: Int[Array, " F"]
    source: Int[Array, " F"]  # row of the prefix
    base_key: UInt32[Array, "F 2"]
    request: Int[Array, " F"]
    row: Int[Array, " F"]


def parameter_rules(cfg: ModelConfig, mesh: Mesh | None) -> Rules:
    """How `prefill` and `decode_chunk` want the parameters to lie."""
    if mesh is None:
        return RULES
    return decode_rules(mesh, cfg.moe.num_experts if cfg.moe else 1)


def constrain(tree, mesh: Mesh | None, rows: int):
    """Splits the row axis (0, or 1 behind a layer axis) of every leaf over the batch axes.

    Without a mesh, or where the mesh does not divide the rows, the tree is returned as it is.
    """
    if mesh is None or rows % (batch_shards(mesh)):
        return tree

    def one(leaf):
        axis = 1 if leaf.ndim >= 4 else 0
        if leaf.shape[axis] != rows:
            return leaf
        sharding = batch_sharding(mesh, leaf.ndim, axis)
        if leaf.ndim == 5 and leaf.shape[2] % mesh.shape["tensor"] == 0:  # cache: its kv heads too
            dims = (*sharding.spec, *(None,) * 5)[:2]
            sharding = NamedSharding(mesh, PartitionSpec(*dims, "tensor"))
        return lax.with_sharding_constraint(leaf, sharding)

    return jax.tree.map(one, tree)


def init_slots(cfg: ModelConfig, slots: int, length: int, dtype, mesh: Mesh | None) -> Slots:
    """Empty slots with room for `length` tokens each."""
    routes = None
    if num_moe_layers(cfg):
        shape = (num_moe_layers(cfg), slots, length, cfg.moe.top_k)
        routes = jnp.zeros(shape, route_dtype(cfg.moe.num_experts))
    zeros = jnp.zeros((slots,), jnp.int32)
    state = Slots(
        cache=init_cache(cfg, slots, length, dtype),
        tokens=jnp.zeros((slots, length), jnp.int32),
        logprobs=jnp.zeros((slots, length), jnp.float32),
        routes=routes,
        keys=jnp.zeros((slots, 2), jnp.uint32),
        request=zeros,
        row=zeros,
        prompt_length=zeros,
        length=zeros + 1,
        limit=zeros + 1,
        active=jnp.zeros((slots,), bool),
        stopped=jnp.zeros((slots,), bool),
    )
    return constrain(state, mesh, slots)


def init_features(cfg: ModelConfig, rows: int, capacity: int, mesh: Mesh | None) -> RouterFeatures:
    """Room for the router features of `rows` responses, `capacity` positions each."""
    layers = num_moe_layers(cfg)
    features = RouterFeatures(
        positions=jnp.zeros((rows, capacity), jnp.int32),
        mask=jnp.zeros((rows, capacity), bool),
        logits=jnp.zeros((layers, rows, capacity, cfg.moe.live), jnp.float32),
        inputs=jnp.zeros((layers, rows, capacity, cfg.d_model), jnp.bfloat16),
    )
    return constrain(features, mesh, rows)


def prefill(
    params,
    tokens: Int[Array, "P Q"],
    lengths: Int[Array, " P"],
    shift: Float[Array, "L D E"] | None,
    *,
    cfg: ModelConfig,
    dtype,
    mesh: Mesh | None,
) -> Prefix:
    """Runs whole prompts; places behind a prompt's end hold garbage that is never attended."""
    rows, width = tokens.shape
    tokens = constrain(tokens, mesh, rows)
    positions = jnp.broadcast_to(jnp.arange(width), (rows, width))
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    out = forward(
        params,
        tokens,
        positions,
        segments,
        cfg=cfg,
        cache=init_cache(cfg, rows, width, dtype),
        shift=shift,
        dtype=dtype,
        read_length=width,
        mesh=mesh,
        rules=parameter_rules(cfg, mesh),
    )
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(out.hidden, last, axis=1)[:, 0]
    return Prefix(
        cache=out.cache,
        routes=None if out.routes is None else out.routes.astype(route_dtype(cfg.moe.num_experts)),
        logits=head_logits(params, hidden, cfg),
        tokens=tokens,
        lengths=lengths,
    )


def _ends(token: Int[Array, " B"], draw: Draw) -> Bool[Array, " B"]:
    return jnp.any(token[:, None] == draw.stop_ids, axis=1)


def fan_out(
    state: Slots,
    prefix: Prefix,
    entry: Admission,
    max_tokens: Int[Array, ""],
    draw: Draw,
    *,
    mesh: Mesh | None,
) -> Slots:
    """Copies each entry's prefix to its slot and draws its first token."""
    width = prefix.tokens.shape[1]
    at, src = entry.slot, entry.source
    base = jax.random.wrap_key_data(entry.base_key, impl="threefry2x32")
    keys = jax.random.key_data(jax.vmap(named)(base, entry.request))
    lengths = prefix.lengths[src]
    token, logp = sample(prefix.logits[src], draw, keys, lengths)
    stopped = _ends(token, draw)

    def put(buffer, value):
        return buffer.at[at].set(value.astype(buffer.dtype), mode="drop")

    def head(buffer, value, lead=()):
        where = (slice(None), at, *lead, slice(0, width))
        return buffer.at[where].set(value[:, src].astype(buffer.dtype), mode="drop")

    def keys_and_values(buffer, value):
        return head(buffer, value, (slice(None),))

    tokens = state.tokens.at[at, :width].set(prefix.tokens[src], mode="drop")
    state = state.replace(
        cache=jax.tree.map(keys_and_values, state.cache, prefix.cache),
        tokens=tokens.at[at, lengths].set(token, mode="drop"),
        logprobs=state.logprobs.at[at, lengths].set(logp, mode="drop"),
        routes=None if state.routes is None else head(state.routes, prefix.routes),
        keys=put(state.keys, keys),
        request=put(state.request, entry.request),
        row=put(state.row, entry.row),
        prompt_length=put(state.prompt_length, lengths),
        length=put(state.length, lengths + 1),
        limit=put(state.limit, lengths + max_tokens),
        active=put(state.active, ~stopped & (max_tokens > 1)),
        stopped=put(state.stopped, stopped),
    )
    return constrain(state, mesh, state.tokens.shape[0])


def _record(
    features: RouterFeatures, state: Slots, position: Int[Array, " B"], router
) -> RouterFeatures:
    """Puts the features of this step's input tokens at their places in the reservoirs.

    The reservoir of a request counts its decode inputs from 0 (input position minus prompt
    length) and is seeded by the request's id.
    """
    rows, capacity = features.positions.shape
    place = reservoir_slot(position - state.prompt_length, capacity, state.request)
    row = jnp.where(state.active, state.row, rows)

    def put(buffer, value):
        layers = jnp.arange(buffer.shape[0])[:, None]  # one by one, as in `cache.write`
        new = value[:, :, 0].astype(buffer.dtype)
        return buffer.at[layers, row, place].set(new, mode="drop")

    return RouterFeatures(
        positions=features.positions.at[row, place].set(position, mode="drop"),
        mask=features.mask.at[row, place].set(True, mode="drop"),
        logits=put(features.logits, router.logits),
        inputs=put(features.inputs, router.inputs),
    )


def _advance(
    state: Slots,
    out: ForwardOutput,
    token: Int[Array, " B"],
    logp: Float[Array, " B"],
    ends: Bool[Array, " B"],
) -> Slots:
    """The slots after a step: its cache and routes, and the token that each active one drew."""
    slots, capacity = state.tokens.shape
    rows = jnp.arange(slots)
    # Slots that are done write behind the end of their buffers, which drops it.
    fed = jnp.where(state.active, state.length - 1, capacity)
    drawn = jnp.where(state.active, state.length, capacity)
    routes = state.routes
    if routes is not None:
        used = out.routes[:, :, 0].astype(routes.dtype)
        layers = jnp.arange(used.shape[0])[:, None]
        routes = routes.at[layers, rows, fed].set(used, mode="drop")
    length = state.length + state.active
    stop = state.active & ends
    return state.replace(
        cache=out.cache,
        tokens=state.tokens.at[rows, drawn].set(token, mode="drop"),
        logprobs=state.logprobs.at[rows, drawn].set(logp, mode="drop"),
        routes=routes,
        length=length,
        stopped=state.stopped | stop,
        active=state.active & ~stop & (length < state.limit),
    )


def decode_chunk(
    params,
    state: Slots,
    features: RouterFeatures | None,
    draw: Draw,
    cancel: Bool[Array, " B"],
    shift: Float[Array, "L D E"] | None,
    *,
    cfg: ModelConfig,
    steps: int,
    read_length: int,
    dtype,
    unroll: bool,
    mesh: Mesh | None,
) -> tuple[Slots, RouterFeatures | None, Int[Array, "4 B"]]:
    """Up to `steps` decode steps, fewer when every slot is done.

    A step feeds the newest token of each active slot (at position length - 1, attending to
    cache[:read_length]) and draws the next. `cancel` names slots that the host ended.

    Returns:
      the state, the features, and (length, active, stopped, steps made) as one small array: all
      that the host needs between chunks.
    """
    slots = state.tokens.shape[0]
    rows = jnp.arange(slots)
    state = state.replace(active=state.active & ~cancel)
    if unroll:
        params = unstack_layers(params, cfg)

    def more(carry):
        step, state, _ = carry
        return (step < steps) & jnp.any(state.active)

    def body(carry):
        step, state, features = carry
        position = state.length - 1
        out = forward(
            params,
            state.tokens[rows, position][:, None],
            position[:, None],
            state.active[:, None].astype(jnp.int32),
            cfg=cfg,
            cache=state.cache,
            shift=shift,
            record=None if features is None else Record(positions=None),
            dtype=dtype,
            read_length=read_length,
            mesh=mesh,
            rules=parameter_rules(cfg, mesh),
            unroll=unroll,
        )
        # Apart from the norm before it and the softmax after it: fused with them, XLA:CPU runs the
        # product of the head on one thread, four times slower.
        hidden = lax.optimization_barrier(out.hidden[:, 0])
        logits = lax.optimization_barrier(head_logits(params, hidden, cfg))
        token, logp = sample(logits, draw, state.keys, state.length)
        if features is not None:
            features = _record(features, state, position, out.router)
        state = _advance(state, out, token, logp, _ends(token, draw))
        return step + 1, constrain(state, mesh, slots), features

    done, state, features = lax.while_loop(more, body, (jnp.int32(0), state, features))
    status = jnp.stack(
        [
            state.length,
            state.active.astype(jnp.int32),
            state.stopped.astype(jnp.int32),
            jnp.full((slots,), done),
        ]
    )
    if mesh is not None:  # every host reads it
        status = lax.with_sharding_constraint(status, replicated(mesh))
    return state, features, status


def read_out(state: Slots, slots: Int[Array, " F"]):
    """Tokens [F, S], log-probs [F, S] and routes [L, F, S, K] of some slots."""
    routes = None if state.routes is None else state.routes[:, slots]
    return state.tokens[slots], state.logprobs[slots], routes
