"""XLA's flags by platform, in one place, each with its reason.

  python -m pr2jax.core.xla_flags [cpu|gpu|tpu]    # prints "export NAME='...'" lines for a shell

Few on purpose: XLA's defaults follow its versions, and a flag that it does not know ends the
process. What the user has set stays: a flag that XLA_FLAGS or LIBTPU_INIT_ARGS names is not added.
Nothing here starts a backend: flags are read when it starts.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple


class Flag(NamedTuple):
    """A flag without its dashes, its value, and why it is set."""

    name: str
    value: str
    why: str


VARIABLES = {"cpu": "XLA_FLAGS", "gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}
FLAGS = {
    # Of CPUs the tests compare bits: nothing is changed.
    "cpu": (),
    "gpu": (
        Flag(
            "xla_gpu_enable_latency_hiding_scheduler",
            "true",
            "gathers of weights and sums of gradients go on while layers compute",
        ),
    ),
    "tpu": (
        Flag(
            "xla_tpu_enable_async_collective_fusion",
            "true",
            "collectives run beside the products that do not need them",
        ),
        Flag(
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
            "true",
            "the same for gathers of fsdp's weights",
        ),
    ),
}


def xla_flags(platform: str) -> dict[str, str]:
    """{flag: value} of "cpu", "gpu" or "tpu". Raises ValueError for another platform."""
    if platform not in FLAGS:
        raise ValueError(f"platform: {platform!r} is none of {', '.join(FLAGS)}")
    return {flag.name: flag.value for flag in FLAGS[platform]}


def platform_here(environ: MutableMapping[str, str] | None = None) -> str:
    """The platform that JAX will take on this machine: what JAX_PLATFORMS names first, else the
    devices that are there with a plugin for them."""
    environ = os.environ if environ is None else environ
    named = environ.get("JAX_PLATFORMS", "").split(",")[0].strip()
    if named:
        return {"cuda": "gpu", "rocm": "gpu"}.get(named, named if named in FLAGS else "cpu")
    chips = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    if chips and importlib.util.find_spec("libtpu"):
        return "tpu"
    driver = Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()
    plugin = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    return "gpu" if driver and plugin else "cpu"


def merged(platform: str, present: str) -> str:
    """`present` (of the variable) with the platform's flags that it does not name."""
    known = {word.lstrip("-").partition("=")[0] for word in present.split()}
    added = [f"--{n}={v}" for n, v in xla_flags(platform).items() if n not in known]
    return " ".join([*([present.strip()] if present.strip() else []), *added])


def apply(platform: str | None = None, environ: MutableMapping[str, str] | None = None) -> str:
    """Adds the flags of `platform` (None: `platform_here`) to the environment; the platform.

    To be called before anything asks JAX for devices.
    """
    environ = os.environ if environ is None else environ
    platform = platform or platform_here(environ)
    variable = VARIABLES[platform]
    value = merged(platform, environ.get(variable, ""))
    if value:
        environ[variable] = value
    return platform


def main(argv: list[str]) -> int:
    """Prints what `apply` would set."""
    if len(argv) > 1 or (argv and argv[0] not in FLAGS):
        print(f"usage: python -m pr2jax.core.xla_flags [{'|'.join(FLAGS)}]", file=sys.stderr)
        return 2
    platform = argv[0] if argv else platform_here()
    variable = VARIABLES[platform]
    for flag in FLAGS[platform]:
        print(f"# {flag.name}: {flag.why}")
    print(f"export {variable}={shlex.quote(merged(platform, os.environ.get(variable, '')))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
