"""The report: one file, everything escaped, nothing fetched."""

import html.parser
import re

import pytest

from pr2jax.core import plots
from pr2jax.evaluation import report
from pr2jax.evaluation.passk import Interval
from pr2jax.evaluation.runner import Sample
from pr2jax.tasks.base import Problem

HOSTILE = '</pre><script>alert(1)</script><img src="http://x/y" onerror=1> & \x00\x1b[31m \ud800'
VOID = {"meta", "img", "br", "link", "input"}


class Reader(html.parser.HTMLParser):
    """Collects tags and text, and checks that every tag is closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def samples(text, score):
    return [
        Sample(
            problem=Problem(f"p{i}", f"{i} + 1 = {HOSTILE}", str(i + 1), "t"),
            responses=(text,) * 4,
            scores=(score,) * 4,
            reasons=("",) * 4,
        )
        for i in range(20)
    ]


def full_report(path):
    rows = [{"step": s, "reward": s / 10, "z/layer_0": 0.9, "z/layer_1": 0.8} for s in range(9)]
    whole = Interval(1, 1, 1)
    learning = [
        "Plain text <b>stays text</b>.",
        report.intervals([("start", Interval(0.2, 0.15, 0.27)), (HOSTILE, whole)]),
        report.table(["what", "value"], [["a", Interval(0.5, 0.4, 0.6)], [HOSTILE, 0.123456]]),
        report.figures(
            [
                (plots.curve(rows, "reward", title="reward"), "Reward"),
                (plots.heatmap(rows, "z/layer_", title="zero"), HOSTILE),
            ]
        ),
    ]
    both = report.transcripts(samples(HOSTILE, 0.0), samples("7", 1.0), limit=3)
    config = report.settings({"rl": {"clip": 0.2, "x": HOSTILE}, "e": {}})
    report.write_report(
        path,
        f"Run {HOSTILE}",
        [
            report.Section("Learning", learning),
            report.Section("Transcripts", [both]),
            report.Section(HOSTILE, [config]),
        ],
        subtitle=HOSTILE,
        tiles=[report.Tile("pass@1", "0.50", HOSTILE)],
    )
    return path.read_text(encoding="utf-8")


def test_model_text_stays_text(tmp_path):
    page = full_report(tmp_path / "deep" / "report.html")
    reader = Reader(page)
    assert "script" not in reader.tags
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    text = "".join(reader.text)
    assert text.count("<script>alert(1)</script>") >= 10
    assert "<b>stays text</b>" in text
    assert "\x00" not in page
    assert "\u2400\u241b[31m" in page  # control characters are shown, not passed on


def test_nothing_is_fetched(tmp_path):
    reader = Reader(full_report(tmp_path / "report.html"))
    assert not {"link", "iframe", "object", "embed"} & set(reader.tags)
    for name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
            assert value.startswith(("#", "data:")), (name, value)
    style = "".join(reader.text)
    assert not re.search(r"@import|url\((?!#)", style)


def test_figures_follow_the_theme(tmp_path):
    page = full_report(tmp_path / "report.html")
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(svgs) == 2
    for svg in svgs:
        assert "viewBox" in svg
        assert "#ffffff" not in svg
        assert "#000000" not in svg
        assert not re.match(r"<svg[^>]* (width|height)=", svg)


def test_contents_are_there(tmp_path):
    text = "".join(Reader(full_report(tmp_path / "report.html")).text)
    for wanted in ("0.500 [0.400, 0.600]", "0.1235", "rl.clip", "3 of 20 problems", "0 + 1 ="):
        assert wanted in text
    assert "6 + 1 =" in text  # 20 problems, 3 shown: 0, 6, 13
    assert "13 + 1 =" in text


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full_disk(*_):
        raise OSError("no space")

    monkeypatch.setattr(report.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        report.write_report(path, "new", [])
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="2 cells, the header 1"):
        report.table(["a"], [[1, 2]])
    with pytest.raises(ValueError, match="not of the same problems"):
        report.transcripts(samples("a", 0.0), samples("a", 0.0)[1:])
    with pytest.raises(ValueError, match="scale"):
        report.intervals([], 1.0, 1.0)
