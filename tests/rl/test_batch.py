"""Rollouts to mini-batches: disjoint, whole groups, fixed shapes, masks from lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core.config import ConfigError
from pr2jax.models.predictor import RouterFeatures
from pr2jax.rl import batch as bt
from pr2jax.rl.advantages import zero_variance
from pr2jax.rl.types import RLConfig
from pr2jax.sampler.types import Rollout, SamplingParams
from tests.rl import tiny

L, B, T, K, C, D, E = 2, 16, 12, 2, 3, 4, 8


def make_rollout(seed=0):
    """16 rows in 8 groups of 2; every array tells its row and position."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(2, 4, B).astype(np.int32)
    lengths = (prompts + rng.integers(1, 5, B)).astype(np.int32)
    place = np.arange(T)
    mask = (place >= prompts[:, None]) & (place < lengths[:, None])
    tell = (100 * np.arange(B)[:, None] + place).astype(np.int32)
    return Rollout(
        tokens=tell,
        prompt_lengths=prompts,
        lengths=lengths,
        loss_mask=mask.astype(np.float32),
        behavior_logprobs=(-tell * mask).astype(np.float32),
        routes=rng.integers(0, E, (L, B, T, K)).astype(np.uint8),
        prompt_ids=np.arange(B, dtype=np.int32) // 2,
        group_ids=np.arange(B, dtype=np.int32) // 2 + 5,
        policy_version=np.zeros((B, T), np.int32),
        finish=np.zeros(B, np.int8),
        rewards=np.zeros(B, np.float32),
    )


def make_features():
    row = np.arange(B)
    fill = lambda *tail: np.broadcast_to(row[None, :, *[None] * len(tail)], (L, B, *tail))
    return RouterFeatures(
        positions=np.broadcast_to(row[:, None], (B, C)).astype(np.int32),
        mask=np.ones((B, C), bool),
        logits=jnp.asarray(fill(C, E), jnp.float32),
        inputs=jnp.asarray(fill(C, D), jnp.bfloat16),
    )


def make(features=True):
    rollout = make_rollout()
    advantages = np.arange(B, dtype=np.float32)
    features = make_features() if features else None
    return rollout, bt.make_batch(rollout, advantages, bucket=4, use_routes=True, features=features)


def test_make_batch_cuts_to_the_bucket_and_masks_by_length():
    rollout, batch = make()
    longest = rollout.lengths.max()
    width = batch.tokens.shape[1]
    assert width % 4 == 0
    assert longest <= width < longest + 4
    np.testing.assert_array_equal(batch.routes, rollout.routes[:, :, :width])
    np.testing.assert_array_equal(batch.old_logprobs, rollout.behavior_logprobs[:, :width])
    for b, t in np.ndindex(B, width):
        assert batch.segment_ids[b, t] == (t < rollout.lengths[b])
        assert batch.positions[b, t] == t
    wide = bt.make_batch(rollout, np.zeros(B), bucket=32, use_routes=False)
    assert wide.tokens.shape == (B, 32)
    assert wide.routes is None
    np.testing.assert_array_equal(wide.logged[:, :, :T], rollout.routes)
    with pytest.raises(ValueError, match="no routes"):
        bt.make_batch(rollout.replace(routes=None), np.zeros(B), bucket=4, use_routes=True)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_split_micro_and_back(micro):
    _, batch = make()
    split = bt.split_micro(batch, micro)
    n = B // micro
    for i, r in np.ndindex(n, micro):
        row = i * micro + r
        np.testing.assert_array_equal(split.tokens[i, r], batch.tokens[row])
        np.testing.assert_array_equal(split.routes[i, :, r], batch.routes[:, row])
        np.testing.assert_array_equal(split.features.logits[i, :, r], batch.features.logits[:, row])
    np.testing.assert_array_equal(bt.merge_micro(split.tokens), batch.tokens)
    np.testing.assert_array_equal(bt.merge_micro(split.routes, 1), batch.routes)
    with pytest.raises(ValueError, match="3"):
        bt.split_micro(batch, 3)


