"""The SFT loss on packed rows against each example by itself; what moves and what does not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core import rng
from pr2jax.core.optim import OptimConfig, build_optimizer
from pr2jax.core.params import init_params
from pr2jax.core.sharding import MeshConfig, make_mesh, param_shardings
from pr2jax.core.state import create
from pr2jax.data.packing import Example, PackedRows, pack
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.models.logprobs import logits
from pr2jax.models.transformer import forward, param_specs, selection_biases
from pr2jax.train.config import SFTConfig
from pr2jax.train.supervised import make_packed_step, packed_loss, place_rows

MODEL = ModelConfig(
    vocab_size=20,
    d_model=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    moe=MoEConfig(num_experts=8, top_k=2, expert_dim=16, score="sigmoid", selection_bias=True),
)
PLAIN = SFTConfig(load_balance_coef=0.0)


@pytest.fixture(scope="module")
def params():
    return init_params(param_specs(MODEL), rng.root(0))


@pytest.fixture(scope="module")
def examples():
    random = np.random.default_rng(0)
    made = []
    for prompt, answer in ((3, 4), (5, 2), (2, 6), (4, 4), (6, 1)):
        tokens = random.integers(0, 20, prompt + answer).tolist()
        made.append(Example(tokens, [0] * prompt + [1] * answer))
    return made


def test_packed_loss_is_the_mean_over_the_targets_of_examples_alone(params, examples):
    rows, _ = pack(examples, 16, pad_id=0)
    assert len(rows.tokens) < len(examples)
    loss_fn = jax.jit(
        lambda p, b: packed_loss(p, b, model=MODEL, cfg=PLAIN, dtype=jnp.float32, mesh=None)
    )
    loss, (metrics, _) = loss_fn(params, rows)
    total, count = 0.0, 0
    alone = jax.jit(lambda p, t: logits(p, _hidden(p, t), MODEL))
    for example in examples:
        tokens = np.array(example.tokens)
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(tokens)] = tokens
        out = np.asarray(alone(params, padded), np.float64)[0]
        logp = out - np.log(np.exp(out).sum(-1, keepdims=True))
        for t in np.flatnonzero(example.loss_mask):
            total, count = total - logp[t - 1, tokens[t]], count + 1
    assert float(loss) == pytest.approx(total / count, rel=1e-5)
    assert float(metrics["loss"][1]) == count == 17
    assert float(metrics["tokens"][0]) == sum(len(e.tokens) for e in examples)


def _hidden(params, tokens):
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return forward(params, tokens, position, jnp.ones_like(tokens), cfg=MODEL).hidden


@pytest.mark.slow
@pytest.mark.parametrize("spread", [False, True])
def test_a_batch_in_parts_is_the_whole_batch(params, spread):
    """Update, loss and counts of 8 rows in 4 parts (by part 2 rows, targets in uneven number),
    on one device and with rows over two; z-loss and biases too, load balancing apart."""
    random = np.random.default_rng(1)
    fields = {
        "tokens": random.integers(0, 20, (8, 16)).astype(np.int32),
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16)).copy(),
        "segment_ids": np.ones((8, 16), np.int32),
        "loss_mask": (random.random((8, 16)) < np.linspace(0.2, 1, 8)[:, None]).astype(np.float32),
    }
    rows = PackedRows(**fields)
    cfg = dataclasses.replace(PLAIN, z_coef=0.25, bias_update_rate=0.125)
    optimizer = build_optimizer(OptimConfig(optimizer="sgd", learning_rate=0.1), params)
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]) if spread else None
    states = []
    for parts in (1, 4):
        step = make_packed_step(
            MODEL, cfg, optimizer, dtype=jnp.float32, mesh=mesh, accumulate=parts
        )
        own = jax.tree.map(jnp.copy, params)
        if spread:
            own = jax.device_put(own, param_shardings(param_specs(MODEL), mesh))
        states.append(step(create(own, optimizer), place_rows(rows, mesh)))
    (one, first), (four, second) = states
    for a, b in zip(jax.tree.leaves(four.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for key in ("loss", "tokens", "router_z", "router_entropy", "grad_norm"):
        values = [float(m[key][0]) / float(m[key][1]) for m in (second, first)]
        assert values[0] == pytest.approx(values[1], rel=1e-5), key


@pytest.mark.slow
def test_router_losses_are_added_and_biases_move_by_their_rule(params, examples):
    rows, _ = pack(examples, 16, pad_id=0)
    cfg = dataclasses.replace(PLAIN, load_balance_coef=0.5, z_coef=0.25, bias_update_rate=0.125)
    optim = OptimConfig(learning_rate=0.0)
    optimizer = build_optimizer(optim, params)
    step = make_packed_step(MODEL, cfg, optimizer, dtype=jnp.float32, mesh=None)
    state, metrics = step(create(jax.tree.map(jnp.copy, params), optimizer), rows)
    whole, (found, load) = jax.jit(
        lambda p, b: packed_loss(p, b, model=MODEL, cfg=cfg, dtype=jnp.float32, mesh=None)
    )(params, rows)
    value = {k: float(s) / float(w) for k, (s, w) in found.items()}
    expected = value["loss"] + 0.5 * value["load_balance"] + 0.25 * value["router_z"]
    assert float(whole) == pytest.approx(expected, rel=1e-6)
    load = np.asarray(load)
    assert load.sum(axis=1) == pytest.approx([2 * value["tokens"]] * 2)
    assert value["load_max"] == pytest.approx((load.max(1) / load.mean(1)).max())
    moved = 0.125 * np.sign(load.mean(axis=1, keepdims=True) - load)
    np.testing.assert_array_equal(selection_biases(state.params, MODEL), moved)
    assert float(metrics["skipped"][0]) == 0.0
