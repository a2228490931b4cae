"""Whether this machine is quiet enough for a figure to mean something."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

QUIET_LOAD = 0.5
QUIET_SHARE = 0.1


def _busy_ticks() -> tuple[int, int] | None:
    """(busy, all) CPU ticks of the machine so far; None where the system does not tell."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return None
    ticks = [int(x) for x in first[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def quietness(seconds: float = 1.0) -> dict[str, Any]:
    """{load_1min, busy_share, quiet}: the load before now, and the share of CPU time that others
    use while this process sleeps for `seconds`. `busy_share` is None where it cannot be read."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    before = _busy_ticks()
    time.sleep(seconds)
    after = _busy_ticks()
    share = None
    if before and after and after[1] > before[1]:
        share = (after[0] - before[0]) / (after[1] - before[1])
    calm = (load is None or load < QUIET_LOAD) and (share is None or share < QUIET_SHARE)
    return {"load_1min": load, "busy_share": share, "quiet": calm}


def warning(found: dict[str, Any]) -> str:
    """One line where the machine is not quiet, else ""."""
    if found["quiet"]:
        return ""
    share = "unknown" if found["busy_share"] is None else f"{found['busy_share']:.0%}"
    return (
        f"other processes use this machine (load {found['load_1min']:.1f}, {share} of the CPU): "
        "absolute figures will be wrong, and ratios uncertain"
    )
