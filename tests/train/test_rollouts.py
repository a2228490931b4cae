"""Gathering batches: which prompts are used, in which order, and what a journal spares.

Sampler and verifiers are stand-ins whose answers are functions of the request, so that a brute
force over the order of prompts says what every batch must hold.
"""

import dataclasses
import types
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core import rng
from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.core.state import TrainState
from pr2jax.data.packing import BatchOrder
from pr2jax.data.tokenizer import TokenizerConfig, build_tokenizer
from pr2jax.models.predictor import RouterFeatures
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.types import RLConfig
from pr2jax.sampler.types import Rollout, SamplingParams
from pr2jax.tasks.base import Problem, Verdict
from pr2jax.train.rollouts import RolloutSource
from tests.train import tiny

WIDTH, LAYERS, K, TOPK = 12, 2, 3, 2
PROBLEMS = [Problem(f"p{i}", f"{i} = ", str(i), "test") for i in range(40)]


def _drawn(request: int) -> int:
    return zlib.crc32(f"request {request}".encode())


def _reward(request: int, hard: int) -> float:
    """1 where the request's draw says so: seldom for a large `hard`."""
    return float(_drawn(request) % hard == 0)


class Sampler:
    """Rows whose every array tells the request they are of; the response is its number."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, []

    def rollout(
        self, prompts, n, sampling, *, params, key, request_offset, policy_version, shift,
        feature_tokens,
    ):  # fmt: skip
        self.calls.append((request_offset, len(prompts)))
        rows = len(prompts) * n
        ids = request_offset + np.arange(rows)
        text = [self.tokenizer.encode(str(i)) for i in ids]
        start = np.array([len(prompts[b // n]) for b in range(rows)], np.int32)
        lengths = start + np.array([len(t) for t in text], np.int32)
        tokens = np.zeros((rows, WIDTH), np.int32)
        for b in range(rows):
            tokens[b, : lengths[b]] = [*prompts[b // n], *text[b]]
        place = np.arange(WIDTH)
        sampled = (place >= start[:, None]) & (place < lengths[:, None])
        group = np.repeat(np.arange(len(prompts), dtype=np.int32), n)
        rollout = Rollout(
            tokens=tokens,
            prompt_lengths=start,
            lengths=lengths,
            loss_mask=sampled.astype(np.float32),
            behavior_logprobs=np.where(sampled, -ids[:, None] / 7, 0).astype(np.float32),
            routes=np.broadcast_to(
                (ids % 251).astype(np.uint8)[None, :, None, None], (LAYERS, rows, WIDTH, TOPK)
            ),
            prompt_ids=group,
            group_ids=group.copy(),
            policy_version=np.where(sampled, np.int32(policy_version), np.int32(-1)),
            finish=(ids % 2).astype(np.int8),
            rewards=np.zeros(rows, np.float32),
            sampling=sampling,
        )
        if not feature_tokens:
            return rollout, None
        features = RouterFeatures(
            positions=jnp.asarray(np.tile(ids[:, None] % 9, (1, K)).astype(np.int32)),
            mask=jnp.asarray(ids[:, None] % 3 == np.arange(K)),
            logits=jnp.asarray(
                np.tile(ids[None, :, None, None] / 3, (LAYERS, 1, K, 4)), jnp.float32
            ),
            inputs=jnp.asarray(
                np.tile(ids[None, :, None, None] / 5, (LAYERS, 1, K, 5)), jnp.bfloat16
            ),
        )
        return rollout, features


class Pool:
    """Scores a response by the request it names."""

    def __init__(self, hard: int):
        self.hard, self.calls, self.stats = (
            hard,
            0,
            dict.fromkeys(("timeouts", "crashes", "memory", "errors"), 0),
        )

    def score_batch(self, items):
        self.calls += 1
        return [Verdict(_reward(int(text), self.hard), f"request {text}") for _, text in items]


def _source(tmp_path, hard=3, mode="off", slots=8, loop=None, **rl) -> RolloutSource:
    small = tiny.config()
    rl = {"prompts_per_batch": 6, "samples_per_prompt": 4, "mini_steps": 2, "micro_batch": 4} | rl
    cfg = dataclasses.replace(
        small,
        rl=RLConfig(**rl, sampling=SamplingParams(max_tokens=4)),
        replay=ReplayConfig(mode=mode, feature_tokens=K),
        sampler=dataclasses.replace(small.sampler, slots=slots),
    )
    tokenizer = build_tokenizer(TokenizerConfig(kind="char", alphabet="0123456789+-= "))
    session = types.SimpleNamespace(
        mesh=None,
        cfg=cfg,
        config_json=dataclasses.asdict(cfg),
        workdir=tmp_path,
        tokenizer=tokenizer,
        sampler=Sampler(tokenizer),
        pool=Pool(hard),
        encode=lambda p: tokenizer.encode(p.prompt),
        check_verifiers=lambda problems: None,
        key=lambda *names: rng.named(rng.root(cfg.seed), *names),
    )
    source = RolloutSource(session, PROBLEMS, cfg.rl.optim)
    source._shifts = lambda params, opt_state: (None, None)  # those have tests of their own
    return source


def _state(value=0.0) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, {"w": jnp.full(3, value)}, {"m": jnp.zeros(3)}, zero, zero)


def _oracle(steps, hard, wanted, n, rounds):
    """Batches by brute force: [(places used, places passed over)] of the order of prompts."""
    place, batches = 0, []
    for _ in range(steps):
        used, passed, at = [], [], place
        while len(used) < wanted and at < place + rounds * wanted:
            scores = {_reward(at * n + j, hard) for j in range(n)}
            (used if len(scores) > 1 else passed).append(at)
            at += 1
        batches.append((used, passed))
        place = at
    return batches


def _ids(places):
    order = BatchOrder(len(PROBLEMS), 1, 0)
    return [PROBLEMS[order.at(i)[0]].id for i in places]


@pytest.mark.parametrize("slots", [8, 12, 24, 64])
@pytest.mark.parametrize(("hard", "mode"), [(2, "off"), (9, "off"), (9, "pr2")])
def test_a_dynamic_batch_is_the_next_prompts_with_a_signal(tmp_path, hard, mode, slots):
    source = _source(tmp_path, hard, mode, slots, dynamic_sampling=True)
    for index, (used, passed) in enumerate(_oracle(6, hard, 6, 4, rounds=9)):
        assert len(used) == 6  # so that the bound plays no part, whatever the rounds' sizes
        source.session.sampler.calls.clear()
        got = source.gather(_state(), index)
        requests = np.concatenate([4 * p + np.arange(4) for p in used])
        assert (source.consumed(index), source.filtered(index)) == (_ids(used), _ids(passed))
        assert (got.consumed, got.filtered) == (_ids(used), _ids(passed))
        assert source.position == max([*used, *passed]) + 1
        # Every array is of the rows it should be, in order.
        rollout = got.rollout
        np.testing.assert_array_equal(rollout.reasons, [f"request {r}" for r in requests])
        np.testing.assert_array_equal(rollout.rewards, [_reward(r, hard) for r in requests])
        np.testing.assert_array_equal(rollout.routes[1, :, 3, 0], requests % 251)
        np.testing.assert_array_equal(rollout.finish, requests % 2)
        np.testing.assert_array_equal(rollout.group_ids, np.repeat(np.arange(6), 4))
        own = [PROBLEMS[i].id for i in rollout.prompt_ids[::4]]
        assert own == _ids(used)
        at = rollout.lengths - 1
        np.testing.assert_allclose(
            rollout.behavior_logprobs[np.arange(24), at], -requests / 7, rtol=1e-6
        )
        assert got.keep.all()
        if mode == "pr2":
            np.testing.assert_array_equal(got.features.positions[:, 0], requests % 9)
            np.testing.assert_array_equal(got.features.mask[:, 1], requests % 3 == 1)
            np.testing.assert_allclose(got.features.logits[1, :, 0, 0], requests / 3, rtol=1e-6)
            assert got.features.inputs.dtype == jnp.bfloat16
        # What was sampled: without gaps, from the batch's first place on.
        calls = source.session.sampler.calls
        first = min([*used, *passed])
        for offset, prompts in calls:
            assert offset == 4 * first
            first += prompts
            assert prompts <= 6
        sampled = sum(p for _, p in calls)
        found = got.metrics
        assert found["dynamic/refills"] == len(calls) - 1
        assert found["dynamic/filtered"] == len(passed)
        assert found["dynamic/surplus"] == sampled - len(used) - len(passed)
        assert found["dynamic/missing"] == 0
        rewards = [_reward(4 * min([*used, *passed]) + r, hard) for r in range(4 * sampled)]
        assert found["reward"] == pytest.approx(np.mean(rewards))
        if mode == "pr2":  # one shape of the features' array, hence no other program
            assert {p for _, p in calls} == {6}
        else:  # a round fills the slots, or is a whole batch
            assert all(p == 6 or p * 4 % slots == 0 for _, p in calls)


def test_a_batch_that_does_not_fill_is_learned_from_as_it_is(tmp_path, caplog):
    source = _source(tmp_path, hard=40, dynamic_sampling=True, max_refills=2)
    place = 0
    for index in range(4):
        with caplog.at_level("WARNING", "pr2jax"):
            got = source.gather(_state(), index)
        sampled = sum(p for _, p in source.session.sampler.calls)
        source.session.sampler.calls.clear()
        places = np.arange(place, place + sampled)
        live = [p for p in places if len({_reward(4 * p + j, 40) for j in range(4)}) > 1]
        assert len(live) < 6
        assert got.metrics["dynamic/refills"] == 2
        assert got.metrics["dynamic/missing"] == 6 - len(live)
        assert got.consumed == _ids(live)
        assert sorted(got.consumed + got.filtered) == sorted(_ids(places))
        assert len(got.rollout.tokens) == 24  # the shape stays
        np.testing.assert_array_equal(got.keep, np.arange(24) < 4 * len(live))
        fill = got.rollout.rewards[~got.keep].reshape(-1, 4)
        assert (fill == fill[:, :1]).all()
        assert f"{len(live)} of 6 groups have a signal after 2 refills" in caplog.text
        place += sampled
        assert source.position == place


def test_without_dynamic_sampling_batches_follow_the_order(tmp_path):
    source = _source(tmp_path)
    whole = BatchOrder(len(PROBLEMS), 6, 0)
    for index in (0, 1, 5, 2):
        got = source.gather(_state(), index)
        assert got.consumed == [PROBLEMS[i].id for i in whole.at(index)]
        assert got.filtered == []
        assert got.keep.all()
        assert source.session.sampler.calls[-1] == (index * 24, 6)
    with pytest.raises(RuntimeError, match="batch 5 is not the last one"):
        source.consumed(5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_journalled_batch_is_neither_sampled_nor_graded_again(tmp_path, dynamic):
    make = lambda: _source(tmp_path, 5, "pr2", dynamic_sampling=dynamic)
    source = make()
    source.open_journal(tmp_path)
    first = [source.gather(_state(i), i) for i in range(3)]
    memory = source.memory()
    again = make()
    again.open_journal(tmp_path)
    for i, old in enumerate(first):
        new = again.gather(_state(i), i)
        for name in ("rollout", "features"):
            a, b = getattr(old, name), getattr(new, name)
            for field in dataclasses.fields(a):
                x, y = getattr(a, field.name), getattr(b, field.name)
                if x is None or isinstance(x, tuple | SamplingParams):
                    assert x == y
                else:
                    assert np.asarray(x).dtype == y.dtype
                    assert np.asarray(x).tobytes() == y.tobytes(), field.name
        assert (old.consumed, old.filtered) == (new.consumed, new.filtered)
        np.testing.assert_array_equal(old.keep, new.keep)
        assert new.metrics == old.metrics | {"journal/replayed": 1.0}
        assert old.metrics["journal/replayed"] == 0.0
        size = (tmp_path / "journal" / f"step_{i:06d}.p0.batch").stat().st_size
        assert new.metrics["journal/bytes"] == old.metrics["journal/bytes"] == size
    assert again.session.sampler.calls == []
    assert again.session.pool.calls == 0
    assert again.memory() == memory
    again.gather(_state(3), 3)
    assert again.session.pool.calls >= 1
    again.trim_journal(3)
    assert again.journal.steps() == [3]


def test_another_policys_journal_is_not_used(tmp_path, caplog):
    source = _source(tmp_path)
    source.open_journal(tmp_path)
    for i in range(3):
        source.gather(_state(i), i)
    # A restored state must have the bits that sampled: entries of other parameters all go.
    other = _source(tmp_path)
    other.open_journal(tmp_path)
    with caplog.at_level("WARNING", "pr2jax"):
        assert other.gather(_state(7.0), 1).metrics["journal/replayed"] == 0
    assert "step_000001.p0.batch was sampled by another policy" in caplog.text
    assert other.journal.steps() == [0, 1]
    # Later on, a learner that does not repeat to the bit is told, and the batch is used.
    later = _source(tmp_path)
    later.open_journal(tmp_path)
    assert later.gather(_state(0.0), 0).metrics["journal/replayed"] == 1
    caplog.clear()
    with caplog.at_level("WARNING", "pr2jax"):
        assert later.gather(_state(7.1), 1).metrics["journal/replayed"] == 1
    assert "not to the bit" in caplog.text
    # Nor are those that other settings sampled.
    changed = _source(tmp_path, clip_high=0.3)
    changed.open_journal(tmp_path)
    assert changed.gather(_state(0.0), 0).metrics["journal/replayed"] == 0


def test_position_comes_back_through_memory(tmp_path):
    source = _source(tmp_path, 9, dynamic_sampling=True)
    batches = [source.gather(_state(), i).consumed for i in range(2)]
    memory = source.memory()
    batches += [source.gather(_state(), i).consumed for i in (2, 3)]
    other = _source(tmp_path, 9, dynamic_sampling=True)
    other.remember(memory)
    assert [other.gather(_state(), i).consumed for i in (2, 3)] == batches[2:]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dynamic_sampling": True, "filter_zero_variance": False}, "dynamic_sampling: replaces"),
        ({"max_refills": 0}, "max_refills: must be >= 1"),
    ],
)
def test_contradictions_are_told(values, said):
    with pytest.raises(ConfigError, match=said):
        from_config_dict(RLConfig, values)
