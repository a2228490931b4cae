"""Logic verifiers: zebra tables by cell, orderings, words, ARC grids."""

import json

import pytest

from pr2jax.tasks.base import Problem
from pr2jax.tasks.registry import score

TRUTH = {"header": ["House", "Name", "Pet"], "rows": [["1", "Ada", "cat"], ["2", "Ben", "dog"]]}


def zebra(answer, truth=None, source="logic__zebra_puzzle", **meta):
    text = json.dumps(TRUTH if truth is None else truth)
    response = answer if isinstance(answer, str) else f"<answer>{json.dumps(answer)}</answer>"
    return score(Problem("z", "?", text, source, meta=meta), response)


def table(*rows, header=("House", "Name", "Pet")):
    return {"header": list(header), "rows": [list(row) for row in rows]}


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        (TRUTH, 1.0),
        (table((1, " ADA", "Cat "), (2, "ben", "dog")), 1.0),  # numbers, case, spaces
        (table(("1", "Ben", "cat"), ("2", "Ada", "dog")), 4 / 6),
        (table(("1", "Ada", "cat")), 3 / 6),  # a row missing
        (table(("1", "Ada"), ("2", "Ben")), 4 / 6),  # a column missing
        (table(("1", "Ada", "cat"), ("2", "Ben", "dog"), ("3", "x", "y")), 6 / 9),
        (table(("1", "Ada", "cat", "x"), ("2", "Ben", "dog", "y")), 6 / 8),
        (table(("cat", "1", "Ada"), ("dog", "2", "Ben"), header=("Pet", "House", "Name")), 1.0),
        (table(("cat", "1"), ("dog", "2"), header=("Pet", "House", "Name")), 4 / 6),
        # A header that is no permutation says nothing: columns by position.
        (table(("1", "Ada", "cat"), ("2", "Ben", "dog"), header=("a", "b", "c")), 1.0),
        ({"rows": TRUTH["rows"]}, 1.0),
        (TRUTH["rows"], 1.0),
        ({"header": TRUTH["header"]}, 0.0),
        ({"rows": "many"}, 0.0),
        ({"rows": [1, 2]}, 0.0),
        ([], 0.0),
        (table(*[("1", "Ada", "cat")] * 4000), 0.0),
        ("<answer>no table</answer>", 0.0),
        (json.dumps(TRUTH), 0.0),  # no tag
        (f"<think><answer>{json.dumps(TRUTH)}</answer>", 0.0),
        (f"<answer>{TRUTH}</answer>", 1.0),  # a Python literal
    ],
)
def test_zebra(answer, share):
    assert zebra(answer).score == pytest.approx(share, abs=1e-12)


def test_zebra_partial_credit_and_reason():
    wrong = table(("1", "Ben", "cat"), ("2", "Ada", "dog"))
    assert zebra(wrong, partial_credit=0.5).score == pytest.approx(2 / 6)
    assert zebra(wrong, partial_credit=0.0).score == 0.0
    assert zebra(wrong).reason == "4 of 6 cells are right"
    assert zebra(TRUTH, source="zebra_puzzle_dataset").score == 1.0


@pytest.mark.parametrize("truth", [[1], {"rows": []}, {"header": ["a"]}, "x"])
def test_zebra_truth_must_be_a_table(truth):
    with pytest.raises(ValueError, match="ground truth of z is no table"):
        zebra(TRUTH, truth=truth)


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ('["robin", "blue jay", "hawk"]', 1),
        ("['Robin', 'Blue  Jay', 'Hawk']", 1),
        ("[robin, blue jay, hawk]", 1),
        ("robin, blue jay, hawk", 1),
        ('["robin", "hawk", "blue jay"]', 0),
        ('["robin", "blue jay"]', 0),
        ('["robin", "blue jay", "hawk", "owl"]', 0),
        ('[["robin", "blue jay", "hawk"]]', 0),
        ("", 0),
        ("{}", 0),
    ],
)
@pytest.mark.parametrize("source", ["ordering_puzzle_dataset", "logic__ordering_puzzle"])
def test_ordering(answer, want, source):
    for truth in ('["robin", "blue jay", "hawk"]', "['robin', 'blue jay', 'hawk']"):
        problem = Problem("o", "?", truth, source)
        assert score(problem, f"thus <answer>{answer}</answer>").score == want


def test_ordering_truth_must_be_a_list():
    with pytest.raises(ValueError, match="ground truth of o"):
        score(Problem("o", "?", "robin", "ordering_puzzle_dataset"), "<answer>robin</answer>")


@pytest.mark.parametrize(
    ("answer", "want"),
    [("leaf", 1), (" LEAF. ", 1), ("'leaf'", 1), ("leafs", 0), ("the leaf", 0), ("", 0)],
)
def test_words_on_graphs(answer, want):
    problem = Problem("g", "?", "leaf", "graph_logical_dataset")
    assert score(problem, f"<answer>{answer}</answer>").score == want
    assert score(problem, answer).score == 0


GRID = [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("response", "want"),
    [
        ("<answer>[[0, 1, 2], [3, 4, 5]]</answer>", 1),
        ("<answer>\n[[0,1,2],\n [3,4,5]]\n</answer>", 1),
        ("<answer>the grid is [[0,1,2],[3,4,5]].</answer>", 1),
        ("<answer>0 1 2\n3 4 5</answer>", 1),
        ("<answer>[0 1 2]\n[3 4 5]</answer>", 1),
        ("```\n[[0, 1, 2], [3, 4, 5]]\n```", 1),
        ("<answer>((0, 1, 2), (3, 4, 5))</answer>", 0),  # no brackets to find it by
        ("<answer>[[0, 1, 2], [3, 4, 6]]</answer>", 0),
        ("<answer>[[0, 1, 2]]</answer>", 0),
        ("<answer>[[0, 1, 2], [3, 4]]</answer>", 0),
        ("<answer>[[0, 1, 2], [3, 4, 5.0]]</answer>", 0),
        ("<answer>[[false, true, 2], [3, 4, 5]]</answer>", 0),
        ('<answer>[["0", "1", "2"], ["3", "4", "5"]]</answer>', 0),
        ("<answer>[0, 1, 2, 3, 4, 5]</answer>", 0),
        ("<answer>[[]]</answer>", 0),
        ("<answer>" + "[" * 5000 + "</answer>", 0),
        ("<answer>" + "[[" + "0," * 9000 + "0]]</answer>", 0),
        ("[[0, 1, 2], [3, 4, 5]]", 0),
        ("<think><answer>[[0, 1, 2], [3, 4, 5]]</answer></think>", 0),
        ("<answer>[[0]]</answer> <answer>[[0, 1, 2], [3, 4, 5]]</answer>", 1),
    ],
)
@pytest.mark.parametrize("source", ["simulation__arcagi1", "simulation__barc", "logic__arcagi2"])
def test_grids(response, want, source):
    assert score(Problem("a", "?", json.dumps(GRID), source), response).score == want


def test_grid_reasons_and_bad_truth():
    problem = Problem("a", "?", json.dumps(GRID), "logic__arcagi1")
    assert (
        score(problem, "<answer>[[0, 1, 2], [3, 4, 6]]</answer>").reason == "wrong: 1 cells differ"
    )
    assert "1 x 1 for 2 x 3" in score(problem, "<answer>[[0]]</answer>").reason
    with pytest.raises(ValueError, match="ground truth of a is no grid"):
        score(Problem("a", "?", "[[1, 2], [3]]", "logic__arcagi1"), "<answer>[[0]]</answer>")
