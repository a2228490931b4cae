"""Repeats, against all pairs compared."""

import itertools
import random

import numpy as np
import pytest

from pr2jax.tasks import dedup, filters
from pr2jax.tasks.filters import TokenCodes


def oracle_contained(texts, wanted):
    """Greedy, by the definition: a row goes if it and an earlier one that stayed are nested."""
    partner = [-1] * len(texts)
    for j in range(len(texts)):
        for i in range(j):
            inside = (wanted[i] and texts[i] in texts[j]) or (wanted[j] and texts[j] in texts[i])
            if partner[i] < 0 and inside:
                partner[j] = i
                break
    return partner


def contained(texts, wanted, parts=3):
    data = [text.encode() for text in texts]
    sizes = {dedup.anchor_size(len(d)) for d, w in zip(data, wanted, strict=True) if w}
    anchors = dedup.Anchors(sorted(sizes))
    cuts = np.linspace(0, len(texts), parts + 1).astype(int)
    spans = list(itertools.pairwise(cuts.tolist()))
    for low, high in spans:
        anchors.count(data[low:high])
    for low, high in spans:
        anchors.choose(low, data[low:high], np.array(wanted[low:high]))
    anchors.freeze()
    pairs = [anchors.pairs(low, data[low:high], data.__getitem__) for low, high in spans]
    return dedup.keep_earlier(np.concatenate(pairs), len(texts)).tolist()


@pytest.mark.parametrize("seed", range(12))
def test_containment_is_that_of_all_pairs(seed):
    rng = random.Random(seed)
    letters = "ab \u00e9\u6c42" if seed % 2 else "ab"
    bases = ["".join(rng.choices(letters, k=rng.randint(1, 90))) for _ in range(60)]
    texts = list(bases)
    for base in bases[:30]:
        low = rng.randrange(len(base))
        texts.append(base[low : low + rng.randint(1, 70)] or "a")
        texts.append("".join(rng.choices(letters, k=rng.randint(0, 9))) + base)
    rng.shuffle(texts)
    texts = list(dict.fromkeys(texts))  # the same ones are another rule's
    minimum = rng.choice([1, 1, 5, 20])
    wanted = [len(text) >= minimum for text in texts]
    found = contained(texts, wanted)
    assert found == oracle_contained(texts, wanted)
    assert any(i >= 0 for i in found)


def test_containment_keeps_a_row_whose_only_partner_is_gone():
    # The second goes by the first, and takes the third, which is not in the first, not with it.
    texts = ["the sum of all primes", "what is the sum of all primes below", "what is the"]
    assert contained(texts, [True] * 3, parts=1) == [-1, 0, -1]


def test_a_text_longer_than_a_chunk_is_searched_to_its_end():
    rng = random.Random(0)
    filler = "".join(rng.choices("abcdef ", k=3 << 20))
    texts = [filler + "the very last question of the exam", "very last question of the exam"]
    assert contained(texts, [True, True], parts=1) == [-1, 0]


def test_anchor_windows_are_of_all_sizes():
    data = np.frombuffer(b"abcabcabcabcabcabc", np.uint8)
    found = dict(dedup.window_codes(data, [1, 2, 4, 8]))
    for size, codes in found.items():
        runs = [bytes(data[i : i + size]) for i in range(len(data) - size + 1)]
        assert len(codes) == len(runs)
        assert len(set(zip(codes.tolist(), runs, strict=True))) == len(set(runs)) == 3
    assert [dedup.anchor_size(n) for n in (1, 2, 3, 31, 32, 500)] == [1, 2, 2, 16, 32, 32]


def test_the_first_of_the_same_is_found():
    rng = np.random.default_rng(0)
    digests = rng.integers(0, 2, (40, 2), np.uint64)
    keys = [tuple(d) for d in digests.tolist()]
    assert dedup.first_of_same(digests).tolist() == [keys.index(key) for key in keys]
    assert dedup.first_of_same(digests[:0]).tolist() == []


# --- Nearly the same


