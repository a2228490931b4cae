"""A tiny MoE, rollouts of it made without the sampler, and what the learner's tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from pr2jax.core.optim import OptimConfig, ParamGroup, build_optimizer
from pr2jax.core.state import create
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.models.transformer import param_specs
from pr2jax.rl.batch import split_micro
from pr2jax.rl.scoring import make_scorer
from pr2jax.rl.types import LearnerBatch, RLConfig

ROWS, LENGTH, PROMPT = 8, 10, 3
MODEL = ModelConfig(
    vocab_size=13,
    d_model=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    dense_dim=16,
    moe=MoEConfig(num_experts=8, top_k=2, expert_dim=16),
)
L, E, K, D = 2, 8, 2, 16


def make_params(model=MODEL, seed=0, predictor=0.0):
    """Random parameters of unit-scale logits; W_p of standard deviation `predictor`."""
    rng = np.random.default_rng(seed)

    def draw(path, spec):
        name = path[-1].key
        noise = rng.normal(size=spec.shape)
        if name == "scale":
            return 1 + 0.1 * noise
        if "predictor" in str(path):
            return predictor * noise
        return noise * (1.0 if name == "table" else spec.shape[-2] ** -0.5)

    tree = jax.tree_util.tree_map_with_path(draw, param_specs(model))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def make_optimizer(params, **settings):
    defaults = {"learning_rate": 3e-3, "clip_norm": 1.0}
    groups = {"predictor": ParamGroup("moe/predictor/", lr_multiplier=10.0, clip_norm=1.0)}
    cfg = OptimConfig(**(defaults | {"groups": groups} | settings))
    return build_optimizer(cfg, params)


def make_state(params, optimizer):
    return create(jax.tree.map(jnp.copy, params), optimizer)


def blank_batch(seed=0, rows=ROWS):
    """Tokens, lengths, masks and advantages; old log-probs are still to be scored."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(PROMPT + 2, LENGTH + 1, rows).astype(np.int32)
    lengths[0] = LENGTH
    steps = np.arange(LENGTH)
    mask = (steps >= PROMPT) & (steps < lengths[:, None])
    zeros = np.zeros((rows, LENGTH), np.float32)
    return LearnerBatch(
        tokens=rng.integers(0, MODEL.vocab_size, (rows, LENGTH)).astype(np.int32),
        lengths=lengths,
        loss_mask=mask.astype(np.float32),
        old_logprobs=zeros,
        behavior_logprobs=zeros,
        ref_logprobs=None,
        advantages=rng.normal(size=rows).astype(np.float32),
        routes=None,
        features=None,
    )


def response_places(batch):
    """(positions, mask) of every input that predicts a response token."""
    mask = np.pad(batch.loss_mask[:, 1:], ((0, 0), (0, 1))) > 0
    return np.broadcast_to(np.arange(LENGTH, dtype=np.int32), mask.shape), mask


SCORER = make_scorer(MODEL, temperature=1.0)


def score(params, batch, places=None, micro=ROWS, scorer=SCORER):
    split = lambda x: x.reshape(-1, micro, x.shape[-1])
    places = None if places is None else tuple(split(x) for x in places)
    return scorer(params, split_micro(batch, micro), places)


def as_behavior(batch, scores, keep_routes=True):
    """The batch as if `scores` had been found while it was sampled."""
    logp = np.asarray(scores.logprobs) * batch.loss_mask
    return batch.replace(
        old_logprobs=logp,
        behavior_logprobs=logp,
        routes=np.asarray(scores.routes) if keep_routes else None,
        features=scores.features,
    )


def fast(fn):
    """Jitted with little optimisation: these tests compile far longer than they run."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def rl_config(**settings):
    defaults = {"prompts_per_batch": 4, "samples_per_prompt": 2, "mini_steps": 1, "micro_batch": 8}
    return RLConfig(**(defaults | settings))


def value(metrics, name):
    return float(metrics[name][0] / metrics[name][1])


def leaves(tree, pattern=""):
    """{path: array} of the leaves whose path holds `pattern`."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    name = lambda p: jax.tree_util.keystr(p, simple=True, separator="/")
    return {name(p): np.asarray(x) for p, x in flat if pattern in name(p)}
