"""Evaluation items in rows, against runs of words compared one by one."""

import random

import pytest

from pr2jax.tasks.contamination import Item, Leaks
from pr2jax.tasks.filters import Comparable, CurateConfig, TokenCodes, tokens, words

compare = Comparable()


def items(*texts, source="exam"):
    return [Item(source, str(i), text, compare(text)) for i, text in enumerate(texts)]


def found(leaks, text):
    return [(leak.item.ident, leak.rule) for leak in leaks.find(compare(text))]


LONG = "A snail climbs up a wall of ten metres, three metres a day, and slides back two each night."
SHORT = "How many legs do six spiders and two ants have together?"  # 11 words
TINY = "What is six times seven?"


def test_a_run_of_words_is_a_leak_whatever_its_punctuation():
    leaks = Leaks(items(LONG, SHORT, TINY), CurateConfig())
    assert found(leaks, "Say: climbs up A WALL of ten metres three metres a day; and slides!") == [
        ("0", "ngram")
    ]
    # Twelve of them are not.
    assert found(leaks, "Say: up a wall of ten metres three metres a day and slides off") == []
    hit = leaks.find(compare("Say: climbs up a wall of ten metres three metres a day and slides"))
    assert hit[0].words == "climbs up a wall of ten metres three metres a day and slides"
    assert (hit[0].shared, hit[0].of) == (1, 19 - 13 + 1)


def test_a_short_item_must_be_there_whole_and_a_tiny_one_be_all():
    leaks = Leaks(items(LONG, SHORT, TINY), CurateConfig())
    assert found(leaks, f"Think. {SHORT} Answer in words.") == [("1", "whole item")]
    assert found(leaks, "Think. How many legs do six spiders and two ants have?") == []
    assert found(leaks, f"Think. {TINY}") == []
    assert found(leaks, "WHAT is six -- times seven") == [("2", "same words")]
    assert found(leaks, "?!") == []


def test_the_wording_of_a_set_is_no_leak():
    start = "Answer the following question as well as you can and explain each step of your way:"
    exam = [f"{start} {name} owns a boat." for name in ("Ann", "Bob", "Cid", "Dan")]
    leaks = Leaks(items(*exam), CurateConfig(common_items=3))
    # 16 words of wording and 4 of an item's own: no run of 13 has more of those than of wording.
    assert (leaks.common, leaks.unspecific) == (4 * (20 - 13 + 1), 4)
    assert found(leaks, f"{start} Ann is a bird?") == []
    assert found(leaks, exam[1]) == [("1", "same words")]
    tales = (
        "It has four masts and a red hull but no sail at all.",
        "Why would she row home at night when so many birds sleep there?",
        "Ten oars lie under its deck; two break: who pays for them next week?",
        "Count all waves that pass below its keel while he sings one song.",
    )
    longer = [f"{text} {tale}" for text, tale in zip(exam, tales, strict=True)]
    leaks = Leaks(items(*longer), CurateConfig(common_items=3))
    assert leaks.unspecific == 0
    assert found(leaks, f"{start} Bob owns a boat. Why should he?") == []
    assert found(
        leaks, "A test: bob owns a boat why would she row home at night when so he sings"
    ) == [("1", "ngram")]
    # Common in one set says nothing about another.
    more = [*items(*exam), *items(f"{start} why is the sky blue?", source="other")]
    leaks = Leaks(more, CurateConfig(common_items=3))
    assert found(leaks, f"{start} who are you?") == [("0", "ngram")]


def test_the_wording_of_many_rows_is_no_leak():
    start = "Answer the following question as well as you can and explain each step of your way:"
    tail = "seven grey ducks swim past one old mill and dive for weeds"
    exam = items(f"{start} {tail}.")
    code = TokenCodes()
    given = [f"{start} what is {i} and {i + 1}?" for i in range(9)]
    rows = [code(tokens(compare(text))) for text in [*given, f"{start} {tail} now"]]
    few = Leaks(exam, CurateConfig(common_rows=10), rows)
    assert found(few, given[0]) == [("0", "ngram")]
    many = Leaks(exam, CurateConfig(common_rows=9), rows)
    # 16 words of wording and 12 others: runs of 13 with at least 7 of those start at 10 and later.
    assert many.common == 10
    assert found(many, given[0]) == []
    assert found(many, f"{start} seven grey ducks bark") == []
    assert found(many, f"Hm. {start} {tail}?") == [("0", "ngram")]


def test_an_item_of_wording_alone_is_found_whole():
    same = "Answer the following question as well as you can and explain each step of your way"
    leaks = Leaks(items(same, same + ".", same + "!"), CurateConfig(common_items=2))
    assert leaks.unspecific == 3
    assert found(leaks, f"First. {same}") == []
    assert found(leaks, same) == [(str(i), "same words") for i in range(3)]


def test_cells_of_a_grid_agree_by_chance():
    grid = "0 0 0 0 0 3 0 0 0 0 0 0 0 0 0 0 0 0"
    leaks = Leaks(items(f"Continue {grid}"), CurateConfig())
    assert leaks.cells == 6 + 1
    assert found(leaks, f"Sort these: {grid} 1 2 3") == []
    assert found(leaks, f"continue: {grid}") == [("0", "same words")]


def test_share_of_an_item():
    leaks = Leaks(items(LONG), CurateConfig(leak_share=0.5))
    assert found(leaks, "Say: climbs up a wall of ten metres three metres a day and slides") == []
    assert found(leaks, "Hm: " + LONG[: LONG.index(" each")]) == [("0", "ngram")]


@pytest.mark.parametrize("seed", range(4))
def test_the_same_as_comparing_all_runs(seed):
    rng = random.Random(seed)
    cfg = CurateConfig(ngram=4, short_words=3, common_items=3)
    say = lambda low, high: " ".join(
        rng.choices(["ab", "cd", "ef", "gh", "ij", "kl"], k=rng.randint(low, high))
    )
    exam = items(*(say(1, 9) for _ in range(25)))
    leaks = Leaks(exam, cfg)
    runs = lambda text, n: {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
    of = {i.ident: words(i.text) for i in exam}
    size = {ident: min(len(w), cfg.ngram) for ident, w in of.items()}
    wording: dict = {}
    for ident, w in of.items():
        for run in runs(w, 3):
            wording.setdefault(run, set()).add(ident)
    wording = {run for run, idents in wording.items() if len(idents) > min(cfg.common_items, 2)}
    hits = 0

    def specific(w, n):
        marked = [
            any(w[k : k + 3] in map(list, wording) and k <= i < k + 3 for k in range(len(w)))
            for i in range(len(w))
        ]
        return {
            tuple(w[k : k + n]) for k in range(len(w) - n + 1) if 2 * sum(marked[k : k + n]) <= n
        }

    for _ in range(200):
        row = words(say(1, 12))
        expected = []
        for item in exam:
            theirs = of[item.ident]
            n = size[item.ident]
            shared = specific(theirs, n) & runs(row, n)
            if row == theirs or (size[item.ident] >= cfg.short_words and shared):
                expected.append(item.ident)
        assert [leak.item.ident for leak in leaks.find(" ".join(row))] == expected
        hits += bool(expected)
    assert 0 < hits < 200
