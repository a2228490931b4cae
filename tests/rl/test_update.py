"""The mini-step: exact accumulation, ratio 1, predictor isolation, replay under a moved router."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core.config import ConfigError
from pr2jax.core.optim import ParamGroup, build_optimizer
from pr2jax.core.params import map_with_path
from pr2jax.core.sharding import MeshConfig, make_mesh, param_shardings
from pr2jax.core.state import create
from pr2jax.models.transformer import Record, forward, param_specs
from pr2jax.replay.modes import ReplayConfig, plan, selection_shift
from pr2jax.rl.batch import put_batch, split_micro, take_rows
from pr2jax.rl.types import RLConfig, policy_optim
from pr2jax.rl.update import make_mini_step
from tests.rl import tiny
from tests.rl.tiny import MODEL, E, K, leaves, value

PR2 = ReplayConfig(mode="pr2", feature_tokens=tiny.LENGTH)
R3 = ReplayConfig(mode="r3")
FROZEN_ROUTER = r"^(?!.*moe/router/)"
SGD_GROUP = {"predictor": ParamGroup("moe/predictor/")}


@pytest.fixture(scope="module")
def world():
    """A policy, its optimizer, and a batch of its own making, with features."""
    params = tiny.make_params()
    optimizer = tiny.make_optimizer(params)
    batch = tiny.blank_batch()
    scores = tiny.score(params, batch, tiny.response_places(batch))
    return params, optimizer, tiny.as_behavior(batch, scores)


def build(optimizer, replay, model=MODEL, **settings):
    cfg = tiny.rl_config(**settings)
    return tiny.fast(make_mini_step(model, cfg, replay, optimizer, donate=False))


@pytest.fixture(scope="module")
def pr2_step(world):
    return build(world[1], PR2)


# Plain SGD at rate 1 shows the gradient as the difference of the parameters; every term is on.
TERMS = {"kl_coef": 0.1, "entropy_coef": 0.01, "z_coef": 0.01, "aggregation": "sequence_mean"}


@pytest.fixture(scope="module")
def sgd(world):
    """(optimizer, {rows of a micro-batch: mini-step})."""
    optimizer = tiny.make_optimizer(
        world[0], optimizer="sgd", learning_rate=1.0, clip_norm=None, groups=SGD_GROUP
    )
    margin = dataclasses.replace(PR2, loss_weighting="margin")
    steps = {rows: build(optimizer, margin, micro_batch=rows, **TERMS) for rows in (8, 2)}
    return optimizer, steps


def with_fillers(batch):
    """The batch with its last two rows made fillers, and a reference policy."""
    real = np.arange(tiny.ROWS) < tiny.ROWS - 2
    batch = take_rows(batch, np.arange(tiny.ROWS), real)
    return batch.replace(ref_logprobs=batch.old_logprobs - 0.1)


def moved(params, size, seed=7):
    """The parameters after a step of someone else: all that learns but W_p perturbed."""
    rng = np.random.default_rng(seed)
    stands = lambda p: "predictor" in p or "selection_bias" in p
    push = lambda p, x: x if stands(p) else x + size * rng.normal(size=x.shape)
    return map_with_path(lambda p, x: jnp.asarray(push(p, x), jnp.float32), params)


def assert_same(a, b, but=()):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path in a:
        if not any(x in path for x in but):
            np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.slow
def test_micro_batched_gradient_is_the_full_gradient(world, sgd):
    """4 micro-batches of 2 (the last one all filler) against one of 8."""
    params, _, batch = world
    optimizer, steps = sgd
    batch = with_fillers(batch)
    start = tiny.make_state(moved(params, 0.02), optimizer)
    full, full_metrics = steps[8](start, split_micro(batch, 8), True)
    micro, micro_metrics = steps[2](start, split_micro(batch, 2), True)
    before, other = leaves(start.params), leaves(micro.params)
    for path, after in leaves(full.params).items():
        size = np.abs(after - before[path]).max()
        assert size > 0, path
        tolerance = 2e-6 * max(size, np.abs(after).max())
        np.testing.assert_allclose(other[path], after, rtol=0, atol=tolerance, err_msg=path)
    assert full_metrics.keys() == micro_metrics.keys()
    for name in full_metrics.keys() - {"load_balance"}:  # a product of means: by micro-batch
        a, b = value(full_metrics, name), value(micro_metrics, name)
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-6, err_msg=name)


def test_gradient_against_finite_differences(world, sgd):
    """The step's own update against central differences of the loss as written on paper."""
    params, _, batch = world
    optimizer, steps = sgd
    batch = with_fillers(batch)
    start = tiny.make_state(moved(params, 0.02), optimizer)
    after, metrics = steps[2](start, split_micro(batch, 2), False)
    rng = np.random.default_rng(5)
    way = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), start.params)
    before, new = leaves(start.params), leaves(after.params)
    own = sum(np.sum(np.float64(before[p] - new[p]) * w) for p, w in leaves(way).items())

    @tiny.fast
    def run(params):
        args = (batch.tokens, batch.positions, batch.segment_ids)
        out = forward(params, *args, cfg=MODEL, routes=batch.routes, record=Record())
        logits = jnp.dot(out.hidden, params["embed"]["table"].T, precision="highest")
        return jax.nn.log_softmax(logits), out.router.logits

    def loss(size):
        shifted = jax.tree.map(lambda x, w: x + size * w, start.params, way)
        logp, router = (np.asarray(x, np.float64) for x in run(shifted))
        total, sequences = 0.0, np.flatnonzero(batch.loss_mask.any(1))
        for b in sequences:
            places = np.flatnonzero(batch.loss_mask[b])
            for t in places:
                new = logp[b, t - 1, batch.tokens[b, t]]
                r, a = np.exp(new - batch.old_logprobs[b, t]), batch.advantages[b]
                ref = batch.ref_logprobs[b, t] - new
                entropy = -np.sum(np.exp(logp[b, t - 1]) * logp[b, t - 1])
                term = -min(r * a, np.clip(r, 0.8, 1.28) * a)
                term += 0.1 * (np.exp(ref) - 1 - ref) - 0.01 * entropy
                total += term / len(places) / len(sequences)
        real = np.asarray(batch.segment_ids) > 0
        z = np.log(np.sum(np.exp(router[:, real]), axis=-1)) ** 2
        return total + 0.01 * z.mean()

    np.testing.assert_allclose(value(metrics, "loss"), loss(0.0), rtol=1e-5)
    eps = 3e-4  # larger crosses the kinks of the clip, smaller drowns in fp32
    np.testing.assert_allclose(own, (loss(eps) - loss(-eps)) / (2 * eps), rtol=1e-3)


