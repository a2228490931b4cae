"""Metrics: (sum, weight) pairs until the host reads them, then JSONL, TensorBoard, a console line.

A pair of arrays is merged by adding, over micro-batches and devices alike, so a mean is exact
whatever the split. Extremes do not add: a name that ends in `_max` or `_min` holds (extreme, 1),
or (anything, 0) where there was nothing to measure, and merges by max or min.

`metrics.jsonl` has one JSON object a line: {"step": int, "time": unix seconds, KEY: number, ...};
a value that is not finite is written as null. A run that is killed and resumed leaves one row a
step there; TensorBoard's files may hold a step twice (its readers go by the later one).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from pr2jax.core.files import replacing
from pr2jax.core.store import Staged, as_path, storing

Metric = tuple[Float[Array, ""], Float[Array, ""]]
Metrics = dict[str, Metric]

JSONL = "metrics.jsonl"
SUMMARY = "summary.json"


def merge(a: Mapping[str, Metric], b: Mapping[str, Metric]) -> Metrics:
    """Metrics of both: pairs of a key add (`_max`, `_min`: take the extreme), others are kept."""
    merged = dict(a)
    for key, pair in b.items():
        merged[key] = _merge_pair(key, merged[key], pair) if key in merged else pair
    return merged


def _merge_pair(key: str, a: Metric, b: Metric) -> Metric:
    for end, extreme in (("_max", jnp.maximum), ("_min", jnp.minimum)):
        if key.endswith(end):
            both = extreme(a[0], b[0])
            value = jnp.where(a[1] == 0, b[0], jnp.where(b[1] == 0, a[0], both))
            return value, jnp.maximum(a[1], b[1])
    return a[0] + b[0], a[1] + b[1]


def reduce(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Weighted means as Python floats, in one transfer; a key of weight 0 is left out."""
    host = jax.device_get(dict(metrics))
    return {k: float(np.float64(s) / np.float64(w)) for k, (s, w) in host.items() if w != 0}


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a metrics file; `path` may be the workdir.

    A cut-off last line (the run was killed while writing) is left out; any other line that is not
    JSON raises ValueError naming file and line. When a resumed run wrote a step again, the later
    row is kept.
    """
    path = as_path(path)
    path = path / JSONL if path.is_dir() else path
    lines = path.read_text(encoding="utf-8").splitlines()
    rows: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not a row of metrics ({error})") from None
        rows.pop(step, None)
        rows[step] = row
    return list(rows.values())


def write_summary(workdir: str | os.PathLike, summary: Mapping[str, Any]) -> epath.Path:
    """Write `workdir/summary.json` atomically (readers see the old file or the whole new one)."""
    path = as_path(workdir) / SUMMARY
    write_json(path, summary)
    return path


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as JSON atomically; arrays become lists, not-finite numbers null.

    Only process 0 of a multi-host run writes.
    """
    if jax.process_index() != 0:
        return
    path = as_path(path)
    text = json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, text)


