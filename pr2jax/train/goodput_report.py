"""A run's wall time in its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pr2jax.core.plots import shares
from pr2jax.evaluation import report as page


def blocks(found: Mapping[str, Any] | None) -> list[str]:
    """What became of all of the run's wall time."""
    if not found:
        return []
    again = f" {found['redone']} steps were done again." if found["redone"] else ""
    processes = found["processes"]
    text = (
        f"{found['goodput']:.1%} of {found['seconds']:.0f} s of wall time, over {processes} "
        f"process{'' if processes == 1 else 'es'}, went into sampling, verifying and "
        f"learning.{again}"
    )
    bar = shares(found["activities"], title="wall time", xlabel="seconds")
    return [text, page.figures([(bar, "core/goodput.py says what each part is.")])]
