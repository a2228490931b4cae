"""Operation and parameter counts against the parameter tree and a count by loops."""

import dataclasses

import pytest

from pr2jax.core.params import count_params, map_with_path
from pr2jax.models.config import ModelConfig, MoEConfig, block_specs
from pr2jax.models.flops import active_params, forward_flops, total_params
from pr2jax.models.transformer import param_specs

MOE = MoEConfig(num_experts=8, top_k=2, expert_dim=24, shared_dim=16)
CONFIGS = {
    "dense": ModelConfig(moe=None),
    "moe": ModelConfig(moe=MOE),
    "mixed": ModelConfig(
        num_layers=5,
        first_dense=1,
        moe=dataclasses.replace(MOE, selection_bias=True, predictor=False, score="sigmoid"),
        tie_embeddings=False,
        attention_bias=True,
        attention_out_bias=True,
        qk_norm="full",
        sliding_window=16,
        window_pattern=(True, False),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters(name):
    cfg = CONFIGS[name]
    specs = param_specs(cfg)
    assert total_params(cfg) == count_params(specs)
    active = []

    def count(path, spec):
        size = count_params(spec)
        if "moe/experts" in path:
            size = size * cfg.moe.top_k // cfg.moe.num_experts
        active.append(size)

    map_with_path(count, specs)
    assert active_params(cfg) == sum(active)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("context", [1, 12, 40])
def test_forward_flops_by_hand(name, context):
    """2 operations for each multiply-add of each product, layer by layer, for one token."""
    cfg = CONFIGS[name]
    d, h, g, e = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    total = 2 * d * cfg.vocab_size
    for spec in block_specs(cfg):
        total += 2 * d * h * e + 2 * 2 * d * g * e + 2 * h * e * d  # q, k and v, out
        seen = min(context, spec.window) if spec.window else context
        total += 2 * 2 * h * e * seen  # scores, and their mix of values
        if not spec.moe:
            total += 3 * 2 * d * cfg.dense_dim
            continue
        total += 2 * d * cfg.moe.num_experts
        total += cfg.moe.top_k * 3 * 2 * d * cfg.moe.expert_dim
        total += 3 * 2 * d * cfg.moe.shared_dim
    assert forward_flops(cfg, tokens=7, context=context) == 7 * total