def _write_atomically(path: epath.Path | Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def _plain(value: Any) -> Any:
    """JSON of arrays, numpy scalars, tuples and dataclasses; not-finite numbers become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


class RowWriter:
    """Appends rows {"step": n, ...} to a JSONL file, each step once over any number of resumes.

    With `resume_step`, rows of later steps (written after the checkpoint that the run resumes
    from) are dropped first; so is what a killed writer left of its last line. Only process 0 of
    a multi-host run writes. What cannot be written raises StorageError naming the file. In a store
    rows arrive with the next `sync` or `close`, or when half a minute has passed.
    """

    def __init__(self, path: str | os.PathLike, resume_step: int | None = None):
        self._file: TextIO | None = None
        if jax.process_index() != 0:
            return
        self._path = as_path(path)
        with storing(path):
            self._staged = Staged(self._path.parent)
            file = self._staged.fetch(self._path.name)
            if file.exists():
                _trim(file, resume_step)
            self._file = open(file, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write one row, which needs a `step`."""
        if self._file is not None:
            line = json.dumps(_plain(row), allow_nan=False) + "\n"
            with storing(self._path):
                self._file.write(line)
                self._file.flush()
                self._staged.sync_now_and_then()

    def sync(self) -> None:
        """Has what was written stored, for a checkpoint that will not write it again."""
        if self._file is not None:
            with storing(self._path):
                os.fsync(self._file.fileno())
                if not os.fstat(self._file.fileno()).st_nlink:
                    raise FileNotFoundError("it was removed while the run wrote to it")
                self._staged.sync()

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            with storing(self._path):
                file.close()
                self._staged.close()


class MetricWriter:
    """Rows of metrics to `workdir/metrics.jsonl` (as `RowWriter`) and `workdir/tensorboard`."""

    def __init__(
        self,
        workdir: str | os.PathLike,
        tensorboard: bool = True,
        resume_step: int | None = None,
    ):
        workdir = as_path(workdir)
        self._rows = RowWriter(workdir / JSONL, resume_step)
        self._board = None
        if tensorboard and jax.process_index() == 0:
            from tensorboardX import SummaryWriter  # slow to import; not every reader needs it

            purge = None if resume_step is None else resume_step + 1
            self._folder = workdir / "tensorboard"
            with storing(self._folder):
                self._staged = Staged(self._folder)
                # A queue with a limit would stop us for ever once its thread cannot write.
                self._board = SummaryWriter(str(self._staged.path), purge_step=purge, max_queue=0)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one row: numbers, or (sum, weight) pairs, which are reduced here."""
        pairs = {k: v for k, v in values.items() if isinstance(v, tuple)}
        numbers = {k: v for k, v in values.items() if k not in pairs} | reduce(pairs)
        row = {"step": int(step), "time": round(time.time(), 3)} | _plain(numbers)
        self._rows.write(row)
        if self._board is not None:
            for key, value in row.items():
                if key not in ("step", "time") and isinstance(value, int | float):
                    self._board.add_scalar(key, value, step)

    def sync(self) -> None:
        """Has the rows stored."""
        self._rows.sync()
        if self._board is not None:
            with storing(self._folder):
                self._staged.sync()

    def close(self) -> None:
        """Flush and close the files."""
        board, self._board = self._board, None
        self._rows.close()
        if board is not None:
            with storing(self._folder):
                board.close()
                self._staged.close()


def _trim(path: Path, resume_step: int | None) -> None:
    """Drop rows after `resume_step`, and what a killed writer left of its last line."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        _write_atomically(path, whole)
    if resume_step is not None:
        kept = [row for row in read_jsonl(path) if row["step"] <= resume_step]
        if len(kept) < whole.count("\n"):
            _write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def format_number(value: Any) -> str:
    """Four significant digits; whole numbers in full; "nan" for what JSON calls null."""
    if value is None:
        return "nan"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """ "42s", "3m05s", "2h07m"."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Progress:
    """One live line: label, step/total, metrics, seconds a step, time left.

    On a terminal the line redraws in place; elsewhere a plain line is printed, at most one in
    `plain_interval` seconds (the first and the last always). Time left comes from an exponential
    mean of recent steps, so that compilation does not distort it for long.
    """

    def __init__(
        self,
        label: str,
        total: int,
        start: int = 0,
        stream: TextIO | None = None,
        plain_interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.label, self.total = label, total
        self._stream = stream if stream is not None else sys.stdout
        self._quiet = jax.process_index() != 0
        self._live = self._stream.isatty() and not self._quiet
        self._interval, self._clock = plain_interval, clock
        self._step, self._last = start, clock()
        self._seconds: float | None = None
        self._intervals, self._printed, self._width = 0, -math.inf, 0

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """`step` steps are done; `values` are shown in their order."""
        now = self._clock()
        if step > self._step:
            took = (now - self._last) / (step - self._step)
            # The first interval holds the compilation: the second replaces it.
            fresh = self._seconds is None or self._intervals < 2
            self._seconds = took if fresh else 0.8 * self._seconds + 0.2 * took
            self._intervals += 1
        self._step, self._last = step, now
        due = self._live or step >= self.total or now - self._printed >= self._interval
        if due and not self._quiet:
            self._printed = now
            self._show(self._line(values))

    def close(self) -> None:
        """Leave the line as it stands."""
        if self._live and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0

    def _line(self, values: Mapping[str, Any]) -> str:
        parts = [f"{self.label} {self._step}/{self.total}".strip()]
        parts += [f"{key} {format_number(value)}" for key, value in values.items()]
        if self._seconds is not None:
            parts.append(f"{self._seconds:.3g}s/step")
            left = self._seconds * (self.total - self._step)
            if self._step < self.total:
                parts.append(f"{format_seconds(left)} left")
        return " | ".join(parts)

    def _show(self, line: str) -> None:
        if self._live:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
