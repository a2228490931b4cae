"""What this machine multiplies fast, what it compiled, and what it runs."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import os
import platform
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from pr2jax.core.config import ConfigError
from pr2jax.core.files import user_cache
from pr2jax.core.store import Staged, as_path, is_store


def resolve_dtype(name: str, device: Any = None) -> tuple[Any, str]:
    """Chooses the compute dtype of `device` (default: the first): (dtype, a line that says why).

    "auto" is bfloat16 where the hardware multiplies it fast: TPU; NVIDIA GPUs of compute
    capability >= 8; CPUs with AMX under jax >= 0.12 (older ones gain nothing from it).

    Raises:
      ConfigError: `name` is none of "auto", "bfloat16", "float32".
    """
    if name in ("bfloat16", "float32"):
        return jnp.dtype(name), f"{name}: as configured"
    if name != "auto":
        raise ConfigError(f"compute_dtype: must be auto, bfloat16 or float32, got {name!r}")
    fast, reason = _fast_bfloat16(device or jax.devices()[0])
    dtype = "bfloat16" if fast else "float32"
    return jnp.dtype(dtype), f"{dtype}: {reason}"


def _fast_bfloat16(device: Any) -> tuple[bool, str]:
    if device.platform == "tpu":
        return True, f"{device.device_kind} multiplies bfloat16"
    if device.platform in ("gpu", "cuda"):
        capability = str(getattr(device, "compute_capability", ""))
        major = re.match(r"\d+", capability)
        fast = bool(major) and int(major[0]) >= 8
        return fast, f"{device.device_kind}, compute capability {capability or 'unknown'}"
    if device.platform == "cpu":
        if "amx_bf16" not in cpu_flags():
            return False, "this CPU has no AMX"
        if _version_tuple(jax.__version__) < (0, 12):
            return False, f"jax {jax.__version__} does not use this CPU's AMX (0.12 does)"
        return True, "this CPU has AMX, and jax >= 0.12 uses it"
    return False, f"nothing is known of the platform {device.platform!r}"


def reuse_freed_memory() -> bool:
    """Has glibc keep freed memory instead of giving it back; whether it could.

    XLA:CPU allocates its temporaries anew at every call, and large ones come from the kernel page
    by page: a sixth of a small RL step's CPU time. One arena, because a thread's own maps whatever
    is over 64 MiB, and unmaps it again, however mmap is set. Call it before anything large is
    allocated.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    keep_all, grow_by = 2**31 - 1, 256 * 2**20
    settings = ((mmap_max, 0), (arena_max, 1), (trim_threshold, keep_all), (top_pad, grow_by))
    return all(mallopt(name, value) == 1 for name, value in settings)


def setup_compilation_cache(directory: str | os.PathLike | None = None) -> epath.Path | None:
    """Turns the persistent compilation cache on; returns its folder.

    None means JAX_COMPILATION_CACHE_DIR, or a folder of the user's cache that is particular to the
    jaxlib version and the CPU's features (XLA:CPU's machine code runs only where they are the
    same).  "off" leaves it off and returns None. It may lie in a store.
    """
    # JAX opens its cache at the first compilation and would go on with that one.
    compilation_cache.reset_cache()
    if directory == "off":
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    if directory is None:
        directory = os.environ.get("JAX_COMPILATION_CACHE_DIR") or _default_cache()
    path = as_path(directory)
    if not is_store(path):
        path = path.expanduser().resolve()
        path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    # The default of a second keeps out most of a small model's programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return path


def _default_cache() -> Path:
    features = " ".join(sorted(cpu_flags())) or platform.processor()
    tag = hashlib.sha256(features.encode()).hexdigest()[:8]
    return user_cache("xla") / f"jaxlib-{_version('jaxlib')}-{platform.machine()}-{tag}"


class CompilationCounter:
    """Counts compilations from its creation until `close`.

    Attributes:
      compilations: programs that the compiler built.
      cache_hits: programs that came out of the persistent cache instead.
      seconds: wall time of both, summed over threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._programs = 0
        self.cache_hits = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    @property
    def compilations(self) -> int:
        """Programs that the compiler built so far."""
        # JAX times a cached program under the same event as a compiled one.
        return self._programs - self.cache_hits

    def snapshot(self) -> dict[str, float]:
        """{"compilations", "cache_hits", "seconds"} so far, for summary.json."""
        with self._lock:
            return {
                "compilations": self.compilations,
                "cache_hits": self.cache_hits,
                "seconds": round(self.seconds, 3),
            }

    def close(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        jax.monitoring.unregister_event_listener(self._on_event)

    def __enter__(self) -> CompilationCounter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _on_duration(self, event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            with self._lock:
                self._programs += 1
                self.seconds += duration

    def _on_event(self, event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            with self._lock:
                self.cache_hits += 1


@contextlib.contextmanager
def profile(directory: str | os.PathLike | None) -> Iterator[None]:
    """Writes a trace of what runs inside to `directory` (XProf/TensorBoard); None does nothing."""
    if directory is None:
        yield
        return
    with Staged(directory) as staged, jax.profiler.trace(str(staged.path)):
        yield


def versions() -> dict[str, Any]:
    """Software versions and hardware, for summary.json."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{p: _version(p) for p in ("jax", "jaxlib", "flax", "optax")},
        "orbax": _version("orbax-checkpoint"),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "cpu_model": cpu_model(),
        "cpu_cores": usable_cores(),
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of this CPU; empty where /proc/cpuinfo does not say."""
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def cpu_model() -> str:
    """The CPU's name as its maker gives it, else the architecture."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{re.escape(key)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _version_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])
