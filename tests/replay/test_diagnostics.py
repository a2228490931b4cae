"""Diagnostics against loops over tokens and sets."""

import jax
import jax.numpy as jnp
import numpy as np

from pr2jax.core.metrics import merge
from pr2jax.models.transformer import RouterOutput
from pr2jax.replay import diagnostics as d

L, B, T, C, D, E, K = 3, 2, 6, 4, 5, 8, 2


def value(pair):
    return float(pair[0] / pair[1])


def top(x):
    return set(np.argsort(-x, kind="stable")[:K].tolist())


def test_replay_diagnostics():
    rng = np.random.default_rng(0)
    agreement = rng.choice([K - 1, K], (L, B, T), p=[0.3, 0.7]).astype(np.int32)
    margin = rng.random((L, B, T)).astype(np.float32)
    margin[1, 0, 0] = np.inf  # no rival: not part of the mean
    mask = rng.random((B, T)) < 0.7
    mask[0, 0] = True
    got = jax.jit(d.replay_diagnostics, static_argnums=2)(
        RouterOutput(agreement=agreement, margin=margin), mask, K
    )
    tokens = [(b, t) for b in range(B) for t in range(T) if mask[b, t]]
    zero = np.mean([all(agreement[:, b, t] == K) for b, t in tokens])
    np.testing.assert_allclose(value(got["zero_deviation"]), zero, rtol=1e-6)
    assert got["zero_deviation"][1] == len(tokens)
    for layer in range(L):
        want = np.mean([agreement[layer, b, t] / K for b, t in tokens])
        np.testing.assert_allclose(value(got[f"agreement/layer_{layer}"]), want, rtol=1e-6)
        want = np.mean([agreement[layer, b, t] == K for b, t in tokens])
        np.testing.assert_allclose(value(got[f"zero_deviation/layer_{layer}"]), want, rtol=1e-6)
    want = np.mean([agreement[:, b, t] / K for b, t in tokens])
    np.testing.assert_allclose(value(got["agreement"]), want, rtol=1e-6)
    finite = [m for b, t in tokens for m in margin[:, b, t] if np.isfinite(m)]
    np.testing.assert_allclose(value(got["margin"]), np.mean(np.float64(finite)), rtol=1e-6)


def test_flip_diagnostics():
    rng = np.random.default_rng(1)
    old = rng.normal(size=(L, B, C, E)).astype(np.float32)
    now = (old + 0.4 * rng.normal(size=old.shape)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 1]], bool)
    used = rng.integers(K - 1, K + 1, (L, B, C)).astype(np.int32)
    select = lambda x: jax.lax.top_k(x, K)[1]
    got = jax.jit(lambda *a: d.flip_diagnostics(*a[:3], select, a[3]))(old, now, mask, used)
    flips = np.array(
        [
            [top(old[layer, b, c]) != top(now[layer, b, c]) for layer in range(L)]
            for b, c in zip(*np.nonzero(mask), strict=True)
        ]
    )
    assert 0 < flips.mean() < 1
    np.testing.assert_allclose(value(got["flips"]), flips.mean(), rtol=1e-6)
    np.testing.assert_allclose(value(got["flips/layer_2"]), flips[:, 2].mean(), rtol=1e-6)
    kept = np.mean(~flips.any(axis=1))
    np.testing.assert_allclose(value(got["old_route_zero_deviation"]), kept, rtol=1e-6)
    paired = np.mean([all(used[:, b, c] == K) for b, c in zip(*np.nonzero(mask), strict=True)])
    np.testing.assert_allclose(value(got["paired_zero_deviation"]), paired, rtol=1e-6)
    at = list(zip(*np.nonzero(mask), strict=True))
    share = [
        len(top(old[layer, b, c]) & top(now[layer, b, c])) / K for b, c in at for layer in range(L)
    ]
    np.testing.assert_allclose(value(got["old_route_agreement"]), np.mean(share), rtol=1e-6)
    share = np.mean([used[:, b, c] / K for b, c in at])
    np.testing.assert_allclose(value(got["paired_agreement"]), share, rtol=1e-6)


def test_logits_kl():
    rng = np.random.default_rng(4)
    now, other = (rng.normal(size=(L, B, C, E)).astype(np.float32) for _ in range(2))
    mask = rng.random((B, C)) < 0.6
    other[:, ~mask] = np.nan  # outside the mask anything may stand
    got = jax.jit(d.logits_kl)(now, other, mask)

    def softmax(x):
        x = np.exp(np.float64(x) - x.max())
        return x / x.sum()

    want = []
    for b, c in zip(*np.nonzero(mask), strict=True):
        pairs = [(softmax(now[layer, b, c]), softmax(other[layer, b, c])) for layer in range(L)]
        want.append(sum(np.sum(p * np.log(p / q)) for p, q in pairs))
    np.testing.assert_allclose(value(got), np.mean(want), rtol=1e-5)
    assert got[1] == mask.sum()


def test_shift_ratio():
    rng = np.random.default_rng(2)
    h = jnp.asarray(rng.normal(size=(L, B, C, D)), jnp.bfloat16)
    shift = rng.normal(size=(L, D, E)).astype(np.float32)
    logits = rng.normal(size=(L, B, C, E)).astype(np.float32)
    mask = rng.random((B, C)) < 0.6
    got = jax.jit(d.shift_ratio)(h, shift, logits, mask)
    h64 = np.asarray(h.astype(jnp.float32), np.float64)
    want = [
        np.linalg.norm(h64[1, b, c] @ shift[1]) / np.linalg.norm(np.float64(logits[1, b, c]))
        for b, c in zip(*np.nonzero(mask), strict=True)
    ]
    np.testing.assert_allclose(value(got["shift_ratio/layer_1"]), np.mean(want), rtol=1e-5)


def test_mismatch_merges():
    rng = np.random.default_rng(3)
    a = -rng.random((B, T)).astype(np.float32)
    b = a + 0.1 * rng.normal(size=a.shape).astype(np.float32)
    mask = (rng.random((B, T)) < 0.6).astype(np.float32)
    b[mask == 0] = np.nan  # outside the mask anything may stand
    whole = jax.jit(d.mismatch)(a, b, mask)
    delta = (np.float64(b) - np.float64(a))[mask > 0]
    np.testing.assert_allclose(value(whole["abs"]), np.abs(delta).mean(), rtol=1e-5)
    np.testing.assert_allclose(value(whole["abs_max"]), np.abs(delta).max(), rtol=1e-5)
    np.testing.assert_allclose(value(whole["k1"]), -delta.mean(), rtol=1e-4)
    k3 = np.mean(np.exp(delta) - 1 - delta)
    np.testing.assert_allclose(value(whole["k3"]), k3, rtol=1e-4)
    parts = [d.mismatch(a[i : i + 1], b[i : i + 1], mask[i : i + 1]) for i in range(B)]
    joined = merge(*parts)
    for name, pair in whole.items():
        np.testing.assert_allclose(value(joined[name]), value(pair), rtol=1e-5)