def test_bands_are_the_longest_that_find_enough():
    bands, rows = dedup.choose_bands(0.8, 128, 0.99)
    assert (bands, rows) == (21, 6)
    assert 1 - (1 - 0.8**6) ** 21 >= 0.99 > 1 - (1 - 0.8**7) ** 18


def test_shared_groups():
    codes = np.array([5, 7, 5, 9, 7, 5], np.uint64)
    groups = dedup.shared_groups(codes).tolist()
    assert groups[3] == -1
    assert groups[0] == groups[2] == groups[5] != groups[1] == groups[4]
    assert dedup.shared_groups(codes[:0]).tolist() == []


def test_jaccard():
    assert dedup.jaccard(frozenset({1, 2, 3}), frozenset({2, 3, 4})) == 0.5
    assert dedup.jaccard(frozenset(), frozenset({1})) == 0.0


def edited(rng, words, edits):
    words = list(words)
    for _ in range(edits):
        words[rng.randrange(len(words))] = f"w{rng.randrange(10**6)}"
    return words


def run_near(texts, threshold=0.7, crowd=1000, bands=(32, 4)):
    code = TokenCodes()
    sets = [filters.shingles(code(filters.tokens(t)), 2) for t in texts]
    salts = np.array([filters.numbers_key(t) for t in texts], np.uint64)
    codes = dedup.band_codes(sets, salts, *bands)
    groups = np.stack([dedup.shared_groups(codes[:, b]) for b in range(bands[0])])
    near = dedup.Near(groups, lambda i: frozenset(sets[i].tolist()), threshold, crowd)
    partner = []
    for row in range(len(texts)):
        found, _ = near.find(row)
        partner.append(found)
        if found < 0:
            near.add(row)
    return partner, near, sets


def test_near_repeats_are_those_of_all_pairs():
    rng = random.Random(1)
    texts = []
    for _ in range(80):
        words = [f"w{rng.randrange(10**6)}" for _ in range(rng.randint(10, 40))]
        texts += [" ".join(edited(rng, words, k)) for k in (0, *rng.sample(range(5), 2))]
    texts = [t.replace("w", "word") for t in texts]
    partner, _, sets = run_near(
        [t.translate(str.maketrans("0123456789", "abcdefghij")) for t in texts]
    )
    sets = [frozenset(s.tolist()) for s in sets]
    expected = []
    for j in range(len(texts)):
        kept = [i for i in range(j) if expected[i] < 0]
        best = max(kept, key=lambda i: dedup.jaccard(sets[i], sets[j]), default=-1)
        good = best >= 0 and dedup.jaccard(sets[best], sets[j]) >= 0.7
        expected.append(best if good else -1)
    # 32 bands of 4 miss a pair of similarity .7 with probability 1.5e-4.
    assert [p >= 0 for p in partner] == [e >= 0 for e in expected]
    assert sum(p >= 0 for p in partner) > 80
    for j, i in enumerate(partner):
        assert i < 0 or dedup.jaccard(sets[i], sets[j]) >= 0.7  # no false one, whatever the bands


def test_other_numbers_are_another_problem():
    text = "a farmer has {} hens and buys some more of them at the market in the old town today"
    partner, _, _ = run_near([text.format(3), text.format(4), text.format(3) + " ."])
    assert partner == [-1, -1, 0]


def test_a_crowded_band_is_counted():
    rng = random.Random(2)
    start = " ".join(f"s{c}" for c in "abcdefghijklmnopqrst")
    texts = [f"{start} {' '.join(rng.choices('uvwxyz', k=12))}" for _ in range(40)]
    partner, near, _ = run_near(texts, threshold=0.95, crowd=3, bands=(64, 1))
    assert near.skipped > 0
    assert near.compared < 40 * 39 / 2
    assert partner[0] == -1


def test_signatures_do_not_depend_on_the_batch():
    sets = [np.arange(n, n + 30, dtype=np.uint64) * np.uint64(7919) for n in range(50)]
    salts = np.zeros(50, np.uint64)
    whole = dedup.band_codes(sets, salts, 8, 4)
    halves = [dedup.band_codes(sets[a : a + 25], salts[:25], 8, 4) for a in (0, 25)]
    np.testing.assert_array_equal(whole, np.concatenate(halves))
