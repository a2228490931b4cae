"""Drift, its linear map and the oracle against float64 numpy, token by token."""

import functools

import jax
import numpy as np
import pytest

from pr2jax.replay import drift as d

L, B, C, D, E, K = 2, 12, 5, 6, 8, 2
MASK = np.random.default_rng(9).random((B, C)) < 0.8
FIRST = np.arange(B) % 2 == 0


def value(pair):
    return float(pair[0]) / float(pair[1])


def rule(logits):
    return jax.lax.top_k(logits, K)[1]


def data(seed=0, noise=0.05):
    """h, p_old, p_now = p_old + h W + noise, W."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(L, B, C, D)).astype(np.float32)
    p_old = rng.normal(size=(L, B, C, E)).astype(np.float32)
    w = 0.2 * rng.normal(size=(L, D, E))
    p_now = p_old + np.einsum("lbcd,lde->lbce", h, w) + noise * rng.normal(size=p_old.shape)
    # What is padding must not count, whatever it is.
    h[:, ~MASK], p_old[:, ~MASK], p_now[:, ~MASK] = np.nan, np.nan, np.inf
    return h, p_old, p_now.astype(np.float32), w


def centred(x):
    return x - x.mean(axis=-1, keepdims=True)


def ridge(h, dp, rows, layer):
    """W of a layer by least squares on the rows extended by sqrt(r) I."""
    keep = MASK & rows[:, None]
    x, y = h[layer][keep].astype(np.float64), dp[layer][keep]
    r = d.RIDGE * np.trace(x.T @ x) / D
    x = np.concatenate([x, np.sqrt(r) * np.eye(D)])
    y = np.concatenate([y, np.zeros((D, E))])
    return np.linalg.lstsq(x, y, rcond=None)[0]


def top(x):
    return set(np.argsort(-x, kind="stable")[:K].tolist())


def matches(routes, live, rows):
    """(zero deviation, agreement) of sets [token][layer] over tokens of the rows."""
    zero, agree = [], []
    for b in np.flatnonzero(rows):
        for c in np.flatnonzero(MASK[b]):
            both = [len(routes(layer, b, c) & live(layer, b, c)) for layer in range(L)]
            zero.append(all(n == K for n in both))
            agree.append(np.mean(both) / K)
    return np.mean(zero), np.mean(agree)


@functools.cache
def report():
    h, p_old, p_now, w = data()
    used = np.random.default_rng(3).integers(0, E, (L, B, C, K)).astype(np.int32)
    run = jax.jit(functools.partial(d.window_report, rule=rule))
    found, fitted = run(h, p_old, p_now, MASK, FIRST, used=used, shifts={"true": w, "wrong": -w})
    return h, p_old, p_now, w, used, found, np.asarray(fitted)


def test_the_fit_is_ridge_regression():
    h, p_old, p_now, _, _, _, fitted = report()
    dp = centred(p_now.astype(np.float64) - p_old)
    for layer in range(L):
        want = ridge(h, dp, np.ones(B, bool), layer)
        np.testing.assert_allclose(fitted[layer], want, atol=2e-5)


@pytest.mark.parametrize("name", ["oracle", "true", "wrong"])
def test_r2_and_routes_of_a_shift(name):
    h, p_old, p_now, w, _, found, _ = report()
    dp = centred(p_now.astype(np.float64) - p_old)
    maps = {
        "oracle": np.stack([ridge(h, dp, FIRST, layer) for layer in range(L)]),
        "true": w,
        "wrong": -w,
    }[name]
    judged = MASK & ~FIRST[:, None]
    shares = []
    for layer in range(L):
        y = dp[layer][judged]
        rest = y - centred(h[layer][judged].astype(np.float64) @ maps[layer])
        shares.append(1 - np.sum(rest**2) / np.sum(y**2))
    np.testing.assert_allclose(value(found[f"{name}_r2"]), np.mean(shares), atol=2e-5)
    shifted = lambda layer, b, c: top(p_old[layer, b, c] + h[layer, b, c] @ maps[layer])
    live = lambda layer, b, c: top(p_now[layer, b, c])
    zero, agree = matches(shifted, live, ~FIRST)
    np.testing.assert_allclose(value(found[f"{name}_zero_deviation"]), zero, rtol=1e-6)
    np.testing.assert_allclose(value(found[f"{name}_agreement"]), agree, rtol=1e-6)


def test_old_and_used_routes_on_the_same_tokens():
    _, p_old, p_now, _, used, found, _ = report()
    live = lambda layer, b, c: top(p_now[layer, b, c])
    old = lambda layer, b, c: top(p_old[layer, b, c])
    # Random ids may hold an expert twice: |used & live| counts each place, as the learner does.
    zero, agree = matches(old, live, ~FIRST)
    np.testing.assert_allclose(value(found["old_zero_deviation"]), zero, rtol=1e-6)
    np.testing.assert_allclose(value(found["old_agreement"]), agree, rtol=1e-6)
    judged = [(b, c) for b in np.flatnonzero(~FIRST) for c in np.flatnonzero(MASK[b])]
    share = [
        np.mean([sum(e in live(layer, b, c) for e in used[layer, b, c]) for layer in range(L)]) / K
        for b, c in judged
    ]
    np.testing.assert_allclose(value(found["used_agreement"]), np.mean(share), rtol=1e-6)


def test_the_oracle_beats_old_routes_where_the_drift_is_linear():
    found = report()[5]
    assert value(found["oracle_r2"]) > 0.9
    assert value(found["oracle_zero_deviation"]) > value(found["old_zero_deviation"]) + 0.2
    assert value(found["split_cosine"]) > 0.95


def test_size_is_the_drift_over_the_logits():
    _, p_old, p_now, _, _, found, _ = report()
    judged = MASK & ~FIRST[:, None]
    moved = centred(p_now.astype(np.float64) - p_old)[:, judged]
    logits = centred(p_old.astype(np.float64))[:, judged]
    want = np.sqrt(np.sum(moved**2) / np.sum(logits**2))
    np.testing.assert_allclose(value(found["size"]), want, rtol=1e-5)


def test_cosine():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, L, D, E))
    # What is the same for all experts moves no route.
    got = value(d.cosine(a.astype(np.float32) + 3.0, b.astype(np.float32)))
    want = [
        np.sum(centred(x) * centred(y)) / np.linalg.norm(centred(x)) / np.linalg.norm(centred(y))
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(got, np.mean(want), atol=1e-5)


def test_without_drift_nothing_is_explained():
    h, p_old, _, _ = data()
    used = np.asarray(rule(np.nan_to_num(p_old)))
    found, fitted = d.window_report(
        h, p_old, p_old, MASK, FIRST, rule, used=used, shifts={"zero": np.zeros((L, D, E))}
    )
    assert not np.any(fitted)
    assert found["oracle_r2"][1] == 0
    assert found["zero_r2"][1] == 0
    assert found["split_cosine"][1] == 0
    assert value(found["old_zero_deviation"]) == value(found["zero_zero_deviation"]) == 1.0


def test_without_tokens_everything_weighs_nothing():
    h, p_old, p_now, _ = data()
    used = np.asarray(rule(np.nan_to_num(p_old)))
    none = np.zeros_like(MASK)
    found, fitted = d.window_report(h, p_old, p_now, none, FIRST, rule, used=used, shifts={})
    assert not np.any(fitted)
    assert all(weight == 0 for _, weight in found.values())
