"""Each term of the policy loss against a float64 loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.rl import losses

B, T = 4, 6


def make(seed=0):
    rng = np.random.default_rng(seed)
    old = -rng.random((B, T)).astype(np.float32) * 3
    new = (old + 0.4 * rng.normal(size=(B, T))).astype(np.float32)
    mask = (rng.random((B, T)) < 0.6).astype(np.float32)
    mask[3] = 0  # a row without sampled tokens
    adv = rng.normal(size=B).astype(np.float32)
    return new, old, mask, adv


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_policy_loss_and_gradient(aggregation):
    new, old, mask, adv = make()
    low, high = 0.2, 0.28

    def loss(new):
        w = losses.token_weights(mask, aggregation)
        lr = losses.log_ratio(new, old, mask)
        return jnp.sum(w * losses.clipped_surrogate(lr, adv[:, None], low, high)[0])

    # Closed form: d/dnew = -r A unless clipped, where it is zero.
    value, grad, clipped = 0.0, np.zeros((B, T)), 0
    rows = [b for b in range(B) if mask[b].any()]
    for b in rows:
        for t in np.flatnonzero(mask[b]):
            n = mask.sum() if aggregation == "token_mean" else mask[b].sum() * len(rows)
            a = np.float64(adv[b])
            r = np.exp(np.float64(new[b, t]) - np.float64(old[b, t]))
            bound = min(max(r, 1 - low), 1 + high)
            value += -min(r * a, bound * a) / n
            active = bound * a < r * a
            clipped += active
            grad[b, t] = 0.0 if active else -r * a / n
    got, got_grad = jax.jit(jax.value_and_grad(loss))(new)
    assert clipped > 0
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(got_grad, grad, atol=1e-6)


def test_clip_flags():
    ratio = np.array([[0.5, 0.9, 1.2, 1.5], [0.5, 0.9, 1.2, 1.5]])
    adv = np.array([[1.0], [-1.0]])
    _, low, high = losses.clipped_surrogate(np.log(ratio), adv, 0.2, 0.28)
    np.testing.assert_array_equal(high, [[0, 0, 0, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(low, [[0, 0, 0, 0], [1, 0, 0, 0]])


def test_weights_are_of_the_whole_mini_batch():
    """[n, b, T] micro-batches weigh as the [n * b, T] mini-batch does."""
    mask = make()[2]
    for aggregation in ("token_mean", "sequence_mean"):
        whole = losses.token_weights(mask, aggregation)
        split = losses.token_weights(mask.reshape(2, 2, T), aggregation)
        np.testing.assert_array_equal(split.reshape(B, T), whole)
        np.testing.assert_allclose(whole.sum(), 1.0, rtol=1e-6)
        assert not np.any(losses.token_weights(np.zeros((2, 3)), aggregation))
    fixed = losses.token_weights(mask, "fixed", 10)
    np.testing.assert_allclose(fixed, mask / (10 * (mask.sum(1) > 0).sum()), rtol=1e-6)
    assert not np.any(losses.token_weights(np.zeros((2, 3)), "fixed", 10))
    with pytest.raises(ValueError, match="median"):
        losses.token_weights(mask, "median")


def test_reference_kl():
    new, ref, mask, _ = make(3)
    got = losses.reference_kl(new, ref, mask)
    for b, t in np.ndindex(B, T):
        d = np.float64(ref[b, t]) - np.float64(new[b, t])
        want = np.exp(d) - 1 - d if mask[b, t] else 0.0
        np.testing.assert_allclose(got[b, t], want, rtol=2e-4, atol=1e-7)
    assert np.all(got >= 0)
    with pytest.raises(ValueError, match="k4"):
        losses.reference_kl(new, ref, mask, "k4")


def test_dual_clip_bounds_the_loss_of_a_negative_advantage():
    """Closed form: beyond the bound the loss stands at -bound A and has no gradient."""
    ratio = np.array([[0.5, 2.9, 3.1, 50.0]] * 2)
    adv = np.array([[1.0], [-2.0]])

    def loss(logs):
        terms = losses.clipped_surrogate(logs, adv, 0.2, 0.28)[0]
        return losses.dual_clip(terms, logs, adv, 3.0)

    terms, hit = loss(np.log(ratio))
    np.testing.assert_allclose(terms, [[-0.5, -1.28, -1.28, -1.28], [1.6, 5.8, 6.0, 6.0]])
    np.testing.assert_array_equal(hit, [[0, 0, 0, 0], [0, 0, 1, 1]])
    grad = jax.grad(lambda logs: loss(logs)[0].sum())(jnp.log(ratio))
    np.testing.assert_allclose(grad, [[-0.5, 0, 0, 0], [0, 5.8, 0, 0]], rtol=1e-6)


def test_truncated_importance():
    old = np.log([[0.5, 0.2, 0.9], [0.5, 0.5, 0.1]])
    behavior = np.log([[0.25, 0.4, 0.1], [0.4, 0.5, 0.9]])
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    by_token, capped = losses.truncated_importance(old, behavior, mask, 1.2)
    np.testing.assert_allclose(by_token, [[1.2, 0.5, 1], [1.2, 1, 1 / 9]], rtol=1e-6)
    np.testing.assert_array_equal(capped, [[1, 0, 0], [1, 0, 0]])
    whole, capped = losses.truncated_importance(old, behavior, mask, 1.2, "sequence")
    np.testing.assert_allclose(whole, [[1.0], [1.25 / 9]], rtol=1e-6)
    assert not np.any(capped)


def test_infinities_outside_the_mask_reach_neither_value_nor_gradient():
    new, old, mask, adv = make()
    wild = np.where(mask > 0, new, np.inf).astype(np.float32)

    def loss(new):
        lr = losses.log_ratio(new, old, mask)
        terms = losses.clipped_surrogate(lr, adv[:, None], 0.2, 0.28)[0]
        terms = terms + losses.reference_kl(new, old, mask)
        return jnp.sum(losses.token_weights(mask, "token_mean") * terms)

    run = jax.jit(jax.value_and_grad(loss))
    for a, b in zip(run(new), run(wild), strict=True):
        np.testing.assert_array_equal(a, b)


def test_effective_sample_size():
    r = np.array([0.5, 1.0, 2.0, 1.0])
    got = losses.effective_sample_size(r.sum(), (r**2).sum(), len(r))
    np.testing.assert_allclose(got, r.sum() ** 2 / (4 * (r**2).sum()), rtol=1e-6)
    same = losses.effective_sample_size(jnp.float32(12.0), jnp.float32(36.0), jnp.float32(4.0))
    np.testing.assert_allclose(same, 1.0)
