"""Figures: the numbers behind them, and SVG that an XML parser accepts."""

import xml.etree.ElementTree as ET

import numpy as np

from pr2jax.core import plots
from pr2jax.core.plots import (
    Line,
    curve,
    heatmap,
    layer_values,
    lines,
    scatter,
    series,
    smoothed,
)

ROWS = [
    {"step": 2, "reward": 0.5, "lo": 0.4, "hi": 0.6, "agree/layer_0": 0.9, "agree/layer_1": 0.7},
    {"step": 1, "reward": 0.25, "agree/layer_0": 1.0, "agree/layer_1": 0.8},
    {"step": 3, "reward": None, "eval": 0.3},
    {"step": 4, "reward": 1, "lo": 0.9, "hi": 1.0, "agree/layer_1": 0.6, "agree": 0.6},
]


def parsed(svg):
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    return root, " ".join(t for t in root.itertext() if t.strip())


def test_series_skips_gaps_and_sorts():
    x, y = series(ROWS, "reward")
    np.testing.assert_array_equal(x, [1, 2, 4])
    np.testing.assert_array_equal(y, [0.25, 0.5, 1.0])
    assert [len(v) for v in series(ROWS, "nothing")] == [0, 0]


def test_layer_values():
    steps, values = layer_values(ROWS, "agree/layer_")
    np.testing.assert_array_equal(steps, [1, 2, 4])
    np.testing.assert_array_equal(values, [[1.0, 0.9, np.nan], [0.8, 0.7, 0.6]])
    assert layer_values(ROWS, "nothing")[1].shape == (0, 0)


def test_smoothing_is_a_weighted_mean():
    y, w = np.array([4.0, 0.0, 2.0]), 0.5
    expected = [4.0, (0.5 * 4 + 0) / 1.5, (0.25 * 4 + 0.5 * 0 + 2) / 1.75]
    np.testing.assert_allclose(smoothed(y, w), expected)


def test_curve_is_svg_with_its_labels():
    svg = curve(
        ROWS,
        {"train": "reward", "held out": "eval"},
        title="Reward < 1 & more",
        ylabel="share",
        smooth=0.5,
        interval={"reward": ("lo", "hi")},
    )
    assert svg.startswith("<svg")
    assert svg.endswith("</svg>")
    _, text = parsed(svg)
    for word in ("Reward < 1 & more", "share", "step", "train", "held out"):
        assert word in text
    assert curve(ROWS, "reward") == curve(ROWS, "reward")


def test_scatter():
    x = np.array([1.0, 2.0])
    svg = scatter({"mine": (x, x, x - 0.1, x + 0.1)}, title="loss", xlabel="measured")
    parsed(svg)
    for text in ("loss", "measured", "mine"):
        assert text in svg


def test_lines():
    x = np.array([10.0, 100.0, 1000.0])
    named = {
        "n = 4": Line(x, np.sqrt(x), low=np.sqrt(x) / 2, high=np.sqrt(x) * 2, points=(x, x)),
        "n = 8": Line(x, x),
    }
    svg = lines(named, title="n*(C)", xlabel="C", ylabel="n*", log_x=10, log_y=2)
    text = parsed(svg)[1]
    for word in ("n*(C)", "n = 4", "n = 8", "256"):  # 2^8 in plain figures
        assert word in text
    assert svg == lines(named, title="n*(C)", xlabel="C", ylabel="n*", log_x=10, log_y=2)
    assert "no data" in parsed(lines({}))[1]


def test_missing_metric_says_so():
    assert "no data" in parsed(curve(ROWS, "nothing"))[1]
    assert "no data" in parsed(heatmap([], "agree/layer_"))[1]


def test_heatmap():
    _, text = parsed(heatmap(ROWS, "agree/layer_", title="agreement", limits=(0, 1)))
    assert "agreement" in text
    assert "layer" in text


def test_shares_fill_the_bar():
    """Pieces are as long as their amounts, and the bar is full."""
    svg = plots.shares({"a": 60.0, "b": 30.0, "tiny": 0.1, "none": 0.0, "c": 9.9}, title="t")
    assert [label in svg for label in ("a 60.0%", "b 30.0%", "c 9.9%", "tiny")] == [True] * 3 + [
        False
    ]
    assert "no data" in plots.shares({})
    assert "no data" in plots.shares({"a": 0.0})
