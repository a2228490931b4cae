"""Forks a process for every program (argv: how to confine it, and the modules to have ready).

This process only starts others, so what is in its memory, and in that of every program at its
start, is what it was when it began. For each program it forks a monitor, which reads the program
from the control stream (descriptor 0), forks the candidate, feeds and watches it, and writes what
came of it to descriptor 1. Once the monitor has ended everything else in this sandbox is killed
and the working directory is emptied; then a closing frame tells that nothing is left.

Frames from the parent: "S" + JSON settings, the source, the input; then for a module calls, and
an empty frame at its end. Frames to the parent: see `Monitor`.
"""

import contextlib
import errno
import fcntl
import importlib
import importlib.util
import json
import os
import resource
import select
import signal
import struct
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import driver  # noqa: E402
import examiner  # noqa: E402
import plain  # noqa: E402

sys.path.remove(HERE)
for _name in ("driver", "examiner", "plain"):
    sys.modules.pop(_name)  # a program may have modules of these names

# Imported once, so that programs need not.
WARM = (
    *("collections", "heapq", "bisect", "math", "itertools", "functools", "operator"),
    *("re", "string", "random", "datetime", "json", "copy", "typing"),
    *("statistics", "fractions", "decimal", "dataclasses", "enum", "abc", "io"),
    *("queue", "threading", "traceback", "atexit", "array", "cmath", "hashlib"),
    *("textwrap",),
)


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
    import ctypes

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
    if libc.prctl(22, 2, ctypes.byref(header), 0, 0) != 0:  # PR_SET_SECCOMP, a filter
        raise OSError(ctypes.get_errno(), "prctl")