@pytest.mark.parametrize("drop", [(), (1,), (0, 1, 2, 5), (0, 1, 2, 3, 4, 5, 7), tuple(range(8))])
def test_off_n_is_disjoint_mini_batches(drop):
    """off-4 of 8 groups: every kept row once, groups whole, shapes alike, the rest fillers."""
    rollout, batch = make()
    rewards = np.tile([0.0, 1.0], 8)
    for g in drop:
        rewards[2 * g : 2 * g + 2] = 1.0
    keep = ~zero_variance(rewards, rollout.group_ids)
    parts = bt.split_mini_batches(batch, rollout.group_ids, keep, mini_steps=4, micro_batch=2)
    assert len(parts) == min(4, 8 - len(drop))
    seen = []
    for part in parts:
        assert part.tokens.shape == (2, 2, batch.tokens.shape[1])
        real = part.lengths > 0
        rows = part.tokens[real][:, 0] // 100
        seen.append(rows)
        assert {r ^ 1 for r in rows} == set(rows)  # both rows of a group
        np.testing.assert_array_equal(part.advantages[real], rows)
        np.testing.assert_array_equal(part.features.positions[real][:, 0], rows)
        assert not np.any(part.loss_mask[~real])
        assert not np.any(part.advantages[~real])
        assert not np.any(part.features.mask[~real])
        flat = real.ravel()
        assert not np.any(flat[1:] & ~flat[:-1])  # fillers stand last
    together = np.concatenate(seen) if seen else []
    np.testing.assert_array_equal(together, np.flatnonzero(keep))


def test_split_mini_batches_refuses_what_does_not_divide():
    rollout, batch = make()
    keep = np.ones(B, bool)
    with pytest.raises(ValueError, match="3 mini-steps"):
        bt.split_mini_batches(batch, rollout.group_ids, keep, mini_steps=3, micro_batch=1)


@pytest.mark.parametrize("tokens", ["response", "all"])
def test_feature_places(tokens):
    prompts = np.array([3, 2, 4, 1], np.int32)
    lengths = np.array([12, 3, 4, 9], np.int32)  # the third has no response
    places, mask = bt.feature_places(prompts, lengths, 5, tokens=tokens, seed=3, max_length=12)
    assert places.shape == mask.shape == (4, 5)
    for row in range(4):
        first = 0 if tokens == "all" else prompts[row] - 1
        allowed = set(range(first, lengths[row] - 1))
        got = places[row][mask[row]]
        assert set(got) <= allowed
        assert len(set(got)) == len(got) == min(5, len(allowed))
    again, _ = bt.feature_places(prompts, lengths, 5, tokens=tokens, seed=4, max_length=12)
    assert np.any(again != places)


def test_put_batch_shards_rows():
    from pr2jax.core.sharding import MeshConfig, make_mesh

    _, batch = make()
    split = bt.split_micro(batch, 8)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    put = bt.put_batch(split, mesh)
    for x, axis in ((put.tokens, 1), (put.routes, 2), (put.features.inputs, 2)):
        shard = x.addressable_shards[0].data
        assert shard.shape[axis] == 1
        assert [a for a in range(x.ndim) if shard.shape[a] != x.shape[a]] == [axis]
    jax.tree.map(np.testing.assert_array_equal, put, jax.tree.map(np.asarray, split))


@pytest.mark.parametrize(
    "settings,key",
    [
        ({"mini_steps": 3}, "mini_steps: 3 does not divide prompts_per_batch=32"),
        ({"micro_batch": 48}, "micro_batch: 48 does not divide the 64 rows"),
        ({"samples_per_prompt": 1}, "samples_per_prompt"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"epochs": 0}, "epochs"),
        (
            {"overlong_buffer": 65},
            "overlong_buffer: 65 tokens are more than",
        ),
        ({"overlong_penalty": 0.5}, "overlong_penalty: 0.5 has no effect with overlong_buffer=0"),
        ({"dual_clip": 0.9}, "dual_clip: must be above 1"),
        ({"dual_clip": 3.0, "surrogate": "cispo"}, "dual_clip: surrogate=cispo"),
        ({"tis_cap": 2.0}, "tis_cap: .* scoring_pass=always, not auto"),
        ({"tis_level": "sequence"}, "tis_level: sequence has no effect with tis_cap=0"),
        ({"kl_estimator": "k1"}, "kl_estimator: k1 has no effect with kl_coef=0"),
        ({"kl_importance": True}, "kl_importance: True has no effect with kl_coef=0"),
        ({"sampling": SamplingParams(top_p=0.9)}, "sampling"),
        ({"sampling": SamplingParams(greedy=True)}, "sampling"),
    ],
)
def test_rl_config_names_the_bad_key(settings, key):
    with pytest.raises(ConfigError, match=key):
        RLConfig(**settings).validate()


def test_rl_config_says_how_sizes_multiply():
    cfg = RLConfig()
    cfg.validate()
    text = cfg.describe()
    assert "32 prompts x 8 samples = 256 rows" in text
    assert "4 mini-steps x 64 rows" in text
    assert "1 micro-batches x 64 rows" in text
    assert tiny.rl_config(micro_batch=2).num_micro == 4
    assert cfg.updates == 4
    assert RLConfig(epochs=3).updates == 12
    assert "3 epochs" in RLConfig(epochs=3).describe()
