"""The stream of packed rows against a brute-force oracle; shards, mixtures, and resuming."""

import collections
import itertools
import json

import numpy as np
import pytest

from pr2jax.data.documents import Documents
from pr2jax.data.held_out import held_out_rows
from pr2jax.data.stream import RowStream, encode_document
from pr2jax.data.tokenizer import ByteTokenizer

LENGTH = 16


class Toy(ByteTokenizer):
    """Bytes with a first token."""

    vocab_size, bos_id = 259, 258


class Texts(list):
    """Texts in memory as a source."""

    def where(self, index):
        return f"text {index}"


def documents(texts, name="a"):
    texts = Texts(texts)
    digests = np.random.default_rng(len(texts)).integers(0, 2**63, len(texts)).astype(np.uint64)
    return Documents(name, texts, np.arange(len(texts)), digests, 0, 0)


def some(count, seed, letter="a"):
    """Texts of many lengths, those among them that fill rows exactly and over several rows."""
    rng = np.random.default_rng(seed)
    sizes = [*rng.integers(1, 3 * LENGTH, count - 3), LENGTH - 2, LENGTH - 1, 3 * LENGTH - 2]
    return [
        "".join(chr(ord(letter) + int(c)) for c in rng.integers(0, 5, n)) + f"#{i}"
        for i, n in enumerate(sizes)
    ]


def stream(sources, tokenizer=None, batch=2, **settings):
    settings = {"weights": [1.0] * len(sources), "seed": 3, **settings}
    return RowStream(
        sources, tokenizer=tokenizer or Toy(), row_length=LENGTH, batch=batch, **settings
    )


