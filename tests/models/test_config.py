"""How layers fold into segments, layer by layer; what a configuration refuses."""

import dataclasses

import pytest

from pr2jax.core.config import ConfigError
from pr2jax.models.config import (
    ModelConfig,
    MoEConfig,
    RopeScaling,
    block_specs,
    num_moe_layers,
    segments,
)

BASE = ModelConfig(num_layers=6)
STACKS = {
    "equal": (BASE, [(1, 6)]),
    "first_dense": (dataclasses.replace(BASE, first_dense=1), [(1, 1), (1, 5)]),
    "alternate": (dataclasses.replace(BASE, moe_every=2), [(2, 3)]),
    "dense_model": (dataclasses.replace(BASE, moe=None), [(1, 6)]),
    "one_layer": (dataclasses.replace(BASE, num_layers=1), [(1, 1)]),
    "windows": (
        dataclasses.replace(BASE, sliding_window=8, window_pattern=(True, True, False)),
        [(3, 2)],
    ),
    # Seven layers of a three-layer pattern: two whole repeats, and the rest alone.
    "ragged_end": (
        dataclasses.replace(
            BASE, num_layers=7, sliding_window=8, window_pattern=(True, True, False)
        ),
        [(3, 2), (1, 1)],
    ),
    "one_odd_layer": (dataclasses.replace(BASE, dense_layers=(2,)), None),
    "mixed": (
        dataclasses.replace(
            BASE, num_layers=9, first_dense=2, sliding_window=4, window_pattern=(True, False)
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_segments_unfold_to_the_layers(name):
    cfg, expected = STACKS[name]
    layers, moe_seen = [], 0
    for segment in segments(cfg):
        assert segment.first_layer == len(layers)
        assert segment.first_moe == moe_seen
        assert segment.num_moe == segment.repeats * sum(b.moe for b in segment.pattern)
        layers += list(segment.pattern) * segment.repeats
        moe_seen += segment.num_moe
    # The definition, layer by layer.
    for i, block in enumerate(layers):
        is_moe = cfg.moe is not None and i >= cfg.first_dense and i not in cfg.dense_layers
        assert block.moe == (is_moe and (i + 1) % cfg.moe_every == 0)
        windowed = cfg.window_pattern[i % len(cfg.window_pattern)]
        assert block.window == (cfg.sliding_window if windowed else 0)
    assert len(layers) == cfg.num_layers
    assert moe_seen == num_moe_layers(cfg) == sum(b.moe for b in block_specs(cfg))
    if expected is not None:
        assert [(len(s.pattern), s.repeats) for s in segments(cfg)] == expected


@pytest.mark.parametrize(
    "cls,change,message",
    [
        (ModelConfig, {"num_kv_heads": 3}, "num_kv_heads: 3 does not divide"),
        (ModelConfig, {"head_dim": 7}, "head_dim: .* even"),
        (ModelConfig, {"dense_layers": (9,)}, "dense_layers: no layer 9"),
        (ModelConfig, {"vocab_size": -1}, "vocab_size"),
        (ModelConfig, {"num_layers": 0}, "num_layers"),
        (ModelConfig, {"moe_every": 0}, "moe_every"),
        (ModelConfig, {"window_pattern": ()}, "window_pattern"),
        (ModelConfig, {"sliding_window": -1}, "sliding_window"),
        (ModelConfig, {"logprob_chunk": 0}, "logprob_chunk"),
        (MoEConfig, {"top_k": 17}, "top_k: .* num_experts=16"),
        (MoEConfig, {"num_groups": 3}, "num_groups: 3 does not divide"),
        (MoEConfig, {"num_groups": 4, "top_groups": 5}, "top_groups"),
        (MoEConfig, {"num_groups": 8, "top_groups": 1, "top_k": 4}, "fewer experts than top_k"),
        (MoEConfig, {"score": "sigmoid", "normalize": "pre"}, "normalize"),
        (RopeScaling, {"kind": "yarn", "factor": 0.5}, "factor"),
        (RopeScaling, {"kind": "llama3", "factor": 2.0, "high_freq_factor": 1.0}, "high_freq"),
    ],
)
def test_impossible_values_are_named(cls, change, message):
    with pytest.raises(ConfigError, match=message):
        cls(**change).validate()


def test_defaults_are_valid():
    for cls in (ModelConfig, MoEConfig, RopeScaling):
        cls().validate()
