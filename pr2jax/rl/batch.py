"""Rollouts to learner batches, and batches to mini- and micro-batches. Shapes stay fixed.

A batch of B rows becomes N mini-batches of [n, b, ...] whatever the zero-variance filter leaves:
kept groups are dealt evenly, missing rows are fillers of length 0 at the end, and the learner's
loop stops before micro-batches that hold nothing else. So there is one program, and its work
follows the rows that are there.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pr2jax.core import hosts
from pr2jax.core.sharding import batch_sharding
from pr2jax.models.predictor import RouterFeatures, reservoir_positions
from pr2jax.rl.types import LearnerBatch
from pr2jax.sampler.types import Rollout


def map_rows(fn: Callable[[Array, int], Array], batch: LearnerBatch) -> LearnerBatch:
    """fn(array, row axis) on every array that has rows, of an unsplit batch."""
    features = batch.features
    if features is not None:
        features = RouterFeatures(
            positions=fn(features.positions, 0),
            mask=fn(features.mask, 0),
            logits=fn(features.logits, 1),
            inputs=fn(features.inputs, 1),
        )
    routes = None if batch.routes is None else fn(batch.routes, 1)
    logged = None if batch.logged is None else fn(batch.logged, 1)
    rest = batch.only_rows().replace(routes=None, features=None, logged=None)
    rest = jax.tree.map(lambda x: fn(x, 0), rest)
    return rest.replace(
        routes=routes,
        features=features,
        logged=logged,
        shift=batch.shift,
        lookahead=batch.lookahead,
    )


def _fit(x: np.ndarray, length: int, axis: int = 1) -> np.ndarray:
    """Cuts or zero-pads `axis` to `length`."""
    x = np.asarray(x)[(slice(None),) * axis + (slice(0, length),)]
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, length - x.shape[axis])
    return np.pad(x, pad)


def make_batch(
    rollout: Rollout,
    advantages: Float[np.ndarray, " B"],
    *,
    bucket: int,
    use_routes: bool,
    features: RouterFeatures | None = None,
) -> LearnerBatch:
    """A rollout as a batch whose old log-probs are the behaviour's.

    Rows are cut to the longest sequence, rounded up to a multiple of `bucket`. With `use_routes`
    the sampler's routes are the ones to replay; else they are kept to be measured against.

    Raises ValueError when routes are wanted and the rollout has none.
    """
    if use_routes and rollout.routes is None:
        raise ValueError("the rollout holds no routes to replay")
    length = -(-max(int(rollout.lengths.max()), 2) // bucket) * bucket
    behavior = _fit(rollout.behavior_logprobs, length).astype(np.float32)
    routes = None if rollout.routes is None else _fit(rollout.routes, length, axis=2)
    return LearnerBatch(
        tokens=_fit(rollout.tokens, length).astype(np.int32),
        lengths=np.asarray(rollout.lengths, np.int32),
        loss_mask=_fit(rollout.loss_mask, length).astype(np.float32),
        old_logprobs=behavior,
        behavior_logprobs=behavior,
        ref_logprobs=None,
        advantages=np.asarray(advantages, np.float32),
        routes=routes if use_routes else None,
        features=features,
        logged=None if use_routes else routes,
    )


def feature_places(
    prompt_lengths: Int[np.ndarray, " B"],
    lengths: Int[np.ndarray, " B"],
    capacity: int,
    *,
    tokens: str,
    seed: int,
    max_length: int,
) -> tuple[Int[Array, "B C"], Bool[Array, "B C"]]:
    """Input positions whose features are recomputed, chosen once the response is finished.

    A uniform sample of the inputs that predict response tokens (prompt_length - 1 ..
    length - 2), or with tokens="all" of all inputs (0 .. length - 2).

    Returns:
      positions and mask; C = min(capacity, max_length - 1).
    """
    start = np.zeros_like(lengths) if tokens == "all" else np.maximum(prompt_lengths - 1, 0)
    count = np.maximum(lengths - 1 - start, 0).astype(np.int32)
    seeds = (seed + np.arange(len(lengths))).astype(np.uint32)
    places, mask = reservoir_positions(
        count, min(capacity, max_length - 1), seeds, max_length=max_length
    )
    return np.where(mask, places + start[:, None].astype(np.int32), 0), np.asarray(mask)


def take_rows(
    batch: LearnerBatch, rows: Int[np.ndarray, " R"], real: Bool[np.ndarray, " R"]
) -> LearnerBatch:
    """Rows by index; where not `real` the row is a filler: length 0 and every mask empty."""
    out = map_rows(lambda x, axis: x[(slice(None),) * axis + (rows,)], batch)
    features = out.features
    if features is not None:
        features = features.replace(mask=features.mask & real[:, None])
    return out.replace(
        lengths=out.lengths * real,
        loss_mask=out.loss_mask * real[:, None],
        advantages=out.advantages * real,
        features=features,
    )


def split_micro(batch: LearnerBatch, rows: int) -> LearnerBatch:
    """[B, ...] to [n, rows, ...]; routes and features to [n, L, rows, ...].

    Raises ValueError when `rows` does not divide B.
    """
    total = batch.tokens.shape[0]
    if total % rows:
        raise ValueError(f"{total} rows are no multiple of a micro-batch of {rows}")

    def split(x, axis):
        x = x.reshape(*x.shape[:axis], total // rows, rows, *x.shape[axis + 1 :])
        return x if axis == 0 else x.swapaxes(0, 1)

    return map_rows(split, batch)


def merge_micro(x: Array, row_axis: int = 0) -> Array:
    """The inverse of the split for one array: [n, b, ...] (row_axis 0) or [n, L, b, ...] (1)."""
    x = x if row_axis == 0 else x.swapaxes(0, 1)
    return x.reshape(*x.shape[:row_axis], -1, *x.shape[row_axis + 2 :])


def split_mini_batches(
    batch: LearnerBatch,
    group_ids: Int[np.ndarray, " B"],
    keep: Bool[np.ndarray, " B"],
    *,
    mini_steps: int,
    micro_batch: int,
) -> list[LearnerBatch]:
    """Disjoint mini-batches of whole groups, split into micro-batches; together all kept rows.

    Every one has the shape of a full mini-batch, B / mini_steps rows. Kept groups stay in order
    and are dealt as evenly as they divide; a mini-batch that gets none is left out, so fewer than
    `mini_steps` (even none) may come back.

    Raises ValueError when the sizes do not divide, or a mini-batch would overflow.
    """
    total = batch.tokens.shape[0]
    if total % (mini_steps * micro_batch):
        raise ValueError(
            f"{total} rows do not divide into {mini_steps} mini-steps of micro-batches of "
            f"{micro_batch}"
        )
    size = total // mini_steps
    # Groups in the order of their first row.
    kept_ids = group_ids[keep]
    _, first = np.unique(kept_ids, return_index=True)
    groups = kept_ids[np.sort(first)]
    out = []
    for part in np.array_split(groups, mini_steps):
        chosen = [np.flatnonzero((group_ids == g) & keep) for g in part]
        if not chosen:
            continue
        rows = np.concatenate(chosen)
        if len(rows) > size:
            raise ValueError(f"{len(rows)} rows of {len(part)} groups overflow {size} rows")
        real = np.arange(size) < len(rows)
        rows = np.pad(rows, (0, size - len(rows)))
        out.append(split_micro(take_rows(batch, rows, real), micro_batch))
    return out


def put_batch(batch: LearnerBatch, mesh: Mesh | None) -> LearnerBatch:
    """A micro-split batch on the devices, rows over the mesh's data axes (None: one device)."""
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)

    def put(x, axis):
        # Axis 0 counts micro-batches, so a row axis stands one further right.
        return hosts.put(x, batch_sharding(mesh, x.ndim, batch_axis=axis + 1))

    return map_rows(put, batch)