@pytest.mark.parametrize("mode", ["r3", "pr2"])
def test_ratio_is_one_at_mini_step_1(mode, pr2_step):
    """Routed live with a shifted selection (pr2) or not (r3), replayed without: one policy."""
    params = tiny.make_params(predictor=0.3)
    optimizer = tiny.make_optimizer(params)
    cfg = ReplayConfig(mode=mode, feature_tokens=tiny.LENGTH)
    state = tiny.make_state(params, optimizer)
    shift = selection_shift(plan(cfg), params, MODEL, optimizer.cfg, state.opt_state)
    batch = tiny.blank_batch()
    args = (batch.tokens, batch.positions, batch.segment_ids)

    @tiny.fast
    def live(params, shift):
        out = forward(params, *args, cfg=MODEL, shift=shift)
        logp = jax.nn.log_softmax(out.hidden @ params["embed"]["table"].T)
        return out.routes, logp

    (routes, logp), (plain, _) = live(params, shift), live(params, None)
    assert np.any(np.asarray(routes) != plain) == (mode == "pr2")
    rows = np.arange(tiny.ROWS)[:, None]
    found = np.pad(np.asarray(logp)[rows, np.arange(9), batch.tokens[:, 1:]], ((0, 0), (1, 0)))
    found = found * batch.loss_mask
    batch = batch.replace(routes=np.asarray(routes), old_logprobs=found, behavior_logprobs=found)
    if mode == "pr2":
        places = tiny.response_places(batch)
        batch = batch.replace(features=tiny.score(params, batch, places).features)
        step = pr2_step
    else:
        frozen = tiny.make_optimizer(params, trainable=FROZEN_ROUTER)
        state = tiny.make_state(params, frozen)
        step = build(frozen, R3, micro_batch=8)
    after, metrics = step(state, split_micro(batch, 8), False)
    for name in ("ratio_min", "ratio_mean", "ratio_max", "ratio_ess"):
        np.testing.assert_allclose(value(metrics, name), 1.0, atol=1e-5, err_msg=name)
    for name in ("behavior/abs", "old/abs_max", "clip_low", "clip_high"):
        assert value(metrics, name) <= 1e-5
    if mode == "pr2":
        assert value(metrics, "zero_deviation") < 1.0
        assert value(metrics, "flips") == 0.0  # un-shifted, old and now are one router
    else:
        assert value(metrics, "zero_deviation") == 1.0
        # The sixth baseline, a frozen router, is one line of the optimizer's configuration.
        before = leaves(params)
        for path, x in leaves(after.params).items():
            stands = "router" in path or "predictor" in path
            assert np.array_equal(x, before[path]) == stands, path