@pytest.mark.parametrize("tokenizer", [Toy(), ByteTokenizer()], ids=["bos", "no_bos"])
def test_rows_against_brute_force(tokenizer):
    own = documents(some(20, 0))
    encoded = [encode_document(tokenizer, own[i]) for i in range(len(own))]
    total = sum(map(len, encoded))
    made = stream([own], tokenizer)
    batches = [next(made) for _ in range(2 * total // (2 * LENGTH) + 1)]
    # What the pieces say: the order in which documents came, each whole and in order.
    pieces = [p for b in batches for row in b.pieces for p in row]
    order = [(p.epoch, p.document) for p in pieces if p.start == 0]
    for epoch in (0, 1):
        assert sorted(d for e, d in order if e == epoch) == list(range(20))
    assert [d for e, d in order if e == 0] != [d for e, d in order if e == 1]
    assert order == sorted(order, key=lambda x: x[0])
    # The oracle: those documents end to end, cut every LENGTH tokens, scanned token by token.
    flat = [(d, t, token) for _, d in order for t, token in enumerate(encoded[d])]
    row = 0
    for batch in batches:
        for tokens, mask, segments, positions in zip(*batch.rows, strict=True):
            expected = flat[row * LENGTH : (row + 1) * LENGTH]
            segment, position = 0, 0
            for k, (document, t, token) in enumerate(expected):
                fresh = k == 0 or t == 0 or document != expected[k - 1][0]
                segment, position = (segment + 1, 0) if fresh else (segment, position + 1)
                assert (tokens[k], segments[k], positions[k]) == (token, segment, position)
                assert mask[k] == (position > 0)
            row += 1
    assert encoded[0][-1] == tokenizer.eos_id
    assert (encoded[0][0] == 258) == (tokenizer.bos_id is not None)
    assert batches[0].cut == sum(p.start > 0 for r in batches[0].pieces for p in r)


def test_mixture_keeps_the_shares_of_rows_and_is_deterministic():
    sources = [documents(some(30, 1), "a"), documents(some(9, 2, "p"), "b")]
    settings = {"weights": [3.0, 1.0]}
    made, again = stream(sources, **settings), stream(sources, **settings)
    count = collections.Counter()
    for _ in range(40):
        x, y = next(made), next(again)
        assert x.pieces == y.pieces
        assert all((a == b).all() for a, b in zip(x.rows, y.rows, strict=True))
        for row in x.pieces:
            assert len({p.source for p in row}) == 1
            count[row[0].source] += 1
    assert abs(count["a"] - 60) <= 1
    assert count["a"] + count["b"] == 80
    other = stream(sources, weights=[3.0, 1.0], seed=4)
    assert [next(other).pieces for _ in range(3)] != [next(stream(sources)).pieces] * 3


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_read_disjoint_documents_and_together_all(hosts):
    own = documents(some(21, 5))
    seen = []
    for host in range(hosts):
        made = stream([own], shard=(host, hosts))
        found = set()
        while True:
            pieces = [p for row in next(made).pieces for p in row]
            found |= {p.document for p in pieces if p.epoch == 0}
            if any(p.epoch == 1 for p in pieces):
                break
        seen.append(found)
    assert sum(map(len, seen)) == 21
    assert set.union(*seen) == set(range(21))
    with pytest.raises(ValueError, match="a: 21 documents for 22 hosts"):
        stream([own], shard=(0, 22))


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
def test_resumed_at_any_batch_is_never_stopped(mixed):
    sources = [documents(some(12, 7), "a"), documents(some(5, 8), "b")][: 2 if mixed else 1]
    whole = stream(sources, batch=1)
    states, batches = [whole.state()], []
    for _ in range(60):  # several epochs of either source
        batches.append(next(whole))
        states.append(whole.state())
    assert max(p.epoch for row in batches[-1].pieces for p in row) >= 2
    for stop in range(60):
        resumed = stream(sources, batch=1)
        resumed.restore(json.loads(json.dumps(states[stop])))
        assert resumed.position == stop
        for k in range(stop, min(stop + 6, 60)):
            found = next(resumed)
            assert found.pieces == batches[k].pieces
            for a, b in zip(found.rows, batches[k].rows, strict=True):
                np.testing.assert_array_equal(a, b)
            assert resumed.state() == states[k + 1]
    assert max(map(len, states)) < 1000
    whole.restart()
    assert next(whole).pieces == batches[0].pieces


def test_a_text_that_cannot_be_written_names_its_place():
    from pr2jax.data.tokenizer import CharTokenizer

    with pytest.raises(ValueError, match="text 1: character '!' is not in the alphabet"):
        next(stream([documents(["abc", "a!c"])], CharTokenizer("abc"), batch=4))


@pytest.mark.parametrize("tokenizer", [Toy(), ByteTokenizer()], ids=["bos", "no_bos"])
def test_held_out_rows_predict_every_token_once(tokenizer):
    texts = ["x" * n + "é" for n in (1, LENGTH - 3, LENGTH, 5 * LENGTH, 7)]
    own = documents(texts)
    made = held_out_rows(own, tokenizer, row_length=LENGTH, limit=100)
    skipped = 0 if tokenizer.bos_id is not None else 1
    assert made.bytes == sum(len(t.encode()) - skipped for t in texts)
    assert made.documents == len(texts)
    assert made.rows.loss_mask.sum() == sum(len(encode_document(tokenizer, t)) - 1 for t in texts)
    # Targets with the token before each: every neighbouring pair of every document, once.
    pairs = collections.Counter()
    for tokens, mask, _, positions in zip(*made.rows, strict=True):
        for k in np.flatnonzero(mask):
            assert positions[k] == positions[k - 1] + 1
            pairs[int(tokens[k - 1]), int(tokens[k])] += 1
    want = collections.Counter()
    for text in texts:
        ids = encode_document(tokenizer, text)
        want.update(itertools.pairwise(ids))
    assert pairs == want
    few = held_out_rows(own, tokenizer, row_length=LENGTH, limit=2)
    assert few.documents == 3
    assert few.rows.loss_mask.sum() == 2 * LENGTH - 3
