"""Drawing tokens: the truncated distribution, its log-probabilities, and counter-based draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from pr2jax.core.rng import named
from pr2jax.sampler.types import SamplingParams

# Stop ids are an argument of the programs, padded to a multiple of this, so that another stop
# list is not another program.
_STOP_SLOTS = 8


@struct.dataclass
class Draw:
    """`SamplingParams` as the programs take them: numbers are traced, the kind of draw is not."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    stop_ids: Int[Array, " n"]
    truncate: bool = struct.field(pytree_node=False)
    greedy: bool = struct.field(pytree_node=False)


def make_draw(params: SamplingParams) -> Draw:
    """The device form of `params` (stop ids padded with -1, which no token equals)."""
    stops = list(params.stop_ids)
    stops += [-1] * (-len(stops) % _STOP_SLOTS or (0 if stops else _STOP_SLOTS))
    return Draw(
        temperature=np.float32(params.temperature),
        top_k=np.int32(params.top_k),
        top_p=np.float32(params.top_p),
        min_p=np.float32(params.min_p),
        stop_ids=np.asarray(stops, np.int32),
        truncate=params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0,
        greedy=params.greedy,
    )


def _keep(scaled: Float[Array, "B V"], draw: Draw) -> Bool[Array, "B V"]:
    """Tokens that top-k, then top-p, then min-p leave; the most likely one always stays.

    Ties go to the lower id, as in `argmax`. Top-p looks at what top-k left, renormalised.
    """
    vocab = scaled.shape[-1]
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    descending = jnp.take_along_axis(scaled, order, axis=-1)
    kept = jnp.arange(vocab) < jnp.where(draw.top_k > 0, draw.top_k, vocab)
    probs = jax.nn.softmax(jnp.where(kept, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # At top_p = 1 rounding of the running sum must not cut the tail.
    kept &= (before < draw.top_p) | (draw.top_p >= 1.0)
    kept &= probs >= draw.min_p * probs[:, :1]
    kept |= jnp.arange(vocab) == 0
    return jnp.take_along_axis(kept, rank, axis=-1)


def log_distribution(logits: Float[Array, "B V"], draw: Draw) -> Float[Array, "B V"]:
    """Log-probabilities of the distribution that tokens are drawn from; -inf where truncated.

    Order: temperature, top-k, top-p, min-p, renormalise. With `greedy` the draw is the argmax of
    this distribution, which is still what is returned.
    """
    scaled = logits.astype(jnp.float32) / draw.temperature
    if draw.truncate:
        scaled = jnp.where(_keep(scaled, draw), scaled, -jnp.inf)
    return jax.nn.log_softmax(scaled, axis=-1)


def _argmax(scores: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The lowest index of the maximum; as two plain reductions, several times faster on CPU."""
    vocab = scores.shape[-1]
    best = scores == jnp.max(scores, axis=-1, keepdims=True)
    index = jnp.min(jnp.where(best, jnp.arange(vocab, dtype=jnp.int32), vocab), axis=-1)
    return jnp.minimum(index, vocab - 1)  # NaN equals nothing: still a token id


def sample(
    logits: Float[Array, "B V"],
    draw: Draw,
    keys: UInt32[Array, "B 2"],
    positions: Int[Array, " B"],
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws a token a row and returns it with its log-probability.

    The Gumbel noise of a draw comes from (row key, position of the drawn token) alone, so that it
    does not depend on the row's place or its companions. `keys` holds the data of threefry keys.
    """
    logp = log_distribution(logits, draw)
    if draw.greedy:
        scores = logp
    else:
        vocab = logits.shape[-1]
        row_keys = jax.random.wrap_key_data(keys, impl="threefry2x32")
        noise = jax.vmap(lambda k, p: jax.random.gumbel(named(k, p), (vocab,), jnp.float32))(
            row_keys, positions
        )
        scores = logp + noise
    token = _argmax(scores)
    return token, jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]
