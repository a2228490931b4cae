"""Rollouts against a full forward without a cache, and against each other."""

import dataclasses

import jax
import numpy as np
import pytest

from pr2jax.core import rng
from pr2jax.core.params import init_params
from pr2jax.core.sharding import MeshConfig, make_mesh, param_shardings
from pr2jax.models.config import MLAConfig
from pr2jax.models.predictor import reservoir_positions
from pr2jax.models.transformer import param_specs
from pr2jax.sampler.programs import ladder
from pr2jax.sampler.types import FINISH_LENGTH, FINISH_STOP, SamplerConfig, SamplingParams

KEY = rng.root(7)
PLAIN = SamplingParams(max_tokens=12)


def same_rows(rollout, rows, other):
    """Rows of `rollout` equal those of `other`, to the bit, routes and log-probs included."""
    for name in ("tokens", "lengths", "behavior_logprobs", "finish"):
        np.testing.assert_array_equal(getattr(rollout, name)[rows], getattr(other, name), name)
    np.testing.assert_array_equal(rollout.routes[:, rows], other.routes)


@pytest.fixture(scope="module")
def replaced(world):
    """Three responses to five prompts: 15 requests through 8 slots."""
    return world.one.rollout(world.prompts, 3, PLAIN, key=KEY, policy_version=4)[0]


