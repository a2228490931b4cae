"""Figures out of rows of metrics, as SVG text that stands inside an HTML page by itself."""

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.3,
    "svg.fonttype": "none",  # text stays text: small, searchable
    "svg.hashsalt": "pr2jax",  # the same rows give the same bytes
}


def series(rows: Rows, key: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """(x, y) float64 of the rows that have a number under both keys, in order of x."""
    pairs = sorted(
        (float(row[x]), float(row[key]))
        for row in rows
        if isinstance(row.get(x), int | float) and isinstance(row.get(key), int | float)
    )
    points = np.array(pairs, np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def curve(
    rows: Rows,
    key: str | Mapping[str, str],
    *,
    title: str = "",
    ylabel: str = "",
    x: str = "step",
    smooth: float = 0.0,
    interval: Mapping[str, tuple[str, str]] | None = None,
    size: tuple[float, float] = (4.6, 2.8),
) -> str:
    """One figure of one or several curves as inline SVG.

    `key`: a metric, or {label: metric}. `smooth` in [0, 1): weight of the past in an exponential
    mean, drawn over the faint raw curve. `interval`: {metric: (low metric, high metric)}, drawn as
    a band. A metric that no row has is left out; the figure says so when nothing is left.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        _draw(figure.add_subplot(), rows, key, title, ylabel, x, smooth, interval or {})
        return _svg(figure)


def heatmap(
    rows: Rows,
    prefix: str,
    *,
    title: str = "",
    x: str = "step",
    ylabel: str = "layer",
    limits: tuple[float, float] | None = None,
    size: tuple[float, float] = (4.6, 2.8),
) -> str:
    """Metrics "PREFIX0", "PREFIX1", ... (layers) by step, as inline SVG; gaps stay blank."""
    steps, values = layer_values(rows, prefix, x)
    with rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set(title=title, xlabel=x, ylabel=ylabel)
        if values.size:
            low, high = limits or (None, None)
            columns = np.arange(len(steps) + 1) - 0.5
            lines = np.arange(len(values) + 1) - 0.5
            image = axes.pcolormesh(columns, lines, values, vmin=low, vmax=high, cmap="viridis")
            figure.colorbar(image, ax=axes)
            shown = np.unique(
                np.linspace(0, len(steps) - 1, min(6, len(steps))).round().astype(int)
            )
            axes.set_xticks(shown, [f"{steps[i]:g}" for i in shown])
            axes.yaxis.get_major_locator().set_params(integer=True)
        else:
            _say_empty(axes)
        return _svg(figure)


def scatter(
    groups: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    *,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    size: tuple[float, float] = (4.6, 4.2),
) -> str:
    """{label: (x, y, low, high)}: y with its interval against x, and the line where they are
    equal, as inline SVG."""
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        ends = [value for x, *_ in groups.values() for value in (np.min(x), np.max(x))]
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color="0.6", linewidth=0.8)
        for i, (label, (x, y, low, high)) in enumerate(groups.items()):
            # An interval of resampled fits need not hold the fit itself.
            bars = [np.maximum(y - low, 0.0), np.maximum(high - y, 0.0)]
            style = {"fmt": "o", "markersize": 3.5, "elinewidth": 0.8, "color": f"C{i}"}
            axes.errorbar(x, y, yerr=bars, label=label, **style)
        axes.legend(fontsize=8, frameon=False)
        return _svg(figure)


def histogram(
    groups: Mapping[str, np.ndarray],
    edges: np.ndarray,
    *,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "rows",
    log_x: bool = False,
    size: tuple[float, float] = (4.6, 2.8),
) -> str:
    """{label: values} counted between the edges, as outlines, as inline SVG; NaN is left out."""
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        known = {name: values[~np.isnan(values)] for name, values in groups.items()}
        known = {name: values for name, values in known.items() if len(values)}
        for i, (label, values) in enumerate(known.items()):
            counts, _ = np.histogram(values, edges)
            axes.stairs(counts, edges, label=label or None, color=f"C{i}")
        if log_x and known:
            axes.set_xscale("log")
        if not known:
            _say_empty(axes)
        elif len(known) > 1:
            axes.legend(fontsize=8, frameon=False)
        return _svg(figure)


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve y(x); with a band from `low` to `high`, and with `points` (x, y) of its colour."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    points: tuple[np.ndarray, np.ndarray] | None = None


def lines(
    named: Mapping[str, Line],
    *,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    log_x: int = 0,
    log_y: int = 0,
    size: tuple[float, float] = (5.6, 3.6),
) -> str:
    """{label: line} as inline SVG. log_x, log_y: the base of a logarithmic axis (0: linear)."""
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        if log_x:
            axes.set_xscale("log", base=log_x)
        if log_y:
            axes.set_yscale("log", base=log_y)
            axes.yaxis.set_major_formatter("{x:g}")
        for i, (label, line) in enumerate(named.items()):
            axes.plot(line.x, line.y, color=f"C{i}", label=label)
            if line.points is not None:
                style = {"linestyle": "", "marker": "o", "markersize": 2.5, "alpha": 0.6}
                axes.plot(*line.points, color=f"C{i}", **style)
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=f"C{i}", alpha=0.15, lw=0)
        if not named:
            _say_empty(axes)
        elif len(named) > 1:
            axes.legend(fontsize=8, frameon=False)
        return _svg(figure)


def shares(
    named: Mapping[str, float],
    *,
    title: str = "",
    xlabel: str = "",
    size: tuple[float, float] = (9.4, 1.7),
) -> str:
    """{label: amount} as one bar, a piece each in order, as inline SVG; nothing is left out of its
    length, labels are given from half a percent on."""
    with rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set(title=title, xlabel=xlabel, yticks=[])
        total, left = sum(named.values()), 0.0
        for i, (name, amount) in enumerate(named.items()):
            label = f"{name} {amount / total:.1%}" if total and amount >= 0.005 * total else None
            axes.barh(
                0.0, amount, left=left, color=f"C{i % 10}", hatch="//" * (i >= 10), label=label
            )
            left += amount
        if total:
            axes.set_xlim(0.0, total)
            figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)
        else:
            _say_empty(axes)
        return _svg(figure)


def layer_values(rows: Rows, prefix: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """(x [steps], values [layers, steps], NaN where missing) of the metrics PREFIX + number."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)")
    found = {key: int(m[1]) for row in rows for key in row if (m := pattern.fullmatch(key))}
    steps = np.array(
        sorted({float(r[x]) for r in rows if r.keys() & found.keys() and x in r}), np.float64
    )
    values = np.full((max(found.values(), default=-1) + 1, len(steps)), np.nan)
    for key, layer in found.items():
        at, y = series(rows, key, x)
        values[layer, np.searchsorted(steps, at)] = y
    return steps, values


def smoothed(y: np.ndarray, weight: float) -> np.ndarray:
    """Exponential mean with `weight` of the past, corrected for its start (a true mean)."""
    total = norm = 0.0
    out = np.empty_like(y)
    for i, value in enumerate(y):
        total, norm = weight * total + value, weight * norm + 1.0
        out[i] = total / norm
    return out


def _draw(
    axes: Axes,
    rows: Rows,
    key: str | Mapping[str, str],
    title: str,
    ylabel: str,
    x: str,
    smooth: float,
    interval: Mapping[str, tuple[str, str]],
) -> None:
    axes.set(title=title, xlabel=x, ylabel=ylabel)
    named = {"": key} if isinstance(key, str) else key
    drawn = 0
    for label, metric in named.items():
        at, y = series(rows, metric, x)
        if not len(at):
            continue
        marker = "o" if len(at) == 1 else None
        color = f"C{drawn}"
        if smooth:
            axes.plot(at, y, color=color, alpha=0.25, linewidth=0.8)
        line = smoothed(y, smooth) if smooth else y
        axes.plot(at, line, color=color, marker=marker, label=label or None)
        if metric in interval:
            low_key, high_key = interval[metric]
            banded = [
                r for r in rows if all(isinstance(r.get(k), int | float) for k in interval[metric])
            ]
            at, low = series(banded, low_key, x)
            _, high = series(banded, high_key, x)
            axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
        drawn += 1
    if not drawn:
        _say_empty(axes)
    elif len(named) > 1:
        axes.legend(fontsize=8, frameon=False)


def _say_empty(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes)


def _svg(figure: Figure) -> str:
    """The <svg> element alone: no XML declaration, no doctype, no date."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].strip()
