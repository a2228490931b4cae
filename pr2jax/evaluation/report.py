"""A run's report as one HTML file: no script, no request, readable in light and dark.

Sections are built of blocks (`paragraph`, `table`, `figures`, `intervals`, `transcripts`,
`settings`). Every text is escaped here, so that what a model wrote stays text; only `Html`, which
only this module makes, is taken as markup.
"""

import dataclasses
import html
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pr2jax.core.files import replacing
from pr2jax.core.store import as_path, storing
from pr2jax.evaluation.passk import PASS_SCORE, Interval
from pr2jax.evaluation.runner import Sample
from pr2jax.evaluation.style import STYLE

# matplotlib's first colours, and the page's names for them: each theme has its own shade.
_SERIES = {"#1f77b4": "a", "#ff7f0e": "b", "#2ca02c": "c", "#d62728": "d", "#9467bd": "e"}


class Html(str):
    """Markup made by this module."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and its blocks; a block that is plain text becomes a paragraph."""

    title: str
    blocks: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Tile:
    """A headline figure: its name, its value, and a line beneath."""

    label: str
    value: str
    note: str = ""


def escape(text: Any) -> Html:
    """`text` as HTML text. Control characters become visible: a model may write any byte."""
    visible = "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in str(text)
    )
    visible = visible.encode("utf-8", errors="replace").decode("utf-8")
    return Html(html.escape(visible, quote=True))


def paragraph(text: str) -> Html:
    """A paragraph."""
    return Html(f"<p>{escape(text)}</p>")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> Html:
    """A table; numbers and intervals stand to the right. Raises ValueError for a ragged row."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"row {list(row)} has {len(row)} cells, the header {len(header)}")
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return Html(
        f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | Interval):
        return f"<td>{escape(value)}</td>"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f'<td class="number">{escape(text)}</td>'


def figures(items: Sequence[tuple[str, str]]) -> Html:
    """(svg, caption) pairs side by side. The SVGs are those of `core.plots`."""
    cells = "".join(
        f"<figure>{_themed(svg)}<figcaption>{escape(caption)}</figcaption></figure>"
        for svg, caption in items
    )
    return Html(f'<div class="figures">{cells}</div>')


def _themed(svg: str) -> str:
    """Lets the page's colours through: no white paper, ink in the text colour."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg.replace("fill: #ffffff", "fill: none").replace("#000000", "currentColor")
    for color, name in _SERIES.items():
        svg = svg.replace(color, f"var(--series-{name})")
    # The size is the page's to choose; the view box keeps the proportions.
    opening, rest = svg[: svg.index(">")], svg[svg.index(">") :]
    return re.sub(r' (width|height)="[^"]*"', "", opening) + rest


def intervals(rows: Sequence[tuple[str, Interval]], low: float = 0.0, high: float = 1.0) -> Html:
    """Means with their intervals as bars on a common scale from `low` to `high`."""
    if high <= low:
        raise ValueError(f"the scale from {low} to {high} is empty")

    def at(x: float) -> float:
        return 100.0 * (min(max(x, low), high) - low) / (high - low)

    lines = []
    for label, value in rows:
        left, right = at(value.low), at(value.high)
        lines.append(
            f'<div class="label">{escape(label)}</div><div class="track">'
            f'<span class="range" style="left:{left:.2f}%;width:{right - left:.2f}%"></span>'
            f'<span class="mean" style="left:{at(value.mean):.2f}%"></span></div>'
            f'<div class="value">{escape(value)}</div>'
        )
    scale = (
        f'<div></div><div class="scale"><span>{low:g}</span><span>{high:g}</span></div><div></div>'
    )
    return Html(f'<div class="intervals">{"".join(lines)}{scale}</div>')