@pytest.mark.slow
def test_predictor_changes_no_other_parameter(world, pr2_step):
    params, optimizer, batch = world
    state = tiny.make_state(moved(params, 0.05), optimizer)
    split = split_micro(batch, 8)
    (on, _), (off, _) = pr2_step(state, split, True), pr2_step(state, split, False)
    assert_same(on.params, off.params, but=("predictor",))
    assert_same(on.opt_state.groups["default"], off.opt_state.groups["default"])
    for path, w_p in leaves(on.params, "predictor").items():
        assert np.any(w_p != leaves(off.params)[path])
    # And the policy's moved: equality above is not that of two things standing still.
    assert all(
        np.any(x != leaves(state.params)[p]) for p, x in leaves(on.params, "router/kernel").items()
    )


def test_inactive_predictor_is_bit_unchanged_with_momentum_in_it(world, pr2_step):
    """A zero gradient would not do: momentum moves parameters. Moments and count stand too."""
    params, optimizer, batch = world
    split = split_micro(batch, 8)
    warm, _ = pr2_step(tiny.make_state(moved(params, 0.05), optimizer), split, True)
    assert all(np.any(w != 0) for w in leaves(warm.params, "predictor").values())
    assert any(np.any(m != 0) for m in leaves(warm.opt_state.groups["predictor"], "mu").values())
    after, metrics = pr2_step(warm, split, False)
    assert value(metrics, "predictor_loss") > 0  # measured all the same
    same = leaves(warm.params, "predictor")
    for path, w_p in leaves(after.params, "predictor").items():
        np.testing.assert_array_equal(w_p, same[path])
    assert_same(after.opt_state.groups["predictor"], warm.opt_state.groups["predictor"])
    assert int(after.step) == int(warm.step) + 1


def test_one_mini_step_a_batch_leaves_w_p_zero(world, pr2_step):
    params, optimizer, batch = world
    state = tiny.make_state(params, optimizer)
    for _ in range(3):  # on-policy: every mini-step is the first of its batch
        state, _ = pr2_step(state, split_micro(batch, 8), False)
    for w_p in leaves(state.params, "predictor").values():
        assert not np.any(w_p)


