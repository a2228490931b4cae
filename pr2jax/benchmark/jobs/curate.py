"""Curation of files, in a process whose memory is nothing else's."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pr2jax.benchmark.serve import Channel
from pr2jax.core.device import versions
from pr2jax.core.metrics import SUMMARY
from pr2jax.tasks.filters import CurateConfig
from pr2jax.train.config import Config
from pr2jax.train.curate import run_curate


def serve(channel: Channel, params: dict[str, Any]) -> None:
    """params: inputs, against, workdir, settings (of CurateConfig). A round runs it anew."""
    curate = CurateConfig(
        inputs=tuple(params["inputs"]), against=tuple(params["against"]), **params["settings"]
    )
    curate.validate()
    cfg = Config(mode="curate", curate=curate)

    def measure(message: dict[str, Any]) -> dict[str, Any]:
        workdir = Path(params["workdir"]) / f"round_{message['round']}"
        began = time.process_time()
        run_curate(cfg, str(workdir))
        cpu = time.process_time() - began
        summary = json.loads((workdir / SUMMARY).read_text(encoding="utf-8"))
        return {"workdir": str(workdir), "summary": summary, "cpu_seconds": cpu}

    channel.loop({"versions": versions()}, measure)
