"""The mode algebra: who records, and from which logits."""

import dataclasses

import jax
import numpy as np
import pytest

from pr2jax.core.config import ConfigError
from pr2jax.core.optim import OptimConfig, ParamGroup, build_optimizer
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.models.transformer import param_specs
from pr2jax.replay.modes import ReplayConfig, check_model, lookahead_shift, plan, selection_shift

MOE = MoEConfig(num_experts=4, top_k=2, expert_dim=8)
# MoE at layers 1 and 3 and (alone in its segment) nowhere else: two kinds of block, one MoE each.
MODEL = ModelConfig(
    vocab_size=16,
    d_model=8,
    num_layers=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    dense_dim=8,
    moe=MOE,
    moe_every=2,
)


@pytest.mark.parametrize(
    "mode,recorder,predictor,lookahead,features",
    [
        ("off", "none", False, 0.0, 0),
        ("r2", "scoring", False, 0.0, 0),
        ("r3", "sampler", False, 0.0, 0),
        ("pr2", "sampler", True, 0.0, 64),
        ("lookahead", "sampler", False, 3.0, 64),
        ("pr2+lookahead", "sampler", True, 3.0, 64),
    ],
)
def test_plan(mode, recorder, predictor, lookahead, features):
    got = plan(ReplayConfig(mode=mode, kappa=3.0, feature_tokens=64))
    assert (got.recorder, got.predictor, got.lookahead, got.features) == (
        recorder,
        predictor,
        lookahead,
        features,
    )
    assert got.shifted == (predictor or lookahead > 0)
    kept = plan(ReplayConfig(mode=mode, kappa=3.0, feature_tokens=64, keep_features=True))
    assert kept == dataclasses.replace(got, features=64)


@pytest.mark.parametrize(
    "settings,key",
    [
        ({"tokens": "all"}, "tokens"),
        ({"feature_tokens": 0}, "feature_tokens"),
        ({"mode": "r3", "feature_tokens": -1}, "feature_tokens"),
        ({"margin_min": 0.0}, "margin"),
        ({"depth_floor": 1.5}, "depth_floor"),
        ({"mode": "lookahead", "kappa": 0.0}, "kappa"),
        ({"mode": "off", "feature_tokens": 0, "keep_features": True}, "feature_tokens"),
        ({"mode": "r3", "feature_tokens": 0, "probe_every": 2}, "feature_tokens"),
        ({"probe_every": -1}, "probe_every"),
    ],
)
def test_bad_settings_name_the_key(settings, key):
    with pytest.raises(ConfigError, match=key):
        ReplayConfig(**settings).validate()
    ReplayConfig(mode="r3", feature_tokens=0).validate()
    ReplayConfig(tokens="all", features="recomputed").validate()


def test_models_that_cannot():
    dense = ModelConfig(moe=None)
    check_model(ReplayConfig(mode="off"), dense)
    with pytest.raises(ConfigError, match="dense"):
        check_model(ReplayConfig(mode="r3"), dense)
    with pytest.raises(ConfigError, match=r"replay.probe_every: the model is dense"):
        check_model(ReplayConfig(mode="off", probe_every=2), dense)
    plain = ModelConfig(moe=MoEConfig(predictor=False))
    with pytest.raises(ConfigError, match="predictor"):
        check_model(ReplayConfig(mode="pr2"), plain)


@pytest.fixture(scope="module")
def trained():
    """Parameters with W_p != 0 and an optimizer state after two updates by known gradients."""
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32)
    params = jax.tree.map(draw, param_specs(MODEL))
    cfg = OptimConfig(
        learning_rate=0.1,
        b1=0.9,
        b2=0.99,
        clip_norm=None,
        groups={"predictor": ParamGroup("moe/predictor/")},
    )
    optimizer = build_optimizer(cfg, params)
    state = jax.jit(optimizer.init)(params)
    steps = [jax.tree.map(draw, params) for _ in range(2)]
    update = jax.jit(optimizer.update)
    for grads in steps:
        _, state, _ = update(grads, state, params)
    return params, cfg, state, steps


def leaf(tree, block, kind):
    return np.asarray(tree["segment_0"][f"block_{block}"]["moe"][kind]["kernel"], np.float64)


def test_selection_shift(trained):
    params, cfg, state, grads = trained
    shift = lambda **kw: selection_shift(plan(ReplayConfig(**kw)), params, MODEL, cfg, state)
    assert shift(mode="r3") is None
    assert shift(mode="off") is None
    w_p = leaf(params, 1, "predictor")
    np.testing.assert_allclose(shift(mode="pr2"), w_p, rtol=1e-6)
    gated = shift(mode="pr2", depth_gate="linear", depth_floor=0.25)
    np.testing.assert_allclose(gated, w_p * np.array([1.0, 0.25])[:, None, None], rtol=1e-6)
    # Adam by hand, in float64.
    g1, g2 = (leaf(g, 1, "router") for g in grads)
    m = (0.1 * (0.9 * g1 + g2)) / (1 - 0.9**2)
    v = (0.01 * (0.99 * g1**2 + g2**2)) / (1 - 0.99**2)
    want = -0.1 * m / (np.sqrt(v) + 1e-8)
    ahead = shift(mode="lookahead", kappa=5.0)
    # atol: the running mean cancels to near 0 at places; terms are of size kappa * lr = 0.5.
    np.testing.assert_allclose(ahead, 5.0 * want, rtol=2e-5, atol=1e-7)
    both = shift(mode="pr2+lookahead", kappa=5.0)
    np.testing.assert_allclose(both, w_p + 5.0 * want, rtol=2e-5, atol=1e-6)
    # The part that W_p need not learn: dW_r's, whatever W_p holds.
    part = lambda **kw: lookahead_shift(plan(ReplayConfig(**kw)), params, MODEL, cfg, state)
    assert part(mode="pr2") is None
    np.testing.assert_array_equal(part(mode="pr2+lookahead", kappa=5.0), ahead)
