"""Draws against float64 by definition, and their frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pr2jax.core import rng
from pr2jax.sampler.sampling import log_distribution, make_draw, sample
from pr2jax.sampler.types import SamplingParams

distribution = jax.jit(log_distribution)
draw_tokens = jax.jit(sample)


def row_keys(count, seed=0):
    keys = jax.vmap(lambda i: jax.random.fold_in(rng.root(seed), i))(jnp.arange(count))
    return np.asarray(jax.random.key_data(keys))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_k": 1000},
        {"top_p": 0.7},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_distribution_equals_float64(settings, oracle):
    logits = np.random.default_rng(1).normal(size=(16, 23)).astype(np.float32) * 2
    got = np.asarray(distribution(logits, make_draw(SamplingParams(**settings))))
    want = np.stack([oracle.truncated64(row, **settings) for row in logits])
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    finite = np.isfinite(want)
    np.testing.assert_allclose(got[finite], want[finite], atol=5e-6)
    np.testing.assert_allclose(np.exp(got.astype(np.float64)).sum(1), 1, atol=1e-6)


def test_ties_go_to_the_lower_id():
    got = distribution(np.zeros((1, 6), np.float32), make_draw(SamplingParams(top_k=2)))
    np.testing.assert_array_equal(np.isfinite(got[0]), [True, True] + [False] * 4)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "top_k": 3}], ids=str)
def test_frequencies(settings, oracle):
    logits = np.asarray([0.3, -0.5, 1.2, 0.0, -1.5], np.float32)
    rows = 20000
    tokens, logp = draw_tokens(
        np.tile(logits, (rows, 1)),
        make_draw(SamplingParams(**settings)),
        row_keys(rows),
        np.arange(rows, dtype=np.int32) % 7,
    )
    want = oracle.truncated64(logits, **settings)
    np.testing.assert_allclose(logp, want[tokens], atol=1e-6)
    expected = np.exp(want) * rows
    kept = expected > 0
    counts = np.bincount(tokens, minlength=5)
    assert counts[~kept].sum() == 0
    assert stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3


def test_a_draw_depends_on_its_key_and_position_alone():
    noise = np.random.default_rng(2)
    logits = noise.normal(size=(32, 11)).astype(np.float32)
    keys, positions = row_keys(32), noise.integers(0, 50, 32).astype(np.int32)
    draw = make_draw(SamplingParams())
    tokens, logp = draw_tokens(logits, draw, keys, positions)
    order = noise.permutation(32)
    moved = draw_tokens(logits[order], draw, keys[order], positions[order])
    np.testing.assert_array_equal(moved[0], np.asarray(tokens)[order])
    np.testing.assert_array_equal(moved[1], np.asarray(logp)[order])
    for i in (0, 7):
        key = rng.named(rng.root(0), i, int(positions[i]))
        gumbel = jax.random.gumbel(key, (11,), jnp.float32)
        assert tokens[i] == np.argmax(jax.nn.log_softmax(logits[i]) + gumbel)


def test_greedy_is_the_argmax_and_keeps_the_log_prob():
    logits = np.random.default_rng(3).normal(size=(4, 9)).astype(np.float32)
    tokens, logp = draw_tokens(
        logits, make_draw(SamplingParams(greedy=True)), row_keys(4), np.zeros(4, np.int32)
    )
    np.testing.assert_array_equal(tokens, logits.argmax(1))
    z = logits.astype(np.float64)
    want = z - np.log(np.exp(z).sum(1, keepdims=True))
    np.testing.assert_allclose(logp, want[np.arange(4), tokens], atol=1e-6)


def test_stop_ids_change_no_shape():
    shapes = {make_draw(SamplingParams(stop_ids=ids)).stop_ids.shape for ids in [(), (3,), (1, 2)]}
    assert shapes == {(8,)}
    assert make_draw(SamplingParams(stop_ids=tuple(range(9)))).stop_ids.shape == (16,)