def test_rollout_layout(world, replaced):
    r = replaced
    assert r.tokens.shape == (15, 28)
    np.testing.assert_array_equal(r.prompt_lengths, np.repeat([5, 16, 1, 9, 12], 3))
    np.testing.assert_array_equal(r.lengths, r.prompt_lengths + 12)
    np.testing.assert_array_equal(r.group_ids, np.repeat(np.arange(5), 3))
    assert (r.finish == FINISH_LENGTH).all()
    for b in range(15):
        n, end = r.prompt_lengths[b], r.lengths[b]
        np.testing.assert_array_equal(r.tokens[b, :n], world.prompts[b // 3])
        np.testing.assert_array_equal(np.flatnonzero(r.loss_mask[b]), np.arange(n, end))
        np.testing.assert_array_equal(np.flatnonzero(r.policy_version[b] == 4), np.arange(n, end))
        assert (r.policy_version[b, :n] == -1).all()
        assert (r.routes[:, b, end - 1 :] == np.arange(2)).all()
    assert r.routes.dtype == np.uint8
    assert len({tuple(t) for t in r.tokens}) == 15


def test_log_probs_and_routes_equal_the_full_forward(world, oracle, replaced):
    np.testing.assert_allclose(replaced.behavior_logprobs, oracle(replaced), atol=1e-4)
    _, live, _ = world.full(replaced.tokens, replaced.lengths)
    valid = np.arange(28) < replaced.lengths[:, None] - 1
    np.testing.assert_array_equal(replaced.routes[:, valid], np.asarray(live)[:, valid])


@pytest.mark.slow
def test_buckets_read_enough_of_the_cache(world, oracle):
    sampler = world.sampler(bucket=14, chunk=5)
    rollout, _ = sampler.rollout(world.prompts, 3, PLAIN, key=KEY)
    np.testing.assert_allclose(rollout.behavior_logprobs, oracle(rollout), atol=1e-4)
    assert sampler.stats["prefill_rows"] == 5
    assert sampler.stats["programs"] <= sampler.programs.bound()


def test_sequences_do_not_depend_on_slot_or_companions(world, replaced):
    # Alone in the batch, and so in another slot, another prefill row, never waiting.
    for i in (1, 3):
        alone, _ = world.one.rollout([world.prompts[i]], 3, PLAIN, key=KEY, request_offset=3 * i)
        same_rows(replaced, slice(3 * i, 3 * i + 3), alone)
    other, _ = world.one.rollout(world.prompts, 3, PLAIN, key=rng.root(8))
    assert (other.tokens != replaced.tokens).any(axis=1).all()


def test_equal_prompts_share_a_prefill_and_one_is_enough_for_16_samples(world):
    sampler = world.sampler(max_prompt=512, max_tokens=2, bucket=514, slots=6)
    prompt = np.random.default_rng(5).integers(0, 24, 512).tolist()
    rollout, _ = sampler.rollout([prompt, list(prompt)], 8, SamplingParams(max_tokens=2), key=KEY)
    assert sampler.stats["prefills"] == sampler.stats["prefill_rows"] == 1
    assert sampler.stats["requests"] == 16
    assert len({tuple(t[512:]) for t in rollout.tokens}) > 8


def test_a_batch_that_fits_takes_few_calls(world):
    before = dict(world.one.stats)
    world.one.rollout(world.prompts[:4], 2, PLAIN, key=KEY)
    made = {k: v - before[k] for k, v in world.one.stats.items()}
    # The first token comes with the fan-out: 11 steps in chunks of 4.
    assert made["prefills"] == made["fan_outs"] == 2
    assert (made["decode_chunks"], made["decode_steps"]) == (3, 11)
    assert made["tokens"] == 8 * 12
    assert made["programs"] == 0


def test_truncated_log_probs_are_of_the_distribution_sampled(world, oracle):
    sampling = SamplingParams(temperature=0.8, top_k=9, top_p=0.9, min_p=0.02, max_tokens=12)
    rollout, _ = world.one.rollout(world.prompts, 3, sampling, key=KEY)
    want = oracle(rollout)
    assert np.isfinite(want).all()
    np.testing.assert_allclose(rollout.behavior_logprobs, want, atol=1e-4)


def test_one_token_comes_from_the_prefill_alone(world, replaced):
    steps = world.one.stats["decode_steps"]
    rollout, _ = world.one.rollout(world.prompts, 3, SamplingParams(max_tokens=1), key=KEY)
    np.testing.assert_array_equal(rollout.lengths, replaced.prompt_lengths + 1)
    last = np.arange(15), replaced.prompt_lengths
    np.testing.assert_array_equal(rollout.tokens[last], replaced.tokens[last])
    assert world.one.stats["decode_steps"] == steps


def test_stop_id_that_is_also_the_pad_id(world, replaced):
    stop, _ = world.one.rollout(
        world.prompts, 3, SamplingParams(max_tokens=12, stop_ids=(0, 5)), key=KEY
    )
    stopped = 0
    for b in range(15):
        n = replaced.prompt_lengths[b]
        response = replaced.tokens[b, n:]
        hits = np.flatnonzero(np.isin(response[:12], (0, 5)))
        end = n + (hits[0] + 1 if len(hits) else 12)
        assert stop.lengths[b] == end
        assert stop.finish[b] == (FINISH_STOP if len(hits) else FINISH_LENGTH)
        np.testing.assert_array_equal(stop.tokens[b, :end], replaced.tokens[b, :end])
        assert (stop.tokens[b, end:] == 0).all()
        stopped += len(hits) > 0
    assert 3 <= stopped < 15


def test_stop_string_ends_at_the_token_that_completes_it(world, replaced, letters, monkeypatch):
    sampler = world.one
    monkeypatch.setattr(sampler, "tokenizer", letters)
    n = replaced.prompt_lengths
    texts = [letters.decode(replaced.tokens[b, n[b] : n[b] + 12]) for b in range(15)]
    # One string over a chunk's end, one within a chunk, in different rows.
    strings = (texts[2][3:6], texts[7][1:3])
    sampling = SamplingParams(max_tokens=12, stop_strings=strings, stop_ids=(23,))
    rollout, features = sampler.rollout(world.prompts, 3, sampling, key=KEY, feature_tokens=5)
    ended = 0
    for b, text in enumerate(texts):
        ends = [text.find(s) + len(s) for s in strings if s in text]
        ends += [text.find("x") + 1] if "x" in text else []
        end = n[b] + min([*ends, 12])
        assert rollout.lengths[b] == end
        np.testing.assert_array_equal(rollout.tokens[b, :end], replaced.tokens[b, :end])
        assert rollout.finish[b] == (FINISH_STOP if ends else FINISH_LENGTH)
        kept = np.asarray(features.positions)[b][np.asarray(features.mask)[b]]
        assert set(kept) <= set(range(n[b], end - 1))
        ended += bool(ends)
    assert 2 <= ended < 15


def test_shift_moves_selection_of_prompt_and_response(world, oracle, replaced):
    shift = np.random.default_rng(6).normal(size=(2, 32, 8)).astype(np.float32) * 0.2
    rollout, _ = world.one.rollout(world.prompts, 3, PLAIN, key=KEY, shift=shift)
    _, want, _ = world.full(rollout.tokens, rollout.lengths, shift=shift)
    _, live, _ = world.full(rollout.tokens, rollout.lengths)
    valid = np.arange(28) < rollout.lengths[:, None] - 1
    np.testing.assert_array_equal(rollout.routes[:, valid], np.asarray(want)[:, valid])
    assert (np.asarray(live)[:, valid] != rollout.routes[:, valid]).mean() > 0.1
    np.testing.assert_allclose(rollout.behavior_logprobs, oracle(rollout), atol=1e-4)
    # PR2 with W_p = 0 is R3.
    same, _ = world.one.rollout(world.prompts, 3, PLAIN, key=KEY, shift=np.zeros_like(shift))
    np.testing.assert_array_equal(same.tokens, replaced.tokens)
    np.testing.assert_array_equal(same.routes, replaced.routes)


def test_recorded_features_are_those_of_the_replayed_forward(world):
    capacity, offset = 5, 100
    rollout, features = world.one.rollout(
        world.prompts, 3, PLAIN, key=KEY, request_offset=offset, feature_tokens=capacity
    )
    inputs = rollout.lengths - 1 - rollout.prompt_lengths
    items, filled = reservoir_positions(inputs, capacity, offset + np.arange(15), max_length=12)
    assert np.asarray(filled).all()
    np.testing.assert_array_equal(features.mask, filled)
    positions = np.asarray(items) + rollout.prompt_lengths[:, None]
    np.testing.assert_array_equal(features.positions, positions)
    _, _, router = world.full(rollout.tokens, rollout.lengths, rollout.routes.astype(np.int32))
    rows = np.arange(15)[:, None]
    np.testing.assert_allclose(
        features.logits, np.asarray(router.logits)[:, rows, positions], atol=1e-4
    )
    want = np.asarray(router.inputs)[:, rows, positions]
    np.testing.assert_allclose(features.inputs.astype(np.float32), want, rtol=2**-8, atol=1e-4)
    assert isinstance(features.inputs, jax.Array)


def test_generate_greedy_equals_argmax_of_full_forwards(world, letters, monkeypatch):
    sampler = world.one
    monkeypatch.setattr(sampler, "tokenizer", letters)
    sampling = SamplingParams(greedy=True, max_tokens=6, stop_ids=(20,))
    made = sampler.generate(["abcdef", "q"], sampling, n=2)
    for prompt, (first, second) in zip(("abcdef", "q"), made, strict=True):
        tokens = np.zeros((15, 28), np.int32)  # rows as in the other tests: one program
        ids = letters.encode(prompt)
        for _ in range(6):
            tokens[0, : len(ids)] = ids
            out, _, _ = world.full(tokens, np.full(15, len(ids), np.int32))
            ids.append(int(np.argmax(out[0, len(ids) - 1])))
            if ids[-1] == 20:
                break
        want = ids[len(prompt) :]
        assert first.tokens == second.tokens == want
        assert first.finish == ("stop" if want[-1] == 20 else "length")
        assert first.text == letters.decode([t for t in want if t != 20])
        assert len(first.logprobs) == len(want)


def test_generate_repeats_by_seed_in_any_batch(world):
    prompts, sampling = world.prompts[:3], SamplingParams(max_tokens=8)
    batch = world.one.generate(prompts, sampling, n=2, seeds=[3, 4, 5])
    alone = world.one.generate(prompts[1:2], sampling, n=2, seeds=[4])
    assert alone[0] == batch[1]
    assert batch[0][0].text is None
    assert world.one.generate(prompts[1:2], sampling, n=2, seeds=[9])[0] != batch[1]


@pytest.mark.parametrize(
    "prompts, n, settings, message",
    [
        ([[1], list(range(17))], 1, {}, r"prompts\[1\] has 17 tokens.*max_prompt=16"),
        ([[1], []], 1, {}, r"prompts\[1\] is empty"),
        ([], 1, {}, "prompts: none"),
        ([[1, 24]], 1, {}, r"prompts\[0\]: token 24 .* vocabulary of 24"),
        ([[1]], 0, {}, "n: need at least 1"),
        ([[1]], 1, {"max_tokens": 13}, "max_tokens: 13 .*max_tokens=12"),
        ([[1]], 1, {"temperature": 0.0}, "temperature: must be > 0"),
        ([[1]], 1, {"top_p": 1.5}, "top_p"),
        ([[1]], 1, {"stop_ids": (99,)}, "stop_ids: 99"),
        ([[1]], 1, {"stop_strings": ("x",)}, "stop_strings: need .* tokenizer"),
    ],
)
def test_one_clear_error(world, prompts, n, settings, message):
    with pytest.raises(ValueError, match=message):
        world.one.rollout(prompts, n, SamplingParams(**{"max_tokens": 4, **settings}), key=KEY)


def test_text_without_a_tokenizer_and_bad_shapes(world):
    with pytest.raises(ValueError, match="prompts: text needs .* tokenizer"):
        world.one.generate(["abc"])
    with pytest.raises(ValueError, match="slots: must be >= 1"):
        world.sampler(slots=0)
    with pytest.raises(ValueError, match="seeds: 1 for 2"):
        world.one.generate([[1], [2]], PLAIN, seeds=[1])


@pytest.mark.slow
def test_data_parallel_slots(world, oracle):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    config = dataclasses.replace(world.one.config, chunk=12)
    sampler = type(world.one)(world.cfg, config, params=world.params, mesh=mesh)
    rollout, features = sampler.rollout(world.prompts, 3, PLAIN, key=KEY, feature_tokens=4)
    np.testing.assert_allclose(rollout.behavior_logprobs, oracle(rollout), atol=1e-4)
    cache = sampler._state.cache.k
    assert {s.data.shape for s in cache.addressable_shards} == {(3, 2, 2, 28, 8)}
    assert np.asarray(features.mask).all()
    odd = SamplerConfig(slots=6, max_prompt=16, max_tokens=12)
    with pytest.raises(ValueError, match="slots: 6"):
        type(world.one)(world.cfg, odd, params=world.params, mesh=mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [{"expert": 4}, pytest.param({"fsdp": 2, "expert": 2}, marks=pytest.mark.slow)]
)
def test_expert_parallel_tokens_and_routes_are_one_devices(world, oracle, axes):
    """Weights come off the learner's layout; experts are spread over every device for decode."""
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[:4])
    placed = jax.device_put(world.params, param_shardings(param_specs(world.cfg), mesh))
    config = dataclasses.replace(world.one.config, slots=12, prefill_rows=3)
    sampler = type(world.one)(world.cfg, config, params=placed, mesh=mesh)
    rollout, features = sampler.rollout(world.prompts, 3, PLAIN, key=KEY, feature_tokens=4)
    alone, own = world.one.rollout(world.prompts, 3, PLAIN, key=KEY, feature_tokens=4)
    np.testing.assert_array_equal(rollout.tokens, alone.tokens)
    np.testing.assert_array_equal(rollout.routes, alone.routes)
    np.testing.assert_allclose(rollout.behavior_logprobs, oracle(rollout), atol=1e-4)
    np.testing.assert_allclose(features.logits, own.logits, atol=1e-4)
    experts = sampler.programs.prepare(placed)["segment_1"]["block_0"]["moe"]["experts"]["gate"]
    shapes = {s.data.shape[1] for s in experts.addressable_shards}
    assert shapes == {world.cfg.moe.num_experts // 4}


@pytest.mark.slow
def test_latents_on_a_mesh_give_one_devices_tokens_and_routes(world):
    mla = MLAConfig(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    cfg = dataclasses.replace(world.cfg, mla=mla, qk_norm="none")
    params = init_params(param_specs(cfg), rng.root(1))
    config = dataclasses.replace(world.one.config, slots=12, prefill_rows=3)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2), jax.devices()[:4])
    placed = jax.device_put(params, param_shardings(param_specs(cfg), mesh))
    rollouts = [
        type(world.one)(cfg, config, params=p, mesh=m).rollout(world.prompts, 3, PLAIN, key=KEY)[0]
        for p, m in ((params, None), (placed, mesh))
    ]
    np.testing.assert_array_equal(rollouts[1].tokens, rollouts[0].tokens)
    np.testing.assert_array_equal(rollouts[1].routes, rollouts[0].routes)
    both = [r.behavior_logprobs for r in rollouts]
    np.testing.assert_allclose(both[1], both[0], atol=1e-4)


def test_programs_are_counted_as_compiled(world):
    p = world.one.programs
    jitted = (p._prefill, p._fan_out, p._decode)
    assert p.stats["programs"] == sum(f._cache_size() for f in jitted) + 1  # and the read-out


def test_ladder_is_short_and_never_reads_half_in_vain():
    assert ladder(64, 128) == [64, 128]
    assert ladder(64, 40) == [40]
    sizes = ladder(64, 16384)
    assert len(sizes) <= 2 * np.log2(16384 / 64) + 1
    for length in range(1, 16385, 7):
        read = next(s for s in sizes if s >= length)
        assert read <= max(64, 2 * length)
