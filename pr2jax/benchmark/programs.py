"""What isolation costs a program, and how many are judged a second: `... benchmark sandbox`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from pr2jax.benchmark import table
from pr2jax.benchmark.commands import Options
from pr2jax.benchmark.sides import BenchmarkError
from pr2jax.core.device import usable_cores, versions
from pr2jax.tasks.base import Problem
from pr2jax.tasks.pool import VerifierPool
from pr2jax.tasks.sandbox import TIERS, Sandbox, SandboxConfig, SandboxError

PROGRAM = "print(int(input()) + 1)"
_TRIES = 20  # runs of each way in a round


def sandbox(options: Options) -> tuple[dict[str, Any], str]:
    """What the sandbox adds to an interpreter's start, and programs judged a second; the report."""
    opened, missing = {}, {}
    for tier in TIERS:
        try:
            opened[tier] = Sandbox(SandboxConfig(isolation=tier))
        except SandboxError as error:
            missing[tier] = str(error)
    if not opened:
        raise BenchmarkError("; ".join(missing.values()))
    ways = {"plain": _plain} | {tier: _within(box) for tier, box in opened.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tries = 2 if options.smoke else _TRIES
    for run in ways.values():
        run()
    for _ in range(options.repeats):
        for _ in range(tries):
            for name, run in ways.items():  # in turns: a machine that slows down slows all
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    for box in opened.values():
        box.close()
    pool = _parallel(options.sizes.rows)
    rows = [
        {
            "name": name,
            "median": statistics.median(s),
            "min": min(s),
            "max": max(s),
            "tries": len(s),
        }
        for name, s in seconds.items()
    ]
    plain = rows[0]["median"]
    for row in rows:
        row["over_plain"] = row["median"] - plain
    report = {
        "rows": [],
        "machine": versions(),
        "start": rows,
        "missing": missing,
        "parallel": pool,
    }
    lines = [
        [row["name"], *(f"{1e3 * row[k]:.1f}" for k in ("median", "min", "max", "over_plain"))]
        for row in rows
    ]
    text = [
        "one program, from its text to its output (ms); plain: a fresh interpreter without site",
        table.render(["", "median", "min", "max", "over plain"], lines),
        f"{pool['programs']} programs by {pool['workers']} workers ({pool['tier']}): "
        f"{pool['per_second']:.0f} programs/s, {pool['wrong_verdicts']} wrong verdicts",
        *(f"{tier}: not here ({why})" for tier, why in missing.items()),
    ]
    return report, "\n".join(text)


def _plain() -> None:
    python = [os.path.realpath(sys._base_executable), "-I", "-S", "-B", "-c", PROGRAM]
    done = subprocess.run(python, input=b"1\n", capture_output=True, check=True)
    assert done.stdout == b"2\n"


def _within(box: Sandbox) -> Callable[[], None]:
    def run() -> None:
        assert box.run(PROGRAM, "1\n").stdout == b"2\n"

    return run


def _parallel(programs: int) -> dict[str, Any]:
    """Honest programs, a fifth of them wrong, through a pool with a worker a core."""
    cases, wanted = [], []
    for i in range(programs):
        tests = json.dumps({"inputs": [f"{i}\n"], "outputs": [f"{2 * i}\n"]})
        right = i % 5 > 0
        text = f"```python\nprint(int(input()) + {i if right else i + 1})\n```"
        cases.append((Problem(str(i), "?", tests, "codegen__benchmark"), text))
        wanted.append(float(right))
    workers = usable_cores()
    with VerifierPool(workers, timeout_s=60) as pool:
        pool.score_batch(cases[: 4 * workers])  # workers start, and open their sandboxes
        start = time.perf_counter()
        verdicts = pool.score_batch(cases)
        seconds = time.perf_counter() - start
    return {
        "programs": programs,
        "workers": workers,
        "seconds": seconds,
        "per_second": programs / seconds,
        "wrong_verdicts": sum(v.score != w for v, w in zip(verdicts, wanted, strict=True)),
        "tier": verdicts[0].reason.rpartition("[")[2].rstrip("]"),
    }
