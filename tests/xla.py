"""XLA's flags for tests: fake CPU devices, and machine code that is made fast rather than fast.

Most of the suite's time is compilation of programs that run for milliseconds; without LLVM's
optimizations it halves. What a program computes is the same up to rounding.
"""

_QUICK = "--xla_backend_optimization_level=0"
_DEVICES = "--xla_force_host_platform_device_count"


def flags(devices: int, given: str = "") -> str:
    """XLA_FLAGS for a process of so many devices; what is `given` stands."""
    added = [f"{_DEVICES}={devices}", _QUICK]
    own = [flag for flag in added if flag.partition("=")[0] not in given]
    return " ".join([*given.split(), *own])
