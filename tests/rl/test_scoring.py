"""Scoring passes against a plain log-softmax of a plain forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.models.transformer import Record, forward
from pr2jax.replay.modes import ReplayConfig, plan
from pr2jax.rl.scoring import make_scorer, scoring_decision
from tests.rl import tiny
from tests.rl.tiny import MODEL


@pytest.fixture(scope="module")
def case():
    params = tiny.make_params()
    batch = tiny.blank_batch()
    args = (batch.tokens, batch.positions, batch.segment_ids)

    @tiny.fast
    def plain(params, routes=None):
        out = forward(params, *args, cfg=MODEL, routes=routes, record=Record())
        return out.hidden, out.routes, out.router.logits, out.router.inputs

    return params, batch, plain


def logprobs64(params, hidden, tokens, temperature):
    table = np.asarray(params["embed"]["table"], np.float64)
    logits = np.asarray(hidden, np.float64) @ table.T / temperature
    logits -= logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]


@pytest.mark.parametrize("forced", [False, True])
def test_logprobs_routes_and_features(case, forced):
    """Four micro-batches, temperature .7, live or forced routes; features at chosen places."""
    params, batch, plain = case
    rng = np.random.default_rng(0)
    if forced:
        shape = (tiny.L, tiny.ROWS, tiny.LENGTH, tiny.E)
        routes = np.argsort(rng.random(shape), -1)[..., : tiny.K].astype(np.uint8)
        batch = batch.replace(routes=routes)
    hidden, routes, logits, inputs = plain(params, batch.routes)
    mask = rng.random((tiny.ROWS, 4)) < 0.7
    positions = rng.integers(0, tiny.PROMPT + 1, mask.shape).astype(np.int32)
    positions[~mask] = 10_000  # whatever stands there is never gathered
    scorer = make_scorer(MODEL, temperature=0.7)
    got = tiny.score(params, batch, (positions, mask), micro=2, scorer=scorer)
    want = logprobs64(params, hidden, batch.tokens, 0.7)
    real = np.asarray(batch.segment_ids)[:, 1:] > 0
    np.testing.assert_allclose(np.asarray(got.logprobs)[:, 1:][real], want[real], atol=1e-5)
    assert not np.any(np.asarray(got.logprobs)[:, 1:][~real])
    assert not np.any(got.logprobs[:, 0])
    if forced:
        np.testing.assert_array_equal(got.routes, batch.routes)
    valid = np.asarray(batch.segment_ids) > 0
    np.testing.assert_array_equal(np.asarray(got.routes)[:, valid], np.asarray(routes)[:, valid])
    for b, c in zip(*np.nonzero(mask), strict=True):
        t = positions[b, c]
        np.testing.assert_allclose(got.features.logits[:, b, c], logits[:, b, t], atol=2e-5)
        kept = np.asarray(got.features.inputs[:, b, c], np.float32)
        np.testing.assert_allclose(kept, inputs[:, b, t], rtol=2**-8, atol=1e-5)  # bf16
    assert got.features.inputs.dtype == jnp.bfloat16
    assert jax.tree.all(jax.tree.map(lambda x: np.all(np.isfinite(x)), got.features))


def test_decision_and_its_reason():
    r2, pr2 = plan(ReplayConfig(mode="r2")), plan(ReplayConfig(mode="pr2"))
    cases = [
        ("never", r2, None, True, "r2"),
        ("always", pr2, 0.0, True, "always"),
        ("never", pr2, 9.0, False, "never"),
        ("auto", pr2, None, False, "not measured"),
        ("auto", pr2, 1e-3, False, "within"),
        ("auto", pr2, 0.5, True, "exceeds"),
    ]
    for setting, todo, measured, want, word in cases:
        got, why = scoring_decision(setting, todo, measured, 0.02)
        assert got == want
        assert word in why
