"""Packing loses nothing, restarts positions, is deterministic, and resumes bit for bit."""

import numpy as np
import pytest

from pr2jax.data import packing
from pr2jax.data.chat import render, render_messages, render_prompt
from pr2jax.data.tokenizer import TokenizerConfig, build_tokenizer


def random_examples(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        n = int(rng.integers(1, longest + 1))
        mask = rng.integers(0, 2, n)
        mask[0] = 0
        examples.append(packing.Example(rng.integers(0, 50, n).tolist(), mask.tolist()))
    return examples


def unpack(rows):
    """Every segment as (tokens, mask), found by scanning each row token by token."""
    found = []
    for tokens, mask, segments, positions in zip(*rows, strict=True):
        current = 0
        for t in range(len(tokens)):
            if segments[t] == 0:
                assert mask[t] == 0
                assert positions[t] == 0
                continue
            if segments[t] != current:
                assert segments[t] == current + 1
                current = segments[t]
                found.append(([], []))
            assert positions[t] == len(found[-1][0])
            found[-1][0].append(int(tokens[t]))
            found[-1][1].append(int(mask[t]))
    return found


@pytest.mark.parametrize("method", ["first_fit", "sequential"])
@pytest.mark.parametrize("pad_id", [0, 7])  # a pad id that also stands in the text changes nothing
def test_every_example_comes_back(method, pad_id):
    examples = random_examples(60, 20)
    rows, report = packing.pack(examples, 24, pad_id=pad_id, method=method)
    want = sorted((list(e.tokens), list(e.loss_mask)) for e in examples)
    assert sorted(unpack(rows)) == want
    assert report.dropped == 0
    assert report.rows == len(rows.tokens)
    assert report.fill == pytest.approx(sum(len(e.tokens) for e in examples) / rows.tokens.size)
    again, _ = packing.pack(examples, 24, pad_id=pad_id, method=method)
    assert all((a == b).all() for a, b in zip(rows, again, strict=True))


def test_assignments_by_hand():
    lengths = [5, 4, 6, 3, 1, 8]
    assert packing.assign_rows(lengths, 8, "sequential") == [[0], [1], [2], [3, 4], [5]]
    assert packing.assign_rows(lengths, 8, "first_fit") == [[0, 3], [1, 4], [2], [5]]


def brute_first_fit(lengths, size):
    rows = []
    for i, n in enumerate(lengths):
        for row in rows:
            if sum(lengths[j] for j in row) + n <= size:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


def test_first_fit_equals_brute_force():
    for seed in range(10):
        lengths = np.random.default_rng(seed).integers(1, 17, 80).tolist()
        assert packing.assign_rows(lengths, 16, "first_fit") == brute_first_fit(lengths, 16)


def test_overlong_is_an_error_or_counted():
    examples = [packing.Example([1] * n, [0] * n) for n in (3, 9, 4)]
    with pytest.raises(ValueError, match="example 1 has 9 tokens, a row holds 8"):
        packing.pack(examples, 8, pad_id=0)
    rows, report = packing.pack(examples, 8, pad_id=0, overlong="drop")
    assert report.dropped == 1
    assert len(unpack(rows)) == 2
    with pytest.raises(ValueError, match="nothing to pack"):
        packing.pack(examples, 2, pad_id=0, overlong="drop")
    with pytest.raises(ValueError, match="example 0: its first token is a target"):
        packing.pack([packing.Example([1, 2], [1, 1])], 8, pad_id=0)


def test_answer_example_masks_the_prompt():
    tok = build_tokenizer(TokenizerConfig(kind="char", alphabet="0123456789+ =\n"))
    example = packing.answer_example(tok, "3 + 4 =\n", "7")
    assert tok.decode([t for t, m in zip(*example, strict=True) if m]) == "7"
    assert example.tokens[-1] == tok.eos_id
    assert example.loss_mask[-1] == 1
    assert sum(example.loss_mask) == 2


def test_order_visits_every_item_once_an_epoch():
    order = packing.BatchOrder(10, 4, seed=3)
    drawn = np.concatenate([order.at(s) for s in range(5)])  # 20 draws: two epochs
    assert sorted(drawn[:10]) == list(range(10))
    assert sorted(drawn[10:]) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    other = packing.BatchOrder(10, 4, seed=4)
    assert drawn.tolist() != np.concatenate([other.at(s) for s in range(5)]).tolist()


def test_templates_leave_other_braces_alone():
    assert render_prompt(r"Put it in \boxed{}: {question}", "a {question} {b}") == (
        r"Put it in \boxed{}: a {question} {b}"
    )
    assert render("{x}{y}", x="{y}", y="1") == "{y}1"
    with pytest.raises(ValueError, match="no {question}"):
        render_prompt("{q}", "?")


def test_messages_become_text():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Why? "}]
    assert render_messages(chat) == "Be brief.\n\nWhy?"
    with pytest.raises(ValueError, match="message 0 has no string 'content'"):
        render_messages([{"role": "user"}])