def transcripts(
    before: Sequence[Sample],
    after: Sequence[Sample],
    *,
    names: tuple[str, str] = ("Before", "After"),
    limit: int = 8,
    responses: int = 4,
) -> Html:
    """Responses to the same problems side by side, the first `responses` of each.

    Shown are `limit` problems spread evenly over the list, not chosen by how well they went.
    Raises ValueError where the two lists are not of the same problems.
    """
    if [s.problem.id for s in before] != [s.problem.id for s in after]:
        raise ValueError("transcripts: before and after are not of the same problems")
    columns = list(zip(names, (before, after), strict=True))
    return side_by_side(columns, limit=limit, responses=responses)


def side_by_side(
    columns: Sequence[tuple[str, Sequence[Sample]]], *, limit: int = 8, responses: int = 4
) -> Html:
    """`transcripts` of any number of (name, samples) columns.

    Raises ValueError where they are not of the same problems.
    """
    ids = [[s.problem.id for s in samples] for _, samples in columns]
    if any(other != ids[0] for other in ids):
        raise ValueError("transcripts: the columns are not of the same problems")
    total = len(ids[0])
    count = min(limit, total)
    # Two share the width evenly; more wrap where they would become too narrow to read.
    wrap = "repeat(auto-fit, minmax(min(20rem, 100%), 1fr))"
    style = f' style="grid-template-columns:{wrap}"' if len(columns) != 2 else ""
    parts = []
    for i in (i * total // count for i in range(count)):
        problem = columns[0][1][i].problem
        cells = "".join(
            f"<div><h4>{escape(name)}</h4>{_responses(samples[i], responses)}</div>"
            for name, samples in columns
        )
        parts.append(
            f'<article class="problem"><div class="prompt"><pre>{escape(problem.prompt)}</pre>'
            f'<span class="answer">reference: {escape(problem.answer)}</span></div>'
            f'<div class="pair"{style}>{cells}</div></article>'
        )
    note = f"{count} of {total} problems, evenly spaced; {responses} responses each at most."
    return Html(f'<p class="note">{escape(note)}</p>{"".join(parts)}')


def _responses(sample: Sample, count: int) -> str:
    parts = []
    for text, score, reason in list(
        zip(sample.responses, sample.scores, sample.reasons, strict=True)
    )[:count]:
        kind = "right" if score >= PASS_SCORE else "wrong"
        why = f'<span class="reason">{escape(reason)}</span>' if reason else ""
        parts.append(
            f'<div class="response {kind}"><pre>{escape(text) or "&#8203;"}</pre>'
            f'<span class="score">{score:.2f}</span>{why}</div>'
        )
    return "".join(parts)


def settings(values: Mapping[str, Any], title: str = "Configuration") -> Html:
    """A nested configuration as a folded table of dotted keys."""
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td><td><code>{escape(value)}</code></td></tr>"
        for key, value in _flatten(values)
    )
    return Html(
        f"<details><summary>{escape(title)}</summary>"
        f'<div class="scroll"><table>{rows}</table></div></details>'
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            out += _flatten(value, f"{prefix}{key}.")
        else:
            out.append((f"{prefix}{key}", value))
    return out


def _tile(tile: Tile) -> str:
    return (
        f'<div class="tile"><span class="tile-label">{escape(tile.label)}</span>'
        f'<span class="tile-value">{escape(tile.value)}</span>'
        f'<span class="note">{escape(tile.note)}</span></div>'
    )


def write_report(
    path: str | os.PathLike[str],
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    tiles: Sequence[Tile] = (),
) -> None:
    """Writes the page to `path`, whole or not at all."""
    body = []
    for number, section in enumerate(sections, start=1):
        blocks = "".join(b if isinstance(b, Html) else paragraph(b) for b in section.blocks)
        body.append(f'<section id="s{number}"><h2>{escape(section.title)}</h2>{blocks}</section>')
    links = "".join(
        f'<a href="#s{i}">{escape(s.title)}</a>' for i, s in enumerate(sections, start=1)
    )
    # The policy forbids what escaping already prevents: scripts, and any request.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="note">{escape(subtitle)}</p></header>'
        f'<div class="tiles">{"".join(map(_tile, tiles))}</div><nav>{links}</nav>'
        f"<main>{''.join(body)}</main></body></html>\n"
    )
    path = as_path(path)
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(page.encode())
