"""Probes against numpy on the logits of plain scoring passes, and which batches are probed."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core.optim import adam_direction
from pr2jax.models.transformer import router_params
from pr2jax.replay.modes import ROUTER_PATTERN, ReplayConfig
from pr2jax.rl.batch import split_micro
from pr2jax.rl.update import make_mini_step
from pr2jax.sampler.types import Rollout
from pr2jax.train.config import Config
from pr2jax.train.probe import DriftProbe
from tests.rl import tiny

GROUPS = np.repeat(np.arange(tiny.ROWS // 2), 2)
FIRST = GROUPS % 2 == 0


def moved(params, seed, size=0.2):
    """Every parameter a bit further, routers included."""
    rng = np.random.default_rng(seed)
    step = lambda x: x + size * rng.normal(size=x.shape).astype(np.float32) * jnp.std(x)
    return jax.tree.map(step, params)


def probe_of(optimizer, every=2, **replay):
    replay = ReplayConfig(mode="r3", feature_tokens=8, probe_every=every, **replay)
    rl = tiny.rl_config(prompts_per_batch=4, samples_per_prompt=2, micro_batch=4)
    cfg = Config(model=tiny.MODEL, rl=rl, replay=replay)
    session = types.SimpleNamespace(cfg=cfg, mesh=None)
    return DriftProbe(session, tiny.SCORER, optimizer.cfg)


def rollout_of(batch):
    names = {f.name: None for f in dataclasses.fields(Rollout)}
    lengths = {"prompt_lengths": np.full(tiny.ROWS, tiny.PROMPT), "lengths": batch.lengths}
    return Rollout(**(names | lengths | {"group_ids": GROUPS}))


@functools.cache
def world():
    """(optimizer, state after two Adam steps, batch with routes of its parameters)."""
    params = tiny.make_params()
    optimizer = tiny.make_optimizer(params)
    state = tiny.make_state(params, optimizer)
    for seed in (1, 2):
        grads = moved(jax.tree.map(jnp.zeros_like, params), seed)
        grads = jax.tree.map(lambda x, s=seed: x + 0.1 * s, grads)
        new, opt_state, _ = optimizer.update(grads, state.opt_state, state.params)
        state = state.replace(params=new, opt_state=opt_state)
    batch = tiny.blank_batch()
    scores = tiny.score(state.params, batch, tiny.response_places(batch), micro=4)
    return optimizer, state, tiny.as_behavior(batch, scores)


def logits(params, batch):
    """Un-shifted logits at response inputs with the logged routes replayed, by a plain pass."""
    found = tiny.score(params, batch, tiny.response_places(batch), micro=4)
    return np.asarray(found.features.logits)


def top(x):
    return np.sort(np.argsort(-x, axis=-1, kind="stable")[..., : tiny.K], axis=-1)


def value(found, name):
    return float(found[name][0]) / float(found[name][1])


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("replayed", [True, False])
def test_a_window_by_hand(recorded, replayed):
    optimizer, state, batch = world()
    now = moved(state.params, 5)
    old_logits, new_logits = logits(state.params, batch), logits(now, batch)
    given = batch if recorded else batch.replace(features=None)
    if not replayed:  # mode off: the log is measured against, the probe replays it all the same
        given = given.replace(logged=given.routes, routes=None)
    probe = probe_of(optimizer)
    copy = jax.tree.map(jnp.copy, state)
    window = probe.window(copy, given, rollout_of(batch), 0)
    jax.tree.map(lambda x: x.delete(), copy)  # the mini-steps donate it
    window.measure("window", now, 3)
    found = window.close()
    judged = tiny.response_places(batch)[1] & ~FIRST[:, None]
    live = top(new_logits)

    def zero_deviation(routes):
        return np.all(np.sort(routes, axis=-1) == live, axis=(0, -1))[judged].mean()

    assert 0 < zero_deviation(top(old_logits)) < 1
    got = functools.partial(value, found)
    want = zero_deviation(top(old_logits))
    np.testing.assert_allclose(got("probe/window/old_zero_deviation"), want, rtol=1e-6)
    # Nothing shifted these routes, so the logged ones are the old ones.
    np.testing.assert_allclose(got("probe/window/used_zero_deviation"), want, rtol=1e-6)
    h = np.asarray(batch.features.inputs.astype(jnp.float32))
    steps = adam_direction(optimizer.cfg, state.opt_state, state.params, ROUTER_PATTERN)
    ahead = 3 * np.concatenate([np.asarray(x) for x in steps.values()])
    own = np.asarray(router_params(now, tiny.MODEL) - router_params(state.params, tiny.MODEL))
    for name, shift in (("momentum", ahead), ("router", own)):
        routes = top(old_logits + np.einsum("lbcd,lde->lbce", h, shift))
        want = zero_deviation(routes)
        np.testing.assert_allclose(got(f"probe/window/{name}_zero_deviation"), want, rtol=1e-6)
    assert not any("previous" in name or "used_shift" in name for name in found)


def test_consecutive_windows_are_compared():
    optimizer, state, batch = world()
    probe = probe_of(optimizer, every=5)
    now = moved(state.params, 5)

    def close(index):
        window = probe.window(state, batch, rollout_of(batch), index)
        if window is None:
            return None
        window.measure("window", now, 2)
        return window.close()

    assert [close(i) is not None for i in range(3)] == [False] * 3
    first, second, later = close(3), close(4), close(8)
    assert "probe/window/cosine" not in first
    # The same drift twice: the same map, which foretells it as well as it can be foretold.
    np.testing.assert_allclose(value(second, "probe/window/cosine"), 1.0, atol=1e-5)
    assert value(second, "probe/window/previous_r2") > value(second, "probe/window/oracle_r2")
    assert "probe/window/cosine" not in later


def test_off_is_off():
    optimizer, state, batch = world()
    assert probe_of(optimizer, every=0).window(state, batch, rollout_of(batch), 0) is None


@pytest.mark.slow
def test_off_holds_the_log_against_live_routes():
    """Nothing is replayed, yet flips and KL are measured, and the log stands beside old routes."""
    optimizer, state, batch = world()
    state = state.replace(params=moved(state.params, 5))
    cfg = ReplayConfig(mode="off", feature_tokens=8, keep_features=True)
    step = tiny.fast(make_mini_step(tiny.MODEL, tiny.rl_config(), cfg, optimizer, donate=False))
    off = batch.replace(routes=None, logged=batch.routes)
    found = step(state, split_micro(off, tiny.ROWS), False)[1]
    got = functools.partial(value, found)
    assert 0 < got("paired_zero_deviation") < 1
    # Features stand at every response input here, and the log is what the old router chose.
    for name in ("zero_deviation", "agreement"):
        np.testing.assert_allclose(got(f"paired_{name}"), got(name), rtol=1e-6)
        np.testing.assert_allclose(got(f"old_route_{name}"), got(name), rtol=1e-6)
    assert got("old_logits_kl") > 0
    assert "shifted_logits_kl" not in found