def test_at_zero_w_p_routes_are_the_live_ones(world):
    params, optimizer, batch = world
    state = tiny.make_state(params, optimizer)
    shift = selection_shift(plan(PR2), params, MODEL, optimizer.cfg, state.opt_state)
    assert not np.any(shift)
    args = (batch.tokens, batch.positions, batch.segment_ids)
    live = tiny.fast(lambda p, s: forward(p, *args, cfg=MODEL, shift=s))
    a, b = live(params, shift), live(params, None)
    np.testing.assert_array_equal(a.routes, b.routes)
    np.testing.assert_array_equal(a.hidden, b.hidden)


def test_predictor_learns_the_drift(world, pr2_step):
    """Against a policy that moved, its loss falls. Without advantages nothing else is trained."""
    params, optimizer, batch = world
    drifted = moved(params, 0.05)
    state = tiny.make_state(drifted, optimizer)
    batch = split_micro(batch.replace(advantages=np.zeros(tiny.ROWS, np.float32)), 8)
    seen = []
    for _ in range(30):
        state, metrics = pr2_step(state, batch, True)
        seen.append(value(metrics, "predictor_loss"))
    assert seen[-1] < 0.8 * seen[0]
    layers = sum(value(metrics, f"predictor_loss/layer_{i}") for i in range(tiny.L))
    np.testing.assert_allclose(layers, seen[-1], rtol=1e-5)
    assert_same(state.params, drifted, but=("predictor",))


@pytest.mark.slow
def test_with_lookahead_the_predictor_learns_what_it_leaves(world, sgd):
    """Loss, W_p's gradient and the shift's size in float64; flips stay on un-shifted logits."""
    params, optimizer, batch = world
    rng = np.random.default_rng(4)
    draw = lambda size: jnp.asarray(size * rng.normal(size=(tiny.L, tiny.D, E)), jnp.float32)
    ahead, w_p = draw(0.2), draw(0.1)
    start = map_with_path(lambda p, x: w_p if "predictor" in p else x, moved(params, 0.05))
    cfg = ReplayConfig(
        mode="pr2+lookahead",
        feature_tokens=tiny.LENGTH,
        depth_gate="linear",
        depth_floor=0.5,
    )
    gates = np.array([1.0, 0.5])[:, None, None]
    optimizer, steps = sgd
    state = tiny.make_state(start, optimizer)
    step = build(optimizer, cfg, micro_batch=4)
    with pytest.raises(ValueError, match="lookahead"):
        step(state, split_micro(batch, 4), True)
    given = batch.replace(shift=gates.astype(np.float32) * w_p + ahead, lookahead=ahead)
    after, metrics = step(state, split_micro(given, 4), True)

    args = (batch.tokens, batch.positions, batch.segment_ids)
    run = tiny.fast(lambda p: forward(p, *args, cfg=MODEL, routes=batch.routes, record=Record()))
    mask = tiny.response_places(batch)[1]
    now = np.float64(run(start).router.logits)[:, mask]
    old = np.float64(batch.features.logits)[:, mask]
    h = np.asarray(batch.features.inputs, np.float64)[:, mask]
    push = h @ (gates * np.float64(w_p) + np.float64(ahead))
    softmax = lambda x: np.exp(x - np.log(np.exp(x).sum(-1, keepdims=True)))
    teacher, student = softmax(now), softmax(old + push)
    loss = np.sum(teacher * np.log(teacher / student), axis=-1).mean(1)
    np.testing.assert_allclose(value(metrics, "predictor_loss"), loss.sum(), rtol=1e-4)
    grad = gates * np.einsum("ltd,lte->lde", h, student - teacher) / mask.sum()
    (new,) = leaves(after.params, "predictor").values()
    np.testing.assert_allclose(np.asarray(w_p) - new, grad, atol=2e-6)
    ratio = np.linalg.norm(push, axis=-1) / np.linalg.norm(old, axis=-1)
    np.testing.assert_allclose(value(metrics, "shift_ratio"), ratio.mean(), rtol=1e-5)
    _, plain = steps[8](state, split_micro(batch.replace(ref_logprobs=batch.old_logprobs), 8), True)
    assert value(metrics, "flips") == value(plain, "flips") > 0.0
    assert "shift_ratio" not in plain


