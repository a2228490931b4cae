"""What a compile check found: a table for people, compile.json for programs.

Keys of compile.json: `topology`, `chip`, `chips`, `chip_bytes`, `mesh`, `compute_dtype`, `model`
(`parameters`, `active`), `programs` (a list; see `ProgramReport`), `resident` (bytes a chip by
name), `resident_bytes`, `largest_transient_bytes`, `need_bytes`, `fits`, `verdict`, `kernels`,
`versions`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Mapping
from typing import Any

from pr2jax.core import hlo
from pr2jax.core.hardware import GB, GIB, Topology
from pr2jax.core.metrics import write_json
from pr2jax.core.store import as_path
from pr2jax.models.flops import active_params, total_params
from pr2jax.train.shapes import Setup

COMPILE_JSON = "compile.json"


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One compiled program; bytes are of one chip.

    Attributes:
      argument_bytes, output_bytes, alias_bytes, temp_bytes: as the compiler says; aliased outputs
        take the place of arguments.
      collectives: by kind, trips of loops multiplied.
      flops: "model" and "executed" operations of one run over all chips, by formula.
      precision: scope -> {"f32 x f32 highest": products of that kind in the text}.
      kernels: executions of hand-written kernels, by name.
      untold_loops: loops whose trips are known only when they run.
      kept: whether its outputs are counted among what is resident.
      error: why it did not compile (it needs more than the chip has), else "".
      needed: what the compiler said that it needs, where it failed for that.
    """

    name: str
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0
    temp_bytes: int = 0
    collectives: Mapping[str, hlo.Traffic] = dataclasses.field(default_factory=dict)
    flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    precision: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    untold_loops: tuple[str, ...] = ()
    kept: bool = False
    seconds: float = 0.0
    error: str = ""
    needed: int = 0

    @property
    def transient_bytes(self) -> int:
        """What it needs beside what is resident."""
        fresh = 0 if self.kept else max(self.output_bytes - self.alias_bytes, 0)
        return self.temp_bytes + fresh


@dataclasses.dataclass(frozen=True)
class Result:
    """What a compile check found. `resident`: bytes a chip of each thing that stays on it.

    `kernels`: which attention and which grouped matmul each kind of program was built with.
    """

    topology: Topology
    setup: Setup
    programs: list[ProgramReport]
    resident: dict[str, int]
    kernels: dict[str, str]

    @property
    def need(self) -> int:
        """Bytes a chip: all that is resident and the largest program's temporaries."""
        failed = max((p.needed for p in self.programs), default=0)
        largest = max((p.transient_bytes for p in self.programs), default=0)
        return max(failed, sum(self.resident.values()) + largest)

    @property
    def fits(self) -> bool:
        """Whether that is on the chip, and every program compiled."""
        compiled = not any(p.error for p in self.programs)
        return compiled and self.need <= self.topology.chip.memory

    @property
    def verdict(self) -> str:
        """One line."""
        chip = self.topology.chip
        told = f"{self.need / GB:.1f} of {chip.memory / GB:.1f} GB a chip"
        unit = f"{self.topology.size} {chip.name}; {chip.memory / GIB:.2f} GiB; GB = 1e9 bytes"
        failed = [p.name for p in self.programs if p.error]
        if failed:
            return f"does not fit: {', '.join(failed)} did not compile; at least {told} ({unit})"
        return f"{'fits' if self.fits else 'does not fit'}: {told} ({unit})"


def to_json(result: Result) -> dict[str, Any]:
    """compile.json's content."""
    setup, topology = result.setup, result.topology
    programs = []
    for program in result.programs:
        row = dataclasses.asdict(program)
        row["transient_bytes"] = program.transient_bytes
        programs.append(row)
    return {
        "topology": topology.name,
        "chip": topology.chip.name,
        "chips": topology.size,
        "chip_bytes": topology.chip.memory,
        "mesh": dict(setup.mesh.shape),
        "compute_dtype": setup.dtype.name,
        "model": {
            "parameters": total_params(setup.cfg.model),
            "active": active_params(setup.cfg.model),
        },
        "programs": programs,
        "resident": result.resident,
        "resident_bytes": sum(result.resident.values()),
        "largest_transient_bytes": max((p.transient_bytes for p in result.programs), default=0),
        "need_bytes": result.need,
        "fits": result.fits,
        "verdict": result.verdict,
        "kernels": result.kernels,
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "libtpu")},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def table(rows: list[list[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / GB:.3f}"


def _memory(result: Result) -> str:
    rows = [["GB a chip", "arguments", "outputs", "aliased", "temporaries", "beside resident"]]
    for p in result.programs:
        if p.error:
            rows.append([p.name, p.error, "", "", "", ""])
            continue
        sizes = (p.argument_bytes, p.output_bytes, p.alias_bytes, p.temp_bytes, p.transient_bytes)
        rows.append([p.name, *map(_gb, sizes)])
    return table(rows)


def _collectives(result: Result) -> str:
    rows = [["collectives a chip", "kind", "times", "GB", "mostly"]]
    for p in result.programs:
        for kind, found in p.collectives.items():
            rows.append([p.name, kind, str(found.count), _gb(found.bytes), found.wire_dtype])
    if len(rows) == 1:
        return "no collectives"
    untold = [f"{p.name}: {len(p.untold_loops)}" for p in result.programs if p.untold_loops]
    note = "\nloops whose trips are known only when they run: " + "; ".join(untold)
    return table(rows) + (note if untold else "")


def _flops(result: Result) -> str:
    rows = [["operations, all chips", "model", "executed, at most", "ratio"]]
    for p in result.programs:
        model, executed = p.flops.get("model", 0), p.flops.get("executed", 0)
        if model:
            rows.append([p.name, f"{model:.4g}", f"{executed:.4g}", f"{executed / model:.3f}"])
    return table(rows)


def _precision(result: Result) -> str:
    kinds: dict[str, dict[str, int]] = {}
    for p in result.programs:
        for scope, found in p.precision.items():
            own = kinds.setdefault(scope, {})
            for kind, count in found.items():
                own[kind] = own.get(kind, 0) + count
    rows = [["products", "kind and number in the programs' text"]]
    for scope, found in kinds.items():
        rows.append([scope, ", ".join(f"{kind}: {count}" for kind, count in found.items())])
    return table(rows)


def _kernels(result: Result) -> str:
    lines = [f"{name}: {chosen}" for name, chosen in result.kernels.items()]
    for p in result.programs:
        if p.kernels:
            told = ", ".join(f"{name} x {count}" for name, count in p.kernels.items())
            lines.append(f"{p.name}: custom kernels {told}")
    return "\n".join(lines)


def _resident(resident: Mapping[str, int], largest: int) -> str:
    rows = [["resident, GB a chip", ""]] + [[k, _gb(v)] for k, v in resident.items()]
    rows.append(["largest program's temporaries", _gb(largest)])
    rows.append(["together", _gb(sum(resident.values()) + largest)])
    return table(rows)


def text(result: Result) -> str:
    """All tables, and the verdict as the last line."""
    largest = max((p.transient_bytes for p in result.programs), default=0)
    parts = (
        _memory(result),
        _collectives(result),
        _flops(result),
        _precision(result),
        _kernels(result),
        _resident(result.resident, largest),
        result.verdict,
    )
    return "\n\n".join(parts)


def write_report(result: Result, workdir: str | os.PathLike) -> None:
    """Prints `text` and writes workdir/compile.json."""
    write_json(as_path(workdir) / COMPILE_JSON, to_json(result))
    print(text(result), flush=True)
