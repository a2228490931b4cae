"""Passes under the old policy, without gradients: log-probs, routes and router features.

`r2` takes its routes from here; a run whose sampler and learner disagree takes its old log-probs
from here; and with features="recomputed" the predictor's features come from here, out of a
forward that replays the logged routes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pr2jax.core.params import Tree
from pr2jax.models.config import ModelConfig
from pr2jax.models.logprobs import token_logprobs
from pr2jax.models.predictor import RouterFeatures
from pr2jax.models.transformer import Record, forward
from pr2jax.replay.modes import ReplayPlan
from pr2jax.replay.routes import decode, to_inputs
from pr2jax.rl.batch import merge_micro
from pr2jax.rl.types import LearnerBatch

Places = tuple[Int[Array, "n b C"], Bool[Array, "n b C"]]


@struct.dataclass
class Scores:
    """What a scoring pass found, in rows of the unsplit batch.

    Attributes:
      logprobs: of tokens[b, t], under the scored parameters; 0 at t = 0 and outside the row.
      routes: experts used, live or forced (uint16; None for a dense model).
      features: p and h at the places asked for, or None.
    """

    logprobs: Float[Array, "B T"]
    routes: Int[Array, "L B T K"] | None
    features: RouterFeatures | None


def score(
    params: Tree,
    batch: LearnerBatch,
    places: Places | None = None,
    *,
    model_cfg: ModelConfig,
    temperature: float,
    dtype: jnp.dtype = jnp.float32,
    mesh: Mesh | None = None,
) -> Scores:
    """Scores a micro-split batch; pure, one micro-batch at a time.

    Where `batch.routes` are given the forward replays them, else it routes live and returns its
    own. `places`: (positions, mask) of the features to keep; the learner's precision is `dtype`.
    """

    def one(args):
        rows, where = args
        record = None if where is None else Record(jnp.where(where[1], where[0], 0))
        out = forward(
            params,
            rows.tokens,
            rows.positions,
            rows.segment_ids,
            cfg=model_cfg,
            routes=None if rows.routes is None else decode(rows.routes),
            record=record,
            dtype=dtype,
            mesh=mesh,
        )
        targets = to_inputs(rows.tokens)
        logp, _ = token_logprobs(
            params, out.hidden, targets, cfg=model_cfg, temperature=temperature, mesh=mesh
        )
        logp = jnp.pad(logp[:, :-1], ((0, 0), (1, 0))) * rows.segment_ids
        features = None
        if record is not None:
            inputs = out.router.inputs.astype(jnp.bfloat16)
            features = RouterFeatures(*where, out.router.logits, inputs)
        routes = None if out.routes is None else out.routes.astype(jnp.uint16)
        return Scores(logp, routes, features)

    found = jax.lax.map(one, (batch.only_rows().replace(features=None), places))
    features = found.features
    if features is not None:
        features = RouterFeatures(
            positions=merge_micro(features.positions),
            mask=merge_micro(features.mask),
            logits=merge_micro(features.logits, 1),
            inputs=merge_micro(features.inputs, 1),
        )
    routes = None if found.routes is None else merge_micro(found.routes, 1)
    return Scores(merge_micro(found.logprobs), routes, features)


def make_scorer(
    model_cfg: ModelConfig,
    *,
    temperature: float,
    dtype: jnp.dtype = jnp.float32,
    mesh: Mesh | None = None,
) -> Callable[..., Scores]:
    """The jitted `score`: (params, batch, places=None) -> Scores."""

    def scorer(params, batch, places=None):
        return score(
            params,
            batch,
            places,
            model_cfg=model_cfg,
            temperature=temperature,
            dtype=dtype,
            mesh=mesh,
        )

    return jax.jit(scorer)


def scoring_decision(
    setting: str, todo: ReplayPlan, measured: float | None, limit: float
) -> tuple[bool, str]:
    """Whether the next batch's old log-probs need a scoring pass, and why.

    Args:
      setting: `RLConfig.scoring_pass`.
      measured: mean |log-prob difference| of sampler and learner so far (`behavior/abs` of a
        mini-step 1), or None before the first.
      limit: `RLConfig.mismatch_limit`, nats.
    """
    if todo.recorder == "scoring":
        return True, "r2 records its routes in the scoring pass"
    if setting != "auto":
        return setting == "always", f"scoring_pass={setting}"
    if measured is None:
        return False, "auto: mismatch not measured yet; mini-step 1 measures it"
    if measured > limit:
        return True, f"auto: measured mismatch {measured:.2e} nats exceeds {limit:.2e}"
    return False, f"auto: measured mismatch {measured:.2e} nats is within {limit:.2e}"
