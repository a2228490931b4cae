"""Rows out of what sides answered, and how they compare."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from pr2jax.benchmark.sides import BenchmarkError, Side
from pr2jax.benchmark.table import spread

LOSS_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Entry:
    """A side of a comparison, ready to be measured.

    Attributes:
      kind: "ours" or "peer".
      dtype: precision of the products.
      ready: what it answered once it was prepared.
    """

    side: Side
    kind: str
    dtype: str
    ready: dict[str, Any]


def round_seconds(answers: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds of a step, one figure a round (the median of its steps)."""
    return [statistics.median(answer["seconds"]) for answer in answers]


def row(entry: Entry, answers: Sequence[dict[str, Any]], units: float, flops: float) -> dict:
    """One row of the report; `units` (tokens, steps) and `flops` are of one step."""
    ready = entry.ready
    seconds = spread([s for answer in answers for s in answer["seconds"]])
    names = dict.fromkeys(name for answer in answers for name in answer.get("parts", {}))
    parts = {n: spread([s for answer in answers for s in answer["parts"][n]]) for n in names}
    rate = flops / seconds["median"]
    # The best there was: on a busy machine a single try tells of the others.
    peak = max(answer["peak_flops"] for answer in (ready, *answers))
    return {
        "name": entry.side.name,
        "side": entry.kind,
        "dtype": entry.dtype,
        "settings": ready.get("settings", {}),
        "tries": ready.get("tries", {}),
        "seconds": seconds,
        "per_second": {
            "median": units / seconds["median"],
            "min": units / seconds["max"],
            "max": units / seconds["min"],
        },
        "parts": parts,
        "compile_seconds": ready["compile_seconds"],
        "peak_rss_bytes": max(answer["peak_rss_bytes"] for answer in answers),
        "prepare_peak_rss_bytes": ready["peak_rss_bytes"],
        "flops": flops,
        "flops_per_second": rate,
        "peak_flops": peak,
        "share_of_peak": rate / peak,
        "versions": ready["versions"],
    }


def ratio(name: str, to: str, mine: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """How much faster `name` is than `to`, round by round."""
    pairs = [b / a for a, b in zip(mine, other, strict=True)]
    return {"row": name, "to": to, **spread(pairs)}


def against_best_peer(
    entries: Sequence[Entry], answers: Sequence[Sequence[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Ratios of each of ours to the fastest peer (none without one)."""
    seconds = [round_seconds(a) for a in answers]
    peers = [i for i, e in enumerate(entries) if e.kind == "peer"]
    if not peers:
        return []
    best = min(peers, key=lambda i: statistics.median(seconds[i]))
    name = entries[best].side.name
    return [
        ratio(e.side.name, name, seconds[i], seconds[best])
        for i, e in enumerate(entries)
        if e.kind == "ours"
    ]


def check_losses(entries: Sequence[Entry]) -> dict[str, Any] | None:
    """Both sides' losses in fp32 before the first step, and after it; None without both.

    Raises BenchmarkError where the first ones differ by more than LOSS_TOLERANCE nats: the sides
    would not compute the same.
    """
    exact = {e.kind: e for e in reversed(entries) if e.dtype == "float32"}
    if exact.keys() != {"ours", "peer"}:
        return None
    ours, peer = exact["ours"], exact["peer"]
    mine, theirs = ours.ready["losses"], peer.ready["losses"]
    difference = abs(mine[0] - theirs[0])
    if not difference <= LOSS_TOLERANCE:
        raise BenchmarkError(
            f"the two sides do not compute the same: loss {mine[0]:.6f} ({ours.side.name}) against "
            f"{theirs[0]:.6f} ({peer.side.name}) on the same tokens"
        )
    return {
        "row": ours.side.name,
        "peer": peer.side.name,
        "losses": mine,
        "peer_losses": theirs,
        "first_difference": difference,
    }
