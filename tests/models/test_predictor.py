"""The route predictor against float64 brute force; the reservoir against algorithm R itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.models.predictor import (
    RouterFeatures,
    depth_gates,
    margin_weights,
    predictor_loss,
    reservoir_positions,
    reservoir_slot,
)

L, B, C, D, E = 3, 2, 5, 8, 6


def make(seed=0):
    rng = np.random.default_rng(seed)
    features = RouterFeatures(
        positions=rng.integers(0, 20, (B, C)).astype(np.int32),
        mask=rng.random((B, C)) < 0.7,
        logits=rng.normal(size=(L, B, C, E)).astype(np.float32),
        inputs=jnp.asarray(rng.normal(size=(L, B, C, D)), jnp.bfloat16),
    )
    w_p = rng.normal(size=(L, D, E)).astype(np.float32) * 0.3
    now = rng.normal(size=(L, B, C, E)).astype(np.float32)
    return w_p, features, now


def softmax64(x):
    x = np.exp(x - x.max())
    return x / x.sum()


def brute(w_p, features, now, weights=None, gates=None, beside=None):
    """Token by token, layer by layer, in float64."""
    h = np.asarray(features.inputs.astype(jnp.float32), np.float64)
    sums, totals = np.zeros(L), np.zeros(L)
    for layer in range(L):
        gate = 1.0 if gates is None else gates[layer]
        for b in range(B):
            for c in range(C):
                if not features.mask[b, c]:
                    continue
                w = 1.0 if weights is None else weights[layer, b, c]
                p = softmax64(np.float64(now[layer, b, c]))
                delta = gate * h[layer, b, c] @ np.float64(w_p[layer])
                if beside is not None:
                    delta = delta + h[layer, b, c] @ np.float64(beside[layer])
                q = softmax64(np.float64(features.logits[layer, b, c]) + delta)
                sums[layer] += w * np.sum(p * np.log(p / q))
                totals[layer] += w
    return sums, totals


@pytest.mark.parametrize("weighted,gated,ahead", [(0, 0, 0), (1, 1, 0), (0, 1, 1)])
def test_loss_matches_float64(weighted, gated, ahead):
    w_p, features, now = make()
    weights = np.random.default_rng(1).random((L, B, C)).astype(np.float32) if weighted else None
    gates = np.array([1.0, 0.6, 0.1], np.float32) if gated else None
    beside = np.float32(0.2) * w_p[::-1] if ahead else None
    sums, totals = jax.jit(predictor_loss)(w_p, features, now, weights, gates, beside)
    want_sums, want_totals = brute(w_p, features, now, weights, gates, beside)
    np.testing.assert_allclose(sums, want_sums, rtol=2e-6)
    np.testing.assert_allclose(totals, want_totals, rtol=1e-6)


def test_gradient_is_softmax_difference_times_input():
    """d KL / d W_p = h (q - p)^T: the closed form, which no other argument shares."""
    w_p, features, now = make()

    def total(w_p, old, h, now):
        f = features.replace(logits=old, inputs=h)
        return predictor_loss(w_p, f, now)[0].sum()

    grads = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(
        w_p, features.logits, features.inputs, now
    )
    want = np.zeros((L, D, E))
    h = np.asarray(features.inputs.astype(jnp.float32), np.float64)
    for layer, b, c in np.ndindex(L, B, C):
        if features.mask[b, c]:
            p = softmax64(np.float64(now[layer, b, c]))
            delta = h[layer, b, c] @ np.float64(w_p[layer])
            q = softmax64(np.float64(features.logits[layer, b, c]) + delta)
            want[layer] += np.outer(h[layer, b, c], q - p)
    np.testing.assert_allclose(grads[0], want, atol=2e-6)
    for g in grads[1:]:
        assert not np.any(np.asarray(g, np.float32))


def test_nothing_to_learn_where_nothing_moved():
    """At W_p = 0 and p_now = p_old: KL and gradient 0 but for fp32 rounding of a log-softmax."""
    _, features, _ = make()
    w_p = np.zeros((L, D, E), np.float32)
    value = jax.jit(jax.value_and_grad(lambda w, f, p: predictor_loss(w, f, p)[0].sum()))
    loss, grad = value(w_p, features, features.logits)
    assert abs(loss) <= 1e-6
    np.testing.assert_allclose(grad, 0.0, atol=1e-6)


def test_nan_at_unused_places_leaks_nowhere():
    w_p, features, now = make()
    place = features.mask[None, ..., None]
    spoil = lambda x: jnp.where(place, x, jnp.nan)
    bad = features.replace(logits=spoil(features.logits), inputs=spoil(features.inputs))
    value = jax.jit(jax.value_and_grad(lambda w, f, p: predictor_loss(w, f, p)[0].sum()))
    loss, grad = value(w_p, features, now)
    loss_bad, grad_bad = value(w_p, bad, spoil(now))
    assert loss == loss_bad
    np.testing.assert_array_equal(grad, grad_bad)


def test_margin_weights():
    logits = np.array(
        [[3.0, 1.0, 0.5, -1.0], [2.0, 1.0, 1.0, 0.0], [9.0, 5.0, 1.0, 0.0]], np.float32
    )
    got = margin_weights(logits, 2, max_weight=10.0, min_margin=0.01)
    np.testing.assert_allclose(got, [2.0, 10.0, 0.25])  # 1/0.5; 1/0 capped; 1/4
    got = margin_weights(logits, 2, max_weight=1000.0, min_margin=0.01)
    np.testing.assert_allclose(got, [2.0, 100.0, 0.25], rtol=1e-6)
    np.testing.assert_array_equal(margin_weights(logits, 4, max_weight=9.0, min_margin=0.1), 1.0)


def test_depth_gates():
    np.testing.assert_allclose(depth_gates("linear", 5, 0.2), [1.0, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)
    roots = [1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0]
    np.testing.assert_allclose(depth_gates("sqrt", 5, 0.0), roots, rtol=1e-6)
    np.testing.assert_allclose(depth_gates("cosine", 3, 0.5), [1.0, 0.75, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(depth_gates("none", 4, 0.3), 1.0)
    np.testing.assert_array_equal(depth_gates("linear", 1, 0.3), 1.0)
    with pytest.raises(ValueError, match="depth gate"):
        depth_gates("steps", 3)


def test_positions_equal_algorithm_r_item_by_item():
    lengths = np.array([0, 1, 5, 6, 33, 64], np.int32)
    seeds = np.array([3, 1, 4, 1, 5, 2**31 - 1], np.int32)
    capacity = 6
    positions, mask = reservoir_positions(lengths, capacity, seeds, max_length=64)
    slot = jax.jit(lambda i, s: reservoir_slot(i, capacity, s))
    for row, (n, seed) in enumerate(zip(lengths, seeds, strict=True)):
        held = {}
        for i in range(n):
            place = int(slot(i, seed))
            assert 0 <= place <= capacity
            if i < capacity:
                assert place == i
            if place < capacity:
                held[place] = i
        np.testing.assert_array_equal(mask[row], [p in held for p in range(capacity)])
        for p, i in held.items():
            assert positions[row, p] == i


def test_reservoir_is_uniform():
    """Over many seeds every item is kept with probability C / n (3 sigma of a binomial is .011)."""
    n, capacity, seeds = 40, 10, 16384
    positions, mask = reservoir_positions(
        np.full(seeds, n, np.int32), capacity, np.arange(seeds, dtype=np.int32), max_length=n
    )
    assert np.all(mask)
    rows = np.sort(positions, axis=1)
    assert np.all(np.diff(rows, axis=1) > 0)  # distinct
    share = np.bincount(np.asarray(positions).ravel(), minlength=n) / seeds
    np.testing.assert_allclose(share, capacity / n, atol=4.5 * np.sqrt(0.25 * 0.75 / seeds))
