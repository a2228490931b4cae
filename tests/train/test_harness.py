"""What lm-evaluation-harness asks of a model, against full logits in float64."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models import logprobs
from pr2jax.models.transformer import forward
from pr2jax.train import harness
from pr2jax.train.session import open_session
from tests.train import tiny

LONGEST = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    cfg = tiny.config(tokenizer=TokenizerConfig(kind="byte"))
    # Sharp enough that the likeliest token is no close call.
    with open_session(cfg, tmp_path_factory.mktemp("run"), jax.devices()[:1]) as session:
        params = jax.tree.map(lambda x: x * 3.0, session.initial_params())
        yield harness.HarnessModel(
            session, params, max_length=LONGEST, max_gen_toks=6, batch_size=4, slots=4
        )


@partial(jax.jit, static_argnames="cfg")
def _logits(params, tokens, cfg):
    positions = jnp.arange(tokens.shape[1])[None]
    out = forward(params, tokens, positions, jnp.ones_like(tokens), cfg=cfg)
    return logprobs.logits(params, out.hidden, cfg)


def log_softmax(model, ids):
    """log p of every next token after each of `ids`, float64; rows are filled up on the right,
    where a causal model does not look."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(ids)] = ids
    x = np.asarray(_logits(model.params, tokens, model.session.cfg.model)[0, : len(ids)])
    x = x.astype(np.float64)
    return x - (x.max(1) + np.log(np.exp(x - x.max(1, keepdims=True)).sum(1)))[:, None]


def by_hand(model, context, continuation):
    table = log_softmax(model, [*context, *continuation][:-1])[len(context) - 1 :]
    values = table[np.arange(len(continuation)), continuation]
    return values.sum(), bool((table.argmax(1) == continuation).all())


def test_loglikelihoods_equal_full_logits(model):
    pairs = [
        ("a context", " and more"),
        ("x", "y"),
        ("", "without a context"),
        ("ends in spaces  ", "here"),
        ("the same length a", "bc"),
    ]
    found = model.loglikelihood(pairs)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        before = list(context.rstrip().encode()) or [model.session.tokenizer.eos_id]
        after = list((context[len(context.rstrip()) :] + continuation).encode())
        want, likeliest = by_hand(model, before, after)
        assert value == pytest.approx(want, abs=2e-4)
        assert greedy == likeliest


@pytest.mark.slow
def test_what_greedy_decoding_gives_is_greedy(model):
    [text] = model.generate_until([("abc", {"max_gen_toks": 3})])
    ids = list(b"abc")
    for _ in range(3):
        ids.append(int(log_softmax(model, ids)[-1].argmax()))
    made = [i for i in ids[3:] if i < 256]
    assert text == bytes(made).decode("utf-8", errors="replace")
    value, greedy = model.score_windows([(list(b"abc"), ids[3:])])[0]
    assert greedy
    assert value == pytest.approx(by_hand(model, list(b"abc"), ids[3:])[0], abs=2e-4)
    other = [ids[3], (ids[4] + 1) % 256]
    assert not model.score_windows([(list(b"abc"), other)])[0][1]


def test_a_long_context_loses_its_beginning(model):
    before = model.cut
    context, continuation = "0123456789" * 4, "xyz"
    [(value, _)] = model.loglikelihood([(context, continuation)])
    kept = list(context.encode())[-(LONGEST + 1 - 3) :]
    assert value == pytest.approx(by_hand(model, kept, list(b"xyz"))[0], abs=2e-4)
    assert model.cut == before + 1
    with pytest.raises(ValueError, match="30 tokens after 1: at least one before, and at most"):
        model.loglikelihood([("", "x" * 30)])


def test_rolling_windows_predict_each_token_once_from_a_full_last_context():
    # lm-evaluation-harness's own example: 10 tokens, 4 at a time.
    found = list(harness.rolling_windows(list(range(10)), -7, 4))
    assert found == [([-7], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert list(harness.rolling_windows([5], -7, 4)) == [([-7], [5])]
    assert list(harness.rolling_windows([], -7, 4)) == []


def test_rolling_loglikelihood(model):
    text = "a text of more than two windows, as long as this"
    [found, nothing] = model.loglikelihood_rolling([text, ""])
    ids = list(text.encode())
    want = by_hand(model, [model.first_id], ids[:24])[0] + by_hand(model, ids[23:24], ids[24:])[0]
    assert len(ids) == 48
    assert found == pytest.approx(want, abs=1e-3)
    assert nothing == 0.0


@pytest.mark.slow
def test_until_cuts_and_sampling_repeats(model):
    asked = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6}
    first, second, other = model.generate_until([("abc", asked)] * 3)
    assert len({first, second, other}) > 1  # repeats of a request are draws of their own
    assert model.generate_until([("abc", asked)] * 3) == [first, second, other]
    stop = first[2]
    [cut, *_] = model.generate_until([("abc", asked | {"until": [stop, ""]})])
    assert cut == first[: first.index(stop)]


def test_requests_that_cannot_be_met_are_errors(model):
    with pytest.raises(ValueError, match="'beams' is not among"):
        model.generate_until([("a", {"beams": 3})])
    with pytest.raises(ValueError, match="max_gen_toks: 24 of max_length=24"):
        model.generate_until([("a", {"max_gen_toks": 24})])
    with pytest.raises(ValueError, match="no chat template"):
        model.apply_chat_template([{"role": "user", "content": "hi"}])
    with pytest.raises(ValueError, match="batch_size: 0"):
        harness.HarnessModel(model.session, model.params, batch_size=0)


def test_conversations_travel_as_text(model):
    """The tokenizer's own template, control tokens and all, and text after it stays text."""

    class Chat:
        chat, bos_id, eos_id = object(), None, 9

        def encode(self, text):
            return [ord(c) for c in text]

        def encode_chat(self, messages):
            return [1000, *self.encode(messages[-1]["content"]), 1001]

    session = dataclasses.replace(model.session, tokenizer=Chat())
    chatty = harness.HarnessModel(session, model.params, max_length=LONGEST, max_gen_toks=6)
    text = chatty.apply_chat_template([{"role": "user", "content": "h\x00i"}])
    assert chatty.encode(text) == [1000, 104, 0, 105, 1001]
    assert chatty.encode_pair(text, " x") == ([1000, 104, 0, 105, 1001], [32, 120])
    with pytest.raises(ValueError, match="gen_prefix"):
        chatty.apply_chat_template([], add_generation_prompt=False)
