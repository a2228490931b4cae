"""What a process of the jail gives up for good: capabilities, limits, files, signals, prlimit."""

import ctypes
import errno
import importlib.util
import os
import resource
import struct
import sys

PR_SET_SECCOMP, PR_CAPBSET_DROP = 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38


def load(name, folder):
    """Imports a package that stands in `folder`, whose listing may be out of reach."""
    path = os.path.join(folder, name)
    spec = importlib.util.spec_from_file_location(
        name, os.path.join(path, "__init__.py"), submodule_search_locations=[path]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Confinement:
    """What a candidate does to itself before it runs: limits, and a Landlock domain of its own."""

    def __init__(self, settings):
        self.landlock = None
        if settings["sandlock"]:
            sandlock = load("sandlock", settings["sandlock"])
            writable = [settings["workdir"]] if settings["writable"] else []
            self.landlock = (
                sandlock.confine,
                sandlock.Sandbox(fs_readable=["/"], fs_writable=writable),
            )

    def apply(self, limits):
        """Irrevocable."""
        os.umask(0o077)
        os.setsid()
        for kind, value in (
            (resource.RLIMIT_AS, limits["memory"]),
            (resource.RLIMIT_FSIZE, limits["file"]),
            (resource.RLIMIT_CPU, limits["cpu"]),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_STACK, 64 << 20),
        ):
            hard = resource.getrlimit(kind)[1]
            if hard != resource.RLIM_INFINITY:
                value = min(value, hard)
            resource.setrlimit(kind, (value, value))
        if self.landlock is not None:
            confine, policy = self.landlock
            confine(policy)
            keep_limits_of_others()


_PRLIMIT = {"x86_64": 302, "aarch64": 261}


def keep_limits_of_others():
    """A seccomp filter of its own for a program: prlimit for its own process only.

    Landlock keeps signals and tracing within, but not prlimit, which reaches every process of the
    same user.
    """
    number = _PRLIMIT[os.uname().machine]
    filters = [
        (0x20, 0, 0, 0),  # load the number of the system call
        (0x15, 0, 3, number),  # another one: allow
        (0x20, 0, 0, 16),  # load the low half of its first argument, a process id
        (0x15, 1, 0, 0),  # 0, the caller itself: allow
        (0x06, 0, 0, 0x00050000 | errno.EPERM),
        (0x06, 0, 0, 0x7FFF0000),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *f) for f in filters))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filters", ctypes.c_void_p))

    header = Program(len(filters), ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(header), 0, 0) != 0:  # 2: a filter
        raise OSError(ctypes.get_errno(), "prctl")


def drop_capabilities():
    """Gives up what root could do, so that permissions and limits bind it; adopts orphans."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    if libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
