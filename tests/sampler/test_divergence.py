"""First divergence of two rollouts, against a count by hand; and across program shapes."""

import dataclasses

import numpy as np
import pytest

from pr2jax.core import rng
from pr2jax.sampler.divergence import first_divergence
from pr2jax.sampler.types import SamplingParams


@pytest.fixture(scope="module")
def rollout(world):
    return world.one.rollout(world.prompts, 2, SamplingParams(max_tokens=12), key=rng.root(7))[0]


def test_counts(rollout):
    tokens, lengths = rollout.tokens.copy(), rollout.lengths.copy()
    # Row 0 differs at its third sampled token and later; row 3 ends two tokens earlier.
    start = rollout.prompt_lengths[0]
    tokens[0, start + 2] += 1
    tokens[0, start + 5] += 1
    lengths[3] -= 2
    other = dataclasses.replace(rollout, tokens=tokens, lengths=lengths)
    found = first_divergence(rollout, other)
    assert (found.rows, found.diverged, found.tokens) == (10, 2, 8 * 12 + 2 + 10)
    assert found.rate == pytest.approx(2 / 110)
    assert first_divergence(other, rollout) == found
    # What stands behind a row's end does not count.
    tokens = rollout.tokens.copy()
    tokens[1, rollout.lengths[1] :] = 1
    assert first_divergence(rollout, dataclasses.replace(rollout, tokens=tokens)).diverged == 0


def test_other_requests_are_refused(rollout):
    tokens = rollout.tokens.copy()
    tokens[:, 0] += 1
    with pytest.raises(ValueError, match="not of the same requests"):
        first_divergence(rollout, dataclasses.replace(rollout, tokens=tokens))


def test_rate_across_slot_counts_is_reported(world, rollout, record_property):
    other, _ = world.sampler(slots=16).rollout(
        world.prompts, 2, SamplingParams(max_tokens=12), key=rng.root(7)
    )
    found = first_divergence(rollout, other)
    record_property("first_divergence_rate", found.rate)
    print(f"{found.diverged} of {found.rows} rows diverged, {found.rate:.1e} a token")
    same = np.arange(found.rows)[(rollout.tokens == other.tokens).all(axis=1)]
    np.testing.assert_allclose(
        rollout.behavior_logprobs[same], other.behavior_logprobs[same], atol=1e-4
    )
