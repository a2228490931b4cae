"""Chips, how much they hold, and TPU slices that need not be there.

Sizes are bytes; where text says GB it means 1e9 of them. A chip's `memory` is what programs may
use: for TPUs what their compiler allows (it keeps some for itself, and vendors' "95 GB" are GiB),
for GPUs what the driver reports as total.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from pr2jax.core.config import ConfigError

GB = 1e9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip. `dims`: of a TPU slice's shape (0: no TPU); `cores`: what its type counts;
    `flops`: its dense bf16 peak in FLOP/s by its maker's data sheet (0: not known); `kind`: how
    JAX names it."""

    name: str
    memory: int
    platform: str = "gpu"
    dims: int = 0
    accelerator: str = ""
    cores: int = 1
    flops: float = 0.0
    kind: str = ""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(30.75 * GIB), "tpu", 3, "v4", 2, 275e12, "TPU v4"),
        Chip("v5e", int(15.75 * GIB), "tpu", 2, "v5litepod", 1, 197e12, "TPU v5 lite"),
        Chip("v5p", int(95.73 * GIB), "tpu", 3, "v5p", 2, 459e12, "TPU v5"),
        Chip("v6e", int(31.24 * GIB), "tpu", 2, "v6e", 1, 918e12, "TPU v6 lite"),
        Chip("a100-40gb", 40960 * 2**20, flops=312e12, kind="A100-SXM4-40GB"),
        Chip("a100-80gb", 81920 * 2**20, flops=312e12, kind="A100-SXM4-80GB"),
        Chip("h100", 81559 * 2**20, flops=989e12, kind="H100 80GB HBM3"),
        Chip("h200", 143771 * 2**20, flops=989e12, kind="H200"),
        Chip("l4", 23034 * 2**20, flops=121e12, kind="L4"),
        Chip("rtx4090", 24564 * 2**20, flops=165e12, kind="GeForce RTX 4090"),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind that work together: a TPU slice of some shape, or so many GPUs."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Chips."""
        return math.prod(self.shape)


def parse_topology(name: str) -> Topology:
    """The topology "v5p:4x4x2", "v5e:2x4", "h100:8" or "h100" (one).

    Raises ConfigError for a chip that is not known, or a shape that it cannot have.
    """
    kind, colon, rest = name.lower().partition(":")
    chip = CHIPS.get(kind)
    if chip is None:
        raise ConfigError(f"--topology: no chip {kind!r} is known; there are {', '.join(CHIPS)}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", rest or "1") or (colon and not rest):
        raise ConfigError(f"--topology: {name!r} is not like v5p:4x4x2, v5e:2x4 or h100:8")
    shape = tuple(int(n) for n in (rest or "1").split("x"))
    if chip.dims and len(shape) != chip.dims:
        like = "x".join(["2"] * chip.dims)
        raise ConfigError(
            f"--topology: {name!r}: a {kind} slice has {chip.dims} dimensions, like {kind}:{like}"
        )
    if not chip.dims and len(shape) != 1:
        raise ConfigError(f"--topology: {name!r}: so many {kind} have no shape, like {kind}:8")
    return Topology(name.lower(), chip, shape)


def compiler_environment(topology: Topology) -> dict[str, str]:
    """Environment in which libtpu compiles for a slice on a machine that has none."""
    chip = topology.chip
    return {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is opened: several may compile at a time
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{chip.accelerator}-{topology.size * chip.cores}",
    }


def absent_devices(topology: Topology) -> Sequence[Any]:
    """Devices of a TPU slice that is not there: programs compile for them and do not run.

    Sets this process's environment, so no device may have been used in it before. Raises
    ConfigError where libtpu is not installed, does not know the slice, or the chip is no TPU.
    """
    if not topology.chip.dims:
        raise ConfigError(
            f"--topology: {topology.name}: programs are compiled for TPUs only; --estimate answers "
            "for other chips"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            '--compile_only: the TPU compiler is not installed; pip install "jax[tpu]"'
        )
    os.environ.update(compiler_environment(topology))
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(topology.name, "tpu").devices
    except Exception as error:  # whatever the plugin raises is about this name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"--topology: libtpu has no slice {topology.name}: {reason}") from None
    if len(devices) != topology.size:
        raise ConfigError(
            f"--topology: {topology.name}: libtpu makes {len(devices)} devices of {topology.size} "
            "chips (a device a core), which is not compiled for; --estimate counts by chips"
        )
    return devices


def peak_flops(kind: str | None = None) -> float:
    """Dense bf16 peak in FLOP/s of one of this process's devices, or of the kind that JAX calls
    `kind`; 0 where it is not known (a CPU: its clock is not one number)."""
    if kind is None:
        kind = jax.devices()[0].device_kind
    kind = kind.removeprefix("NVIDIA ")
    return next((chip.flops for chip in CHIPS.values() if chip.kind == kind), 0.0)


def needed_bytes(compiled: Any) -> int:
    """Bytes a device of a compiled program, by the compiler: arguments, results that are not
    written over them, and temporaries."""
    sizes = compiled.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return int(sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes)


def local_chip() -> tuple[Chip, int]:
    """This machine's memory as a chip, and how many of it there are (CPU: one, all its RAM)."""
    devices = jax.local_devices()
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        kind, platform = devices[0].device_kind, devices[0].platform
        return Chip(kind, int(stats["bytes_limit"]), platform), len(devices)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    return Chip("this machine's memory", memory, "cpu"), 1
