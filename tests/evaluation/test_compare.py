"""Figures of several checkpoints side by side, against hand-computed ones."""

import numpy as np
import pytest

from pr2jax.evaluation import compare, report
from pr2jax.evaluation.cells import Cell
from pr2jax.evaluation.passk import Interval, bootstrap_interval
from pr2jax.evaluation.report import Section
from pr2jax.evaluation.runner import Sample, figures
from pr2jax.tasks.base import Problem
from tests.evaluation.test_report import HOSTILE, Reader


def cell(checkpoint, suite, scores, domains, ks=(1, 2), failures=None):
    scores = np.asarray(scores, np.float64)
    shape = scores.shape
    answers = [[str(s) for s in row] for row in scores]
    return Cell(
        checkpoint=checkpoint,
        suite=suite,
        n=shape[1],
        ks=ks,
        per_problem=figures(scores, np.full(shape, 3), np.zeros(shape, bool), ks, answers),
        domains=tuple(domains),
        samples=[
            Sample(
                Problem(f"{suite}{i}", HOSTILE, "ref", ""),
                tuple(f"{checkpoint} says {s}" for s in row),
                tuple(row),
                ("",) * shape[1],
            )
            for i, row in enumerate(scores.tolist())
        ],
        failures=failures or {"timeouts": 0},
        seconds=1.0,
    )


def grid():
    big = [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    return {
        "old": {
            "big": cell("old", "big", big, ["math", "math", "code", "odd"]),
            "small": cell("old", "small", [[0.0] * 4], ["math"], (1, 2, 4), {"timeouts": 3}),
        },
        "new": {
            "big": cell("new", "big", [[1.0, 1.0], *big[1:]], ["math", "math", "code", "odd"]),
            "small": cell("new", "small", [[1.0] * 4], ["math"], (1, 2, 4)),
        },
    }


def test_means_over_suites_count_suites_the_same():
    found = compare.figures(grid()["old"])
    assert found["suites"]["big"]["avg@2"].mean == pytest.approx(3 / 8)
    assert found["overall"]["avg"].mean == pytest.approx((3 / 8 + 0) / 2)
    assert found["domains"]["math"]["avg"].mean == pytest.approx((3 / 4 + 0) / 2)
    assert found["domains"]["code"]["avg"].mean == 0.0
    assert list(found["domains"]) == ["math", "code", "odd"]
    assert found["overall"]["pass@2"].mean == pytest.approx((2 / 4 + 0) / 2)
    # k = 4 is the small suite's alone: no figure of both, but one of its own.
    assert "pass@4" not in found["overall"]
    assert "maj@4" in found["suites"]["small"]
    assert set(found["domains"]["code"]) == {
        *("avg", "pass@1", "pass@2", "best@2", "worst@2", "maj@2", "length", "truncated")
    }


def test_differences_are_paired_and_marked():
    both = grid()
    gaps = compare.differences(both["old"], both["new"])
    gained = [0.5, 0.0, 0.0, 0.0]
    assert gaps["suites"]["big"]["avg@2"] == bootstrap_interval(gained)
    assert gaps["suites"]["small"]["avg@4"] == Interval(1.0, 1.0, 1.0)
    assert gaps["overall"]["avg"].mean == pytest.approx((0.125 + 1.0) / 2)
    assert gaps["domains"]["math"]["avg"].mean == pytest.approx((0.25 + 1.0) / 2)
    marked = compare.differences_json(gaps)
    assert marked["suites"]["small"]["avg@4"]["excludes_zero"] is True
    assert marked["suites"]["big"]["avg@2"]["excludes_zero"] is False
    assert compare.show_difference(Interval(0.5, 0.25, 0.75)) == "+0.500 [+0.250, +0.750] *"
    assert compare.show_difference(Interval(0.5, 0.0, 0.75)) == "+0.500 [+0.000, +0.750]"
    # A checkpoint against itself is apart nowhere.
    same = compare.differences(both["old"], both["old"])
    assert same["overall"]["avg"] == Interval(0.0, 0.0, 0.0)


def test_other_problems_are_an_error():
    both = grid()
    with pytest.raises(ValueError, match="suites"):
        compare.differences(both["old"], {"big": both["new"]["big"]})
    other = both["new"] | {"big": cell("new", "small", [[0.0, 1.0]], ["math"])}
    with pytest.raises(ValueError, match="big: not the same problems"):
        compare.differences(both["old"], other)


def test_the_page_holds_scores_differences_transcripts_and_what_is_missing(tmp_path):
    both = grid() | {"third": grid()["new"]}
    missing = {"zebra": f"no file {HOSTILE}"}
    about = Section("How it was made", [report.settings({"a": 1})])
    path = tmp_path / "report.html"
    found, gaps = compare.write_page(path, both, missing, about, transcripts=2)
    assert (list(found), list(gaps)) == (["old", "new", "third"], ["new", "third"])
    page = path.read_text(encoding="utf-8")
    reader = Reader(page)
    assert "script" not in reader.tags
    text = "".join(reader.text)
    for wanted in (
        "new - old",
        "third - old",
        "+1.000 [+1.000, +1.000] *",
        "domain math",
        "zebra",
        "3 timeouts",
        "maj@4",
        "old says 0.0",
        "new says 1.0",
        "2 of 4 problems, evenly spaced",
    ):
        assert wanted in text
    assert page.count("grid-template-columns:repeat(auto-fit") == 3  # two of big, one of small


def test_one_checkpoint_has_nothing_to_be_compared_with(tmp_path):
    one = {"old": grid()["old"]}
    found, gaps = compare.write_page(tmp_path / "r.html", one, {}, Section("x", []), transcripts=0)
    assert gaps == {}
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Differences" not in text
    assert "old says" not in text
    assert compare.to_json(found)["old"]["overall"]["avg"]["value"] == pytest.approx(3 / 16)
