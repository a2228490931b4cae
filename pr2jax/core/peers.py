"""Watches over the other hosts of a run: a peer that is gone or hung ends the others, by name.

A collective whose peer died waits, on some backends for ever. So every process keeps a connection
to process 0, on which both sides send a beat a second; the connection's end, or silence for
`timeout_s`, is told to all, and each leaves at once with the exit code that says "run all again"
(or with the peer's own, where that one failed and could still say why). A process that is stopped
(SIGSTOP) or whose machine is gone falls silent; one that merely computes does not, since beats
come from a thread.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import Any

import jax

from pr2jax.core import hosts

log = logging.getLogger("pr2jax")

EXIT_LOST = 75  # as for a stop that was asked for: saved, run the same command again
_BEAT_S = 1.0
_CONNECT_S = 60.0


class Peers:
    """The watch of one process, from its creation to `leave` or `fail`.

    Creating it is collective. Does nothing with one process.
    """

    def __init__(self, timeout_s: float = 30.0):
        self.timeout_s = timeout_s
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if not hosts.several():
            return
        self.index = jax.process_index()
        listener, told = None, None
        if self.index == 0:
            listener = socket.create_server(("", 0), family=socket.AF_INET, backlog=4096)
            told = [listener.getsockname()[1], secrets.token_hex(16), _addresses()]
        found = hosts.gather([hosts.host_name(), os.getpid(), told])
        self.names = [f"process {i} ({name}, pid {pid})" for i, (name, pid, _) in enumerate(found)]
        port, self._secret, addresses = found[0][2]
        self._links: dict[int, _Link] = {}
        with hosts.together("connecting to process 0"):
            if listener is None:
                self._links[0] = _Link(_connect(addresses, port))
                self._links[0].send({"hello": self.index, "secret": self._secret})
        self._selector = selectors.DefaultSelector()
        if listener is not None:
            self._accept(listener)
        for index, link in self._links.items():
            self._selector.register(link.socket, selectors.EVENT_READ, index)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """This process ends well, and so do the others: returns when all are here, in process 0
        when the others have ended (the runtime's records are with it: it must not go first).

        From here on silence alarms no one.
        """
        hosts.gather(None)
        self._end({"bye": True})
        if self._thread is not None and self.index == 0:
            self._until_closed(self.timeout_s)

    def _until_closed(self, seconds: float) -> None:
        """Waits until the other ends have closed their connections."""
        limit = time.monotonic() + seconds
        for link in self._links.values() if self._thread is not None else ():
            while link.read()[1] and time.monotonic() < limit:
                time.sleep(0.02)

    def fail(self, code: int, why: str) -> None:
        """This process ends with `code`, and so do the others, saying why."""
        self._end({"fail": why, "code": code})
        # Closing a connection with something unread would take back what was just sent.
        self._until_closed(2 * _BEAT_S)

    def blame(self, seconds: float = 5.0) -> None:
        """Waits for the watch to find whose end it is that a failing collective tells of; does not
        return where it does."""
        if self._thread is not None:
            self._done.wait(seconds)

    def _end(self, message: dict[str, Any]) -> None:
        if self._thread is None or self._done.is_set():
            return
        self._done.set()
        for link in list(self._links.values()):
            link.send(message)
        self._thread.join(timeout=2 * _BEAT_S)

    def _accept(self, listener: socket.socket) -> None:
        """Takes every other process's connection; whoever does not know the secret is dropped."""
        limit = time.monotonic() + _CONNECT_S
        while len(self._links) < len(self.names) - 1:
            listener.settimeout(max(0.1, limit - time.monotonic()))
            try:
                link = _Link(listener.accept()[0])
                hello = link.wait(5.0)
            except OSError as error:
                missing = [n for i, n in enumerate(self.names) if i and i not in self._links]
                if time.monotonic() < limit:
                    continue
                raise hosts.AbsentHost(f"{missing[0]} did not connect: {error}") from None
            if hello.get("secret") == self._secret:
                self._links[int(hello["hello"])] = link
        listener.close()

    # ---------------------------------------------------------------- the thread

    def _watch(self) -> None:
        sent = time.monotonic()
        for index in list(self._links):
            self._hear(index)  # what came behind a greeting
        while not self._done.is_set():
            for key, _ in self._selector.select(timeout=_BEAT_S / 2):
                self._hear(key.data)
            now = time.monotonic()
            if now - sent > self.timeout_s:
                # We were stopped ourselves: what the others sent meanwhile is still to be read.
                for link in self._links.values():
                    link.heard = now
            if now - sent >= _BEAT_S:
                sent = now
                for link in self._links.values():
                    link.send({})  # to one that is gone: what it said last is still to be read
            for index, link in list(self._links.items()):
                if not link.left and now - link.heard > self.timeout_s:
                    self._lost(index, f"has been silent for {self.timeout_s:.0f} s", EXIT_LOST)

    def _hear(self, index: int) -> None:
        link = self._links[index]
        messages, open_ = link.read()
        for message in messages:
            if "bye" in message:
                link.left = True
            elif "fail" in message:
                self._lost(index, f"failed: {message['fail']}", int(message["code"]))
            elif "lost" in message:
                self._leave_because(message["lost"], int(message["code"]))
        if not open_:
            self._selector.unregister(link.socket)
            if not link.left:
                self._lost(index, "is gone", EXIT_LOST)
            link.left = True

    def _lost(self, index: int, how: str, code: int) -> None:
        why = f"{self.names[index]} {how}"
        for other, link in self._links.items():
            if other != index:
                link.send({"lost": why, "code": code})
        self._leave_because(why, code)

    def _leave_because(self, why: str, code: int) -> None:
        if self._done.is_set():
            return
        self._done.set()
        then = "; start all processes again to resume" if code == EXIT_LOST else ""
        log.error("%s; %s ends, too%s", why, self.names[self.index], then)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a main thread that waits in a collective cannot be woken


class _Link:
    """One connection: lines of JSON. `heard`: when last; `left`: whether its silence is fine."""

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self.socket, self.heard, self.left = connection, time.monotonic(), False
        self._rest, self._early = b"", []  # of a line; messages behind the first one
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> bool:
        """Whether the other side may still get it; a full buffer counts as that."""
        with self._lock:
            try:
                self.socket.send(json.dumps(message).encode() + b"\n")
            except BlockingIOError:
                return True
            except OSError:
                return False
        return True

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """(whole messages that came, whether the connection is open)."""
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return self._take_early(), True
        except OSError:
            return self._take_early(), False
        if data:
            self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        return self._take_early() + [json.loads(line) for line in lines], bool(data)

    def _take_early(self) -> list[dict[str, Any]]:
        early, self._early = self._early, []
        return early

    def wait(self, seconds: float) -> dict[str, Any]:
        """The first message. Raises OSError where none comes."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            messages, open_ = self.read()
            if messages:
                self._early = messages[1:]
                return messages[0]
            if not open_:
                break
            time.sleep(0.01)
        raise OSError("no greeting")


def _addresses() -> list[str]:
    """Where others may reach this machine, the likeliest first."""
    found = []
    for name in (socket.gethostname(), socket.getfqdn()):
        try:
            found += [info[4][0] for info in socket.getaddrinfo(name, None, socket.AF_INET)]
        except OSError:
            continue
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("10.255.255.255", 1))  # sends nothing; picks the interface
            found.insert(0, probe.getsockname()[0])
    except OSError:
        pass
    return [*dict.fromkeys([*found, "127.0.0.1"])]


def _connect(addresses: list[str], port: int) -> socket.socket:
    """A connection to the first address that takes one. Raises OSError naming all."""
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=5.0)
        except OSError:
            continue
    raise OSError(f"process 0 cannot be reached at {', '.join(addresses)}, port {port}")
