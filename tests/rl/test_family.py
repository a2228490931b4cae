"""Members of the family through the whole mini-step: the loss on paper, micro-batches, epochs."""

import dataclasses

import jax
import numpy as np
import pytest

from pr2jax.models.transformer import forward
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.batch import split_micro, take_rows
from pr2jax.rl.update import make_mini_step
from pr2jax.sampler.types import SamplingParams
from tests.rl import tiny
from tests.rl.paper import on_paper
from tests.rl.tiny import MODEL, leaves, value

SHARED = {"kl_coef": 0.2, "scoring_pass": "always", "sampling": SamplingParams(max_tokens=7)}
MEMBERS = {
    "sequence": {
        "ratio": "sequence",
        "clip_low": 0.03,
        "clip_high": 0.04,
        "dual_clip": 1.1,
        "tis_cap": 1.05,
        "aggregation": "fixed",
        "kl_estimator": "k2",
        "kl_importance": True,
    },
    "cispo": {
        "surrogate": "cispo",
        "clip_low": 1.0,
        "clip_high": 0.1,
        "tis_cap": 1.05,
        "tis_level": "sequence",
        "aggregation": "sequence_mean",
        "kl_estimator": "k1",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "never"),
    [("sequence", set()), pytest.param("cispo", {"low", "dual"}, marks=pytest.mark.slow)],
)
def test_micro_batches_and_the_loss_on_paper(name, never):
    """4 micro-batches of 2, of which one has no token and one is filler, against one of 8."""
    params = tiny.make_params()
    optimizer = tiny.make_optimizer(params, optimizer="sgd", learning_rate=1.0, clip_norm=None)
    batch = tiny.blank_batch()
    rng = np.random.default_rng(3)
    args = (batch.tokens, batch.positions, batch.segment_ids)

    @tiny.fast
    def run(params):
        out = forward(params, *args, cfg=MODEL)
        return jax.nn.log_softmax(out.hidden @ params["embed"]["table"].T), out.routes

    logp, routes = run(params)
    rows = np.arange(tiny.ROWS)[:, None]
    new = np.asarray(logp)[rows, np.arange(tiny.LENGTH - 1), batch.tokens[:, 1:]]
    # Other policies: the old one is off by whole rows, so that sequences meet every bound.
    off = np.array([-0.15, -0.15, 0, 0, 0.15, 0, 0, 0])[:, None]
    other = lambda size: np.pad(new + off + size * rng.normal(size=new.shape), ((0, 0), (1, 0)))
    batch = batch.replace(
        old_logprobs=other(0.05).astype(np.float32),
        behavior_logprobs=other(0.1).astype(np.float32),
        ref_logprobs=other(0.1).astype(np.float32),
        routes=np.asarray(routes),
        advantages=np.array([1.2, -0.8, 0.3, -0.3, -1.1, 0.9, 0.1, 0.2], np.float32),
        loss_mask=batch.loss_mask * ~np.isin(rows, [2, 3]),
    )
    batch = take_rows(batch, rows[:, 0], rows[:, 0] < 6)
    found = {}
    for micro in (8, 2):
        cfg = tiny.rl_config(micro_batch=micro, **SHARED, **MEMBERS[name])
        cfg.validate()
        step = make_mini_step(MODEL, cfg, ReplayConfig(mode="r3"), optimizer, donate=False)
        state = tiny.make_state(params, optimizer)
        found[micro] = tiny.fast(step)(state, split_micro(batch, micro), False)
    (full, metrics), (split, others) = found[8], found[2]
    tables = (x[:, 1:] for x in (batch.old_logprobs, batch.behavior_logprobs, batch.ref_logprobs))
    want, seen = on_paper(new, new, *tables, batch.loss_mask[:, 1:], batch.advantages, cfg)
    np.testing.assert_allclose(value(metrics, "loss"), want, rtol=1e-4)
    for key, count in (("clip_low", "low"), ("clip_high", "high"), ("tis_capped", "capped")):
        np.testing.assert_allclose(metrics[key][0], seen[count], rtol=1e-6, err_msg=key)
    assert {key for key, count in seen.items() if not count} == never
    before, other = leaves(params), leaves(split.params)
    for path, after in leaves(full.params).items():
        size = np.abs(after - before[path]).max()
        assert (size > 0) == ("predictor" not in path), path
        tolerance = 2e-6 * max(size, np.abs(after).max())
        np.testing.assert_allclose(other[path], after, rtol=0, atol=tolerance, err_msg=path)
    assert metrics.keys() == others.keys()
    for key in metrics.keys() - {"load_balance"}:
        np.testing.assert_allclose(
            value(others, key), value(metrics, key), rtol=1e-4, atol=2e-6, err_msg=key
        )


def test_an_option_that_is_off_adds_nothing_to_the_program():
    """Options that are off leave no trace in the jaxpr; one that is on does."""
    params = tiny.make_params()
    optimizer = tiny.make_optimizer(params)
    batch = split_micro(tiny.blank_batch(), 8)
    state = tiny.make_state(params, optimizer)

    def program(**settings):
        cfg = dataclasses.replace(tiny.rl_config(), **settings)
        step = make_mini_step(MODEL, cfg, ReplayConfig(mode="off"), optimizer, donate=False)
        return step.lower(state, batch, False).as_text()

    plain = program()
    host = {"epochs": 3, "advantage": "rloo", "overlong_buffer": 4, "mask_truncated": True}
    assert program(**host) == plain
    assert program(dual_clip=3.0) != plain
