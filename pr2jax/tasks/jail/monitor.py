"""Watches one program from its text to its report, in a process forked for it."""

import contextlib
import fcntl
import json
import os
import select
import signal
import sys
import time

import driver
import examiner
import plain


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