def test_forced_routes_under_a_perturbed_router(world, sgd):
    """60% of live routes flipped: the log is replayed to the letter, and the router learns."""
    params, _, batch = world
    rng = np.random.default_rng(1)

    def perturb(path, x):
        noise = jnp.asarray(rng.normal(size=x.shape), jnp.float32) * 0.25
        return x + 0.6 * noise if "router/kernel" in path else x

    drifted = map_with_path(perturb, params)
    args = (batch.tokens, batch.positions, batch.segment_ids)
    live = tiny.fast(lambda p: forward(p, *args, cfg=MODEL).routes)(drifted)
    real = np.asarray(batch.segment_ids) > 0
    same = np.sort(live, -1) == np.sort(batch.routes, -1)
    assert 0.5 < 1 - same.all(-1)[:, real].mean() < 0.7
    run = tiny.fast(lambda p, r: forward(p, *args, cfg=MODEL, routes=r, diagnostics=True))
    out = run(drifted, batch.routes)
    np.testing.assert_array_equal(out.routes, batch.routes)
    optimizer, steps = sgd
    state = tiny.make_state(drifted, optimizer)
    batch = batch.replace(ref_logprobs=batch.old_logprobs)
    after, metrics = steps[8](state, split_micro(batch, 8), False)
    for path, w_r in leaves(after.params, "router/kernel").items():
        for layer in range(len(w_r)):
            assert np.abs(w_r[layer] - leaves(drifted)[path][layer]).max() > 1e-4
    # The logged sets against the live top-k at the tokens that predict responses, by hand.
    mask = tiny.response_places(batch)[1]
    top = np.asarray(out.router.agreement)[:, mask]
    np.testing.assert_allclose(
        value(metrics, "zero_deviation"), (top == K).all(0).mean(), rtol=1e-6
    )
    np.testing.assert_allclose(value(metrics, "agreement"), top.mean() / K, rtol=1e-6)


@pytest.mark.parametrize("broken", ["loss", "predictor"])
def test_a_non_finite_step_changes_nothing_and_is_counted(world, pr2_step, broken):
    params, optimizer, batch = world
    state = tiny.make_state(moved(params, 0.02), optimizer)
    if broken == "loss":
        bad = batch.replace(advantages=np.where(np.arange(8) == 3, np.nan, batch.advantages))
    else:
        inputs = batch.features.inputs.at[0, 0, tiny.PROMPT].set(jnp.nan)
        bad = batch.replace(features=batch.features.replace(inputs=inputs))
    bad = split_micro(bad, 8)
    after, metrics = pr2_step(state, bad, True)
    assert value(metrics, "skipped") == 1.0
    assert (int(after.skipped), int(after.skipped_in_row), int(after.step)) == (1, 1, 0)
    assert_same(after.params, state.params)
    assert_same(after.opt_state, state.opt_state)
    if broken == "predictor":  # a predictor that stands still cannot spoil the step
        after, metrics = pr2_step(after, bad, False)
        assert value(metrics, "skipped") == 0.0
        assert (int(after.skipped), int(after.skipped_in_row), int(after.step)) == (1, 0, 1)