class Monitor:
    """Watches one candidate. Frames that it writes to the parent, by their first byte:

    "L": a module's outcome of loading, "A": an answer (both as the candidate wrote them);
    "E" + JSON and two frames: it is over: status, exit code, seconds; stdout and stderr.
    """

    def __init__(self, settings, confinement):
        self.kind, self.limits = settings["kind"], settings["limits"]
        self.source, self.input = driver.read_frame(0), driver.read_frame(0)
        self.room = self.limits["output"]
        self.out = {}
        self.status = None
        self._start(confinement)

    def _start(self, confinement):
        pairs = [os.pipe() for _ in range(3 if self.kind == driver.SCRIPT else 5)]
        self.pid = os.fork()
        if self.pid == 0:
            self._candidate(pairs, confinement)
        self.began = time.monotonic()
        self.stdin = self._keep(pairs[0], 1)
        self.stdout, self.stderr = self._keep(pairs[1], 0), self._keep(pairs[2], 0)
        if self.kind != driver.SCRIPT:
            self.requests, self.replies = self._keep(pairs[3], 1), self._keep(pairs[4], 0)
        self.out = {self.stdout: bytearray(), self.stderr: bytearray()}
        self.process = os.pidfd_open(self.pid)
        os.set_blocking(self.stdin, False)

    @staticmethod
    def _keep(pair, end):
        os.close(pair[1 - end])
        return pair[end]

    def _candidate(self, pairs, confinement):
        """In the child: never returns."""
        code = 1
        try:
            ends = [pairs[0][0], pairs[1][1], pairs[2][1]]
            if self.kind != driver.SCRIPT:
                ends += [pairs[3][0], pairs[4][1]]
            # Out of the way of 0..4 first, then to their places.
            for place, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in ends]):
                os.dup2(fd, place)
            os.closerange(len(ends), 1 << 20)
            confinement.apply(self.limits)
            for name in [n for n in sys.modules if n.partition(".")[0] == "sandlock"]:
                del sys.modules[name]
            source = self.source
            self.source = self.input = None
            if self.kind == driver.SCRIPT:
                code = driver.run_script(source)
            elif self.kind == driver.MODULE:
                driver.serve_calls(source, plain)
                code = 0
            else:
                examiner.examine(source, plain)
                code = 0
        except BaseException as error:
            os.write(2, f"sandbox: {type(error).__name__}: {error}".encode())
        finally:
            os._exit(code)

    # ---------------------------------------------------------------- watching

    def script(self):
        """Feeds its input, and waits until it ends or a limit is reached."""
        deadline = self.began + self.limits["seconds"]
        self._pump(deadline, until=lambda: False)
        self._over()

    def module(self):
        """Passes calls on until the parent ends them, or the candidate is over.

        After the candidate has ended, or failed a limit, the parent hears "E" in place of an
        answer.
        """
        os.close(self.stdin)
        kind = b"L"
        while True:
            body = self._frame(self.began if kind == b"L" else time.monotonic())
            if body is None:
                break
            driver.write_frame(1, kind + body)
            request = driver.read_frame(0)
            if not request:
                self.status = "ended"
                break
            kind = b"A"
            if not self._send(request):
                break
        self._over()

    def _frame(self, began):
        """The next frame of the candidate, or None."""
        deadline, data = began + self.limits["seconds"], bytearray()

        def whole():
            try:
                part = os.read(self.replies, 1 << 16)
            except BlockingIOError:
                return False
            if not part:
                self.status = self.status or "closed"
                return True
            data.extend(part)
            if len(data) < driver.HEADER.size:
                return False
            (size,) = driver.HEADER.unpack_from(data)
            if size > plain.MAX_BYTES + 64 or len(data) > size + driver.HEADER.size:
                self.status = "protocol"
                return True
            return len(data) == size + driver.HEADER.size

        self._pump(deadline, until=whole, watch=self.replies)
        return bytes(data[driver.HEADER.size :]) if self.status is None else None

    def _send(self, request):
        """A request to the candidate, which may not be reading."""
        view = memoryview(driver.HEADER.pack(len(request)) + request)
        os.set_blocking(self.requests, False)
        deadline = time.monotonic() + self.limits["seconds"]
        while view:
            _, ready, _ = select.select([], [self.requests], [], deadline - time.monotonic())
            if not ready:
                self.status = "timeout"
                return False
            try:
                view = view[os.write(self.requests, view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                self.status = "closed"
                return False
        return True

    def _pump(self, deadline, until, watch=None):
        """Moves data until `until`, the candidate's end, or a limit (then `status` is set)."""
        poll = select.poll()
        for fd in (self.process, *(fd for fd in self.out if fd is not None)):
            poll.register(fd, select.POLLIN)
        if watch is not None:
            os.set_blocking(watch, False)
            poll.register(watch, select.POLLIN)
        feed = memoryview(self.input) if self.kind == driver.SCRIPT else None
        if feed is not None:
            poll.register(self.stdin, select.POLLOUT)
        # The parent's end: nothing more is expected of it, but that it may be gone.
        poll.register(0, 0)
        while self.status is None:
            left = deadline - time.monotonic()
            if left <= 0:
                self.status = "timeout"
                return
            events = dict(poll.poll(left * 1000 + 1))
            if events.get(0, 0) & (select.POLLHUP | select.POLLERR):
                os._exit(1)
            if feed is not None and self.stdin in events:
                feed = self._feed(feed, poll)
            for fd in list(self.out):
                if fd in events and not self._take(fd):
                    poll.unregister(fd)
            if watch is not None and watch in events and until():
                return
            if self.process in events and (watch is None or watch not in events):
                self._drain()
                self.status = self.status or "exited"

    def _feed(self, feed, poll):
        """Writes some input; None when all is written or nobody reads."""
        try:
            feed = feed[os.write(self.stdin, feed[: 1 << 16]) :] if feed else feed
        except BlockingIOError:
            return feed
        except BrokenPipeError:
            feed = feed[:0]
        if not feed:
            poll.unregister(self.stdin)
            os.close(self.stdin)
            return None
        return feed

    def _take(self, fd):
        """Reads some output; False where it has ended."""
        part = os.read(fd, 1 << 16)
        self.room -= len(part)
        if self.room < 0:
            self.status = "output"
            part = part[: self.room]
        self.out[fd] += part
        return bool(part)

    def _drain(self):
        """What is in the pipes already; a descendant that holds them open is not waited for."""
        for fd in self.out:
            os.set_blocking(fd, False)
            with contextlib.suppress(BlockingIOError):
                while self.status is None and self._take(fd):
                    pass

    def _over(self):
        """Ends the candidate's main process and reports."""
        seconds = time.monotonic() - self.began
        if self.status not in ("exited", "closed"):
            os.kill(self.pid, signal.SIGKILL)
        else:
            # One that closed its pipe is about to end, or will not.
            select.select([self.process], [], [], 0.2)
            os.kill(self.pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        outcome = {"status": self.status, "code": code, "seconds": seconds}
        driver.write_frame(1, b"E" + json.dumps(outcome).encode())
        for data in self.out.values():
            driver.write_frame(1, bytes(data))


def watch(confinement):
    """In the monitor's process: one program, from its settings to its report."""
    settings = json.loads(driver.read_frame(0))
    monitor = Monitor(settings, confinement)
    if settings["kind"] == driver.SCRIPT:
        monitor.script()
    else:
        monitor.module()


# -------------------------------------------------------------------- the zygote


def drop_capabilities():
    """Gives up what root could do, so that file permissions and limits bind it too."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    if libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def kill_all(alone):
    """Kills all that is left of a program. `alone`: kill(-1) reaches this sandbox only."""
    while True:
        for pid in [-1] if alone else descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.0005)


def descendants(pid):
    """Ids of all processes below `pid`."""
    found = []
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as file:
        for child in map(int, file.read().split()):
            found += [child, *descendants(child)]
    return found


def signals_stay_here():
    """Whether signals cannot leave this sandbox; its parent must be out of reach."""
    try:
        os.kill(os.getppid(), 0)
    except PermissionError:
        return True
    return False


def empty(folder, budget=2000):
    """Removes what a program wrote; False where that is too much or cannot be done.

    Links are removed, not followed.
    """
    names = []
    try:
        for root, folders, files in os.walk(folder, topdown=True):
            names.append(root)
            budget -= len(folders) + len(files)
            if budget < 0 or root.count("/") > 16:
                return False
            for name in files + [f for f in folders if os.path.islink(os.path.join(root, f))]:
                os.unlink(os.path.join(root, name))
        for root in reversed(names[1:]):
            os.rmdir(root)
    except OSError:
        return False
    return not os.listdir(folder)


def main():
    """Serves programs until the control stream ends."""
    settings = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    drop_capabilities()
    for name in WARM:
        importlib.import_module(name)
    for name, folder in settings["packages"]:
        load(name, folder)
    confinement = Confinement(settings)
    alone = bool(settings["sandlock"]) and signals_stay_here()
    if settings["sandlock"] and not alone:
        raise SystemExit("signals are not confined to the sandbox")
    os.chdir(settings["workdir"])
    driver.write_frame(1, b"R" + json.dumps({"pid": os.getpid()}).encode())
    import gc

    gc.collect()
    gc.freeze()  # forked processes share these pages
    while os.read(0, 1):  # one byte for each program: the rest is the monitor's to read
        pid = os.fork()
        if pid == 0:
            try:
                watch(confinement)
                os._exit(0)
            finally:
                os._exit(1)
        if os.waitpid(pid, 0)[1]:
            break  # what it left unread cannot be told from what comes next
        kill_all(alone)
        if settings["writable"] and not empty(settings["workdir"]):
            driver.write_frame(1, b"X")  # the next program gets another jail
            break
        driver.write_frame(1, b"D")


if __name__ == "__main__":
    main()
