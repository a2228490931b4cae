"""Optimizers against AdamW written in float64 numpy, schedules against their closed forms."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core.config import ConfigError, from_config_dict, to_config_dict
from pr2jax.core.optim import (
    OptimConfig,
    ParamGroup,
    adam_direction,
    build_optimizer,
    learning_rate,
)
from pr2jax.core.params import ParamSpec, abstract_params, zeros
from pr2jax.core.sharding import MeshConfig, make_mesh, param_shardings

SHAPES = {
    "attention/kernel": (6, 8),
    "attention/bias": (8,),
    "moe/router/kernel": (2, 6, 4),
    "moe/predictor/kernel": (2, 6, 4),
    "final_norm/scale": (6,),
}


def nest(flat):
    tree = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = functools.reduce(lambda n, k: n.setdefault(k, {}), parents, tree)
        node[leaf] = value
    return tree


def flat(tree, prefix=""):
    out = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        out |= flat(value, path + "/") if isinstance(value, dict) else {path: value}
    return out


def draw(seed, scale=1.0):
    generator = np.random.default_rng(seed)
    return {p: (scale * generator.standard_normal(s)).astype(np.float32) for p, s in SHAPES.items()}


class NumpyAdamW:
    """Loshchilov & Hutter (2019), decoupled decay scaled by the rate; clipping by group norm."""

    def __init__(self, params, b1, b2, eps):
        self.b1, self.b2, self.eps, self.t = b1, b2, eps, 0
        self.p = {k: v.astype(np.float64) for k, v in params.items()}
        self.m = {k: np.zeros(v.shape) for k, v in params.items()}
        self.v = {k: np.zeros(v.shape) for k, v in params.items()}

    def step(self, grads, rate, clip=math.inf, decay=lambda path: 0.0):
        self.t += 1
        norm = math.sqrt(sum((grads[k].astype(np.float64) ** 2).sum() for k in self.p))
        for k in self.p:
            g = grads[k].astype(np.float64) * min(1.0, clip / norm)
            self.m[k] = self.b1 * self.m[k] + (1 - self.b1) * g
            self.v[k] = self.b2 * self.v[k] + (1 - self.b2) * g**2
            m = self.m[k] / (1 - self.b1**self.t)
            v = self.v[k] / (1 - self.b2**self.t)
            self.p[k] -= rate * (m / (np.sqrt(v) + self.eps) + decay(k) * self.p[k])
        return norm


def jitted(optimizer):
    return jax.jit(lambda g, s, p, active: optimizer.update(g, s, p, active or None))


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2e-5, atol=2e-6)


def bits_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---------------------------------------------------------------- AdamW and groups


def test_adamw_with_clip_decay_and_schedule():
    cfg = OptimConfig(
        learning_rate=0.01, b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.1, clip_norm=1.5,
        schedule="cosine", warmup_steps=3, total_steps=8, final_fraction=0.1,
    )  # fmt: skip
    start = draw(0)
    params = nest(start)
    optimizer = build_optimizer(cfg, params)
    update, state = jitted(optimizer), optimizer.init(params)
    truth = NumpyAdamW(start, 0.9, 0.95, 1e-6)
    for t in range(8):
        if t < 3:
            rate = 0.01 * (t + 1) / 3
        else:
            rate = 0.001 + 0.009 * 0.5 * (1 + math.cos(math.pi * (t - 3) / 5))
        grads = draw(100 + t, scale=0.01 if t == 4 else 1.0)  # step 4 is below the clip norm
        norm = truth.step(
            grads, rate, clip=1.5, decay=lambda k: 0.1 if k.endswith("kernel") else 0.0
        )
        params, state, metrics = update(nest(grads), state, params, {})
        close(metrics["learning_rate"][0], rate)
        close(metrics["grad_norm"][0], norm)
        close(metrics["grad_norm/default"][0], norm)
    for path, value in flat(params).items():
        close(value, truth.p[path])


def test_groups_have_their_own_rate_norm_decay_and_betas():
    cfg = OptimConfig(
        learning_rate=0.01, weight_decay=0.1, clip_norm=1.0, eps=1e-8, no_decay="norm|bias",
        groups={
            "predictor": ParamGroup(
                pattern="predictor", lr_multiplier=5.0, clip_norm=0.1, weight_decay=0.0,
                b1=0.98, b2=0.99, eps=1e-5,
            ),
            "router": ParamGroup(pattern="moe", lr_multiplier=0.5, clip_norm=math.inf),
        },
    )  # fmt: skip
    start = draw(0)
    params = nest(start)
    optimizer = build_optimizer(cfg, params)
    assert optimizer.labels["moe/predictor/kernel"] == "predictor"  # the first match wins
    update, state = jitted(optimizer), optimizer.init(params)

    def part(paths, *hyper):
        return NumpyAdamW({k: start[k] for k in paths}, *hyper)

    rest = part(["attention/kernel", "attention/bias", "final_norm/scale"], 0.9, 0.95, 1e-8)
    predictor = part(["moe/predictor/kernel"], 0.98, 0.99, 1e-5)
    router = part(["moe/router/kernel"], 0.9, 0.95, 1e-8)
    for t in range(4):
        grads = draw(10 + t)
        kernels = lambda k: 0.1 if k.endswith("kernel") else 0.0
        norms = {
            "default": rest.step(grads, 0.01, 1.0, kernels),
            "predictor": predictor.step(grads, 0.05, 0.1),
            "router": router.step(grads, 0.005, decay=kernels),
        }
        params, state, metrics = update(nest(grads), state, params, {})
        for name, norm in norms.items():
            close(metrics[f"grad_norm/{name}"][0], norm)
    for path, value in flat(params).items():
        close(value, (rest.p | predictor.p | router.p)[path])


def test_update_norm_is_the_length_of_the_step():
    cfg = OptimConfig(groups={"predictor": ParamGroup("predictor", lr_multiplier=100.0)})
    params = nest(draw(0))
    optimizer = build_optimizer(cfg, params)
    new, _, metrics = jitted(optimizer)(nest(draw(1)), optimizer.init(params), params, {})
    moved = [np.asarray(v, np.float64) - draw(0)[path] for path, v in flat(new).items()]
    close(metrics["update_norm"][0], math.sqrt(sum((d**2).sum() for d in moved)))


def test_sgd_group():
    cfg = OptimConfig(
        clip_norm=None, groups={"predictor": ParamGroup("predictor", 300.0, optimizer="sgd")}
    )
    start, grads = draw(0), draw(1)
    params = nest(start)
    optimizer = build_optimizer(cfg, params)
    state = optimizer.init(params)
    assert not [x for x in jax.tree.leaves(state.groups["predictor"]) if x.ndim]
    new, _, _ = jitted(optimizer)(nest(grads), state, params, {})
    path = "moe/predictor/kernel"
    close(flat(new)[path], start[path].astype(np.float64) - 0.3 * grads[path])


def test_bfloat16_parameters_keep_fp32_moments():
    start = draw(0)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), nest(start))
    optimizer = build_optimizer(OptimConfig(clip_norm=None, learning_rate=0.1), params)
    state = optimizer.init(params)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    rounded = {k: np.asarray(v, np.float32) for k, v in flat(params).items()}
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), nest(draw(1)))
    truth = NumpyAdamW(rounded, 0.9, 0.95, 1e-8)
    truth.step({k: np.asarray(v, np.float32) for k, v in flat(grads).items()}, 0.1)
    new, state, _ = jitted(optimizer)(grads, state, params, {})
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    for path, value in flat(new).items():  # to half a unit in the last of bfloat16's 8 bits
        np.testing.assert_allclose(np.asarray(value, np.float64), truth.p[path], rtol=2**-8)


# ---------------------------------------------------------------- what must not move


def test_inactive_group_and_its_state_are_bit_unchanged():
    cfg = OptimConfig(
        weight_decay=0.1, groups={"predictor": ParamGroup("predictor", 10.0, weight_decay=0.1)}
    )
    params = nest(draw(0))
    optimizer = build_optimizer(cfg, params)
    update, state = jitted(optimizer), optimizer.init(params)
    params, state, _ = update(nest(draw(1)), state, params, {"predictor": jnp.array(True)})
    grads = nest(draw(2))
    hostile = draw(2) | {"moe/predictor/kernel": np.full((2, 6, 4), np.nan, np.float32)}
    on, state_on, _ = update(grads, state, params, {"predictor": jnp.array(True)})
    off, state_off, metrics = update(nest(hostile), state, params, {"predictor": jnp.array(False)})
    bits_equal(off["moe"]["predictor"], params["moe"]["predictor"])
    bits_equal(state_off.groups["predictor"], state.groups["predictor"])
    assert not np.array_equal(
        on["moe"]["predictor"]["kernel"], params["moe"]["predictor"]["kernel"]
    )
    # The others take the very step they would have taken.
    bits_equal(off["attention"], on["attention"])
    bits_equal(off["moe"]["router"], on["moe"]["router"])
    bits_equal(state_off.groups["default"], state_on.groups["default"])
    assert metrics["grad_norm/predictor"] == (0.0, 0.0)
    assert all(np.isfinite(value) for value, _ in metrics.values())
    # Momentum alone would have moved it: a zero gradient is not a skip.
    still = draw(2) | {"moe/predictor/kernel": np.zeros((2, 6, 4), np.float32)}
    moved, _, _ = update(nest(still), state, params, {"predictor": jnp.array(True)})
    assert not np.array_equal(
        moved["moe"]["predictor"]["kernel"], params["moe"]["predictor"]["kernel"]
    )


def test_inactive_steps_leave_no_trace_in_bias_correction():
    cfg = OptimConfig(clip_norm=None, groups={"predictor": ParamGroup("predictor")})
    start, path = draw(0), "moe/predictor/kernel"
    params = nest(start)
    optimizer = build_optimizer(cfg, params)
    update, state = jitted(optimizer), optimizer.init(params)
    truth = NumpyAdamW({path: start[path]}, 0.9, 0.95, 1e-8)
    for t in range(6):
        on = t % 3 != 0
        grads = draw(20 + t)
        params, state, _ = update(nest(grads), state, params, {"predictor": jnp.array(on)})
        if on:
            truth.step(grads, 1e-3)
    close(flat(params)[path], truth.p[path])
    assert state.count == 6  # the schedule goes with the run


def test_unknown_active_label():
    params = nest(draw(0))
    optimizer = build_optimizer(OptimConfig(), params)
    with pytest.raises(ValueError, match="predictor.*default"):
        optimizer.update(params, optimizer.init(params), params, {"predictor": True})


def test_frozen_parameters_keep_their_bits_and_no_moments():
    cfg = OptimConfig(trainable="^(?!.*router)", weight_decay=0.1, clip_norm=1.0)
    start, grads = draw(0), draw(1)
    params = nest(start)
    optimizer = build_optimizer(cfg, params)
    state = optimizer.init(params)
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert sum(m.size for m in moments) == 2 * sum(
        math.prod(s) for p, s in SHAPES.items() if "router" not in p
    )
    new, _, metrics = jitted(optimizer)(nest(grads), state, params, {})
    bits_equal(new["moe"]["router"]["kernel"], start["moe/router/kernel"])
    # A frozen gradient takes no part in the clip norm.
    trained = [grads[p].astype(np.float64) for p in SHAPES if "router" not in p]
    close(metrics["grad_norm"][0], math.sqrt(sum((g**2).sum() for g in trained)))


# ---------------------------------------------------------------- schedules


def schedule(**settings):
    cfg = OptimConfig(learning_rate=2.0, **settings)
    cfg.validate()
    return np.asarray(jax.jit(jax.vmap(lambda t: learning_rate(cfg, t)))(jnp.arange(101)))


def test_constant_with_warmup():
    rates = schedule(warmup_steps=10)
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_array_equal(rates[10:], 2.0)
    np.testing.assert_array_equal(schedule(), 2.0)


def test_cosine():
    rates = schedule(schedule="cosine", warmup_steps=20, total_steps=100, final_fraction=0.25)
    t = np.arange(20, 101)
    expected = 0.5 + 1.5 * 0.5 * (1 + np.cos(np.pi * (t - 20) / 80))
    np.testing.assert_allclose(rates[20:], expected, rtol=1e-5)
    np.testing.assert_allclose(rates[[19, 60, 100]], [2.0, 1.25, 0.5], rtol=1e-6)


def test_wsd():
    rates = schedule(schedule="wsd", warmup_steps=5, total_steps=100, decay_fraction=0.4)
    np.testing.assert_allclose(rates[[0, 4]], [0.4, 2.0], rtol=1e-6)
    np.testing.assert_array_equal(rates[5:61], 2.0)
    np.testing.assert_allclose(rates[[70, 80, 100]], [1.5, 1.0, 0.0], atol=1e-6)
    # A decay longer than what warm-up leaves starts where warm-up ends.
    whole = schedule(schedule="wsd", warmup_steps=50, total_steps=100, decay_fraction=1.0)
    np.testing.assert_allclose(whole[[49, 50, 75]], [2.0, 2.0, 1.0], rtol=1e-6)


# ---------------------------------------------------------------- lookahead


def test_adam_direction_is_the_next_step_under_the_mean_gradient():
    cfg = OptimConfig(
        learning_rate=0.1, b1=0.9, b2=0.9, eps=1e-3, clip_norm=None, weight_decay=0.3,
        schedule="wsd", warmup_steps=6, total_steps=10, trainable="^(?!.*attention)",
        groups={"router": ParamGroup("router", lr_multiplier=0.5, b1=0.8)},
    )  # fmt: skip
    start, path = draw(0), "moe/router/kernel"
    params = nest(start)
    optimizer = build_optimizer(cfg, params)
    update, state = jitted(optimizer), optimizer.init(params)
    ahead = jax.jit(lambda s, p: adam_direction(cfg, s, p, "router|attention/kernel"))
    assert not np.any(ahead(state, params)[path])
    truth = NumpyAdamW({path: start[path]}, 0.8, 0.9, 1e-3)
    for t in range(3):
        grads = draw(30 + t)
        truth.step(grads, 0.05 * (t + 1) / 6)
        params, state, _ = update(nest(grads), state, params, {})
    m, v = truth.m[path] / (1 - 0.8**3), truth.v[path] / (1 - 0.9**3)
    directions = ahead(state, params)
    assert set(directions) == {path, "attention/kernel"}
    close(directions[path], -0.05 * (4 / 6) * m / (np.sqrt(v) + 1e-3))
    assert not np.any(directions["attention/kernel"])  # frozen: it will not move


def test_adam_direction_refuses_sgd_and_unknown_paths():
    cfg = OptimConfig(optimizer="sgd")
    params = nest(draw(0))
    state = build_optimizer(cfg, params).init(params)
    with pytest.raises(ConfigError, match="moe/router/kernel is trained by sgd"):
        adam_direction(cfg, state, params, "router")
    with pytest.raises(ConfigError, match="'rooter' matches no parameter"):
        adam_direction(cfg, state, params, "rooter")


# ---------------------------------------------------------------- configuration and placement


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (OptimConfig(trainable="nothing"), "trainable: 'nothing' matches no"),
        (OptimConfig(groups={"r": ParamGroup("rooter")}), r"groups.r.pattern: 'rooter' matches"),
        (OptimConfig(groups={"r": ParamGroup("router[")}), r"groups.r.pattern: .*not a regular"),
        (OptimConfig(groups={"default": ParamGroup("router")}), "groups.default: "),
        (OptimConfig(schedule="cosine"), "total_steps: "),
        (OptimConfig(schedule="wsd", total_steps=5, warmup_steps=5), "total_steps: "),
        (OptimConfig(b1=1.5), "b1: "),
        (OptimConfig(learning_rate=float("nan")), "learning_rate: "),
        (OptimConfig(groups={"r": ParamGroup("router", optimizer="sgd", b1=0.9)}), "groups.r.b1: "),
    ],
)
def test_bad_settings_name_their_key(cfg, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        build_optimizer(cfg, nest(draw(0)))


def test_config_survives_the_config_dict():
    cfg = OptimConfig(groups={"predictor": ParamGroup("predictor", 1e3, clip_norm=1.0)})
    assert from_config_dict(OptimConfig, to_config_dict(cfg)) == cfg


def test_default_no_decay_is_norms_and_biases():
    exempt = ["final_norm/scale", "a/q_norm/scale", "a/bias", "moe/router/selection_bias", "norm"]
    decayed = ["embed/table", "a/kernel", "moe/predictor/kernel", "biased/kernel"]
    pattern = OptimConfig().no_decay
    assert all(re.search(pattern, p) for p in exempt)
    assert not any(re.search(pattern, p) for p in decayed)


def test_moments_lie_where_their_parameters_lie():
    specs = {"a": {"w": ParamSpec((8, 4), ("embed", "mlp"), zeros)}}
    shardings = param_shardings(specs, make_mesh(MeshConfig(fsdp=4, tensor=2)))
    optimizer = build_optimizer(OptimConfig(), specs)
    state = optimizer.abstract_state(abstract_params(specs, shardings))
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert [m.sharding for m in moments] == [shardings["a"]["w"]] * 2
    assert {m.dtype for m in moments} == {jnp.dtype("float32")}