@pytest.mark.slow
def test_selection_bias():
    """It moves by the experts' load alone, and the flips are measured by the rule that has it."""
    moe = dataclasses.replace(MODEL.moe, score="sigmoid", selection_bias=True)
    model = dataclasses.replace(MODEL, moe=moe)
    params = tiny.make_params(model)
    optimizer = tiny.make_optimizer(params, weight_decay=0.5, no_decay="^$")
    batch = tiny.blank_batch()
    scorer = tiny.make_scorer(model, temperature=1.0)
    scores = tiny.score(params, batch, tiny.response_places(batch), scorer=scorer)
    batch = tiny.as_behavior(batch, scores)
    state = tiny.make_state(moved(params, 0.1), optimizer)
    step = build(optimizer, R3, model, bias_update_rate=0.01, micro_batch=4)
    after, metrics = step(state, split_micro(batch, 4), False)
    real = np.asarray(batch.segment_ids) > 0
    (old,) = leaves(state.params, "selection_bias").values()
    (new,) = leaves(after.params, "selection_bias").values()
    for layer in range(tiny.L):
        load = np.bincount(batch.routes[layer][real].ravel(), minlength=tiny.E)
        want = old[layer] + 0.01 * np.sign(load.mean() - load)
        np.testing.assert_allclose(new[layer], want, rtol=1e-6)
    # r3's log is the un-shifted old route, so both ways of measuring it must agree.
    used, unshifted = (value(metrics, f"{k}_zero_deviation") for k in ("paired", "old_route"))
    assert used == unshifted == value(metrics, "zero_deviation") < 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "moe", [None, dataclasses.replace(MODEL.moe, predictor=False)], ids=["dense", "no predictor"]
)
def test_default_settings_train_a_model_without_a_predictor(moe):
    model = dataclasses.replace(MODEL, moe=moe)
    params = tiny.make_params(model)
    given = RLConfig().optim
    with pytest.raises(ConfigError, match="groups.predictor"):
        build_optimizer(given, params)
    optimizer = build_optimizer(policy_optim(given, model), params)
    assert policy_optim(given, MODEL) == given
    mode = ReplayConfig(mode="off", feature_tokens=0)
    state = tiny.make_state(params, optimizer)
    after, metrics = build(optimizer, mode, model)(state, split_micro(tiny.blank_batch(), 8), True)
    assert value(metrics, "skipped") == 0.0
    assert all(np.any(x != leaves(params)[p]) for p, x in leaves(after.params, "kernel").items())


@pytest.mark.slow
def test_sharded_step_is_the_local_step(world):
    """Four devices (data 2 x fsdp 2) against one, by SGD at rate 1."""
    params, _, batch = world
    optimizer = tiny.make_optimizer(params, optimizer="sgd", learning_rate=1.0, clip_norm=None)
    start = moved(params, 0.02)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    shardings = param_shardings(param_specs(MODEL), mesh)
    results = []
    for where, tree in ((None, start), (mesh, jax.device_put(start, shardings))):
        cfg = tiny.rl_config(micro_batch=4)
        step = make_mini_step(MODEL, cfg, PR2, optimizer, mesh=where, donate=False)
        split = put_batch(split_micro(batch, 4), where)
        results.append(step(create(tree, optimizer), split, True))
    (local, metrics), (sharded, others) = results
    for path, x in leaves(local.params).items():
        np.testing.assert_allclose(leaves(sharded.params)[path], x, atol=5e-6, err_msg=path)
    for name in metrics:
        np.testing.assert_allclose(value(others, name), value(metrics, name), rtol=1e-4, atol=2e-6)


def test_what_a_mode_needs_is_asked_for(world):
    params, optimizer, batch = world
    bare = tiny.make_optimizer(params, groups={})
    with pytest.raises(ConfigError, match="groups"):
        make_mini_step(MODEL, tiny.rl_config(), PR2, bare)
    with pytest.raises(ConfigError, match="bias_update_rate"):
        make_mini_step(MODEL, tiny.rl_config(bias_update_rate=0.1), R3, optimizer)
    step = build(optimizer, PR2)
    state = tiny.make_state(params, optimizer)
    with pytest.raises(ValueError, match="routes"):
        step(state, split_micro(batch.replace(routes=None), 8), True)
    with pytest.raises(ValueError, match="features"):
        step(state, split_micro(batch.replace(features=None), 8), True)
