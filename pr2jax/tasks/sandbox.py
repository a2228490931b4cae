"""A sandbox for programs that a model wrote. Running and grading are apart.

A program only produces output: expected values never enter its process, and a verdict is never an
exit code or a printed word. `Sandbox.run` gives what a script printed, `Sandbox.session` values of
function calls as plain data, both to be compared by the caller; `Sandbox.examine` runs a suite
of asserts, which is trusted, in a jail of its own, where the candidate's functions are proxies.

Isolation is by kept libraries, without daemon or setuid. Tier "landlock": sandlock (Landlock rules
on files, network, signals and abstract sockets; a seccomp filter; a bound on processes). Tier
"namespaces": the same within bubblewrap (own mounts, processes, users, network, IPC). In both a
program is a fresh fork of a clean interpreter, in a working directory that is empty (writable with
namespaces only), with limits on time, memory, processes, output and file size; when it is over
all of its descendants are killed. One `Sandbox` runs one program at a time; each verifier worker
has its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import struct
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pr2jax.tasks.isolation import ENVIRONMENT, TIERS, SandboxConfig, SandboxError, jail_command
from pr2jax.tasks.jail import plain

_HEADER = struct.Struct("<I")
_START_S = 60.0
_GRACE_S = 10.0  # beyond a program's own limits; then the jail itself is at fault


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of a program.

    status: "exited" (see `code`: negative for a signal), "timeout", "output" (it wrote too much),
    or for a module "ended" (by the caller), "closed" (it went away) and "protocol".
    seconds: wall time.
    """

    status: str
    code: int
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with exit code 0. Never a verdict."""
        return self.status == "exited" and self.code == 0

    def explain(self) -> str:
        """For people: how it ended, and the last line of its stderr."""
        if self.status == "timeout":
            return f"time limit ({self.seconds:.1f} s)"
        if self.status == "output":
            return "output limit"
        how = f"signal {-self.code}" if self.code < 0 else f"exit code {self.code}"
        lines = self.stderr[-2000:].decode("utf-8", "replace").strip().splitlines()
        return f"{how}: {lines[-1][:200]}" if lines else how


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one call: its value as plain data, or what went wrong."""

    ok: bool
    value: Any = None
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Examination:
    """What a suite said of a candidate: whether it passed, why not, and how often it asked."""

    passed: bool
    reason: str
    calls: int


class _Gone(Exception):
    """The jail ended, or broke its protocol."""


class _Jail:
    """One zygote under its guard, and the two pipes to it."""

    def __init__(self, tier: str, cfg: SandboxConfig):
        self.tier, self.cfg = tier, cfg
        self._folder = tempfile.TemporaryDirectory(prefix="pr2jax-sandbox-")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        command = jail_command(tier, cfg, Path(self._folder.name))
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={"PATH": os.defpath} | ENVIRONMENT,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"{command[0]}: {error}") from None
        self.spent = False  # it cannot take another program
        try:
            if self.receive(time.monotonic() + _START_S)[:1] != b"R":
                raise _Gone
        except _Gone:
            self.stop()
            self._errors.seek(0)
            text = self._errors.read(2000).decode("utf-8", "replace").strip()
            raise SandboxError(text.splitlines()[-1] if text else "it ended at once") from None

    # ------------------------------------------------------------------- frames

    def send(self, data: bytes) -> None:
        """Writes all of it. Raises _Gone."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.process.stdin.fileno(), view) :]
        except OSError:
            raise _Gone from None

    def receive(self, deadline: float) -> bytes:
        """The next frame, waited for until `deadline` (monotonic). Raises _Gone."""
        (size,) = _HEADER.unpack(self._exactly(_HEADER.size, deadline))
        return self._exactly(size, deadline)

    def _exactly(self, size: int, deadline: float) -> bytes:
        fd, data = self.process.stdout.fileno(), bytearray()
        while len(data) < size:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(fd, min(size - len(data), 1 << 20)) if ready else b""
            if not part:
                raise _Gone
            data += part
        return bytes(data)

    def begin(self, kind: str, source: bytes, text: bytes, seconds: float) -> None:
        """Starts a program. Raises _Gone."""
        limits = {
            "seconds": seconds,
            "cpu": int(seconds) + 2,
            "memory": self.cfg.memory_mb << 20,
            "file": self.cfg.disk_mb << 20,
            "output": self.cfg.output_kb << 10,
        }
        settings = json.dumps({"kind": kind, "limits": limits}).encode()
        self.send(b"S" + b"".join(_HEADER.pack(len(x)) + x for x in (settings, source, text)))

    def report(self, frame: bytes, deadline: float) -> Run:
        """The Run that an "E" frame begins; afterwards nothing of the program is left."""
        if frame[:1] != b"E":
            raise _Gone
        outcome = json.loads(frame[1:])
        stdout, stderr = self.receive(deadline), self.receive(deadline)
        end = self.receive(deadline)
        if end not in (b"D", b"X"):
            raise _Gone
        self.spent = end == b"X"
        return Run(outcome["status"], outcome["code"], stdout, stderr, outcome["seconds"])

    def stop(self) -> None:
        """Ends the jail and all that is in it."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # the zygote kills what is left, and ends
        try:
            self.process.wait(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self._folder.cleanup()


class Session:
    """A module that answers calls. Use as a context manager; one at a time for a Sandbox."""

    def __init__(self, sandbox: Sandbox, jail: _Jail, seconds: float):
        self._sandbox, self._jail, self._seconds = sandbox, jail, seconds
        self.run: Run | None = None  # once it is over

    def ask(self, body: bytes | None) -> bytes | None:
        """Sends a request (None: waits for the first frame); the answer, None if it is over."""
        if self.run is not None:
            return None
        deadline = time.monotonic() + self._seconds + _GRACE_S
        try:
            if body is not None:
                self._jail.send(_HEADER.pack(len(body)) + body)
            frame = self._jail.receive(deadline)
            if frame[:1] in (b"L", b"A"):
                return frame[1:]
            self.run = self._jail.report(frame, deadline)
        except _Gone:
            self._sandbox.discard(self._jail)
            self.run = Run("closed", -9, b"", b"sandbox: the jail ended", 0.0)
        return None

    def call(self, function: str, *arguments: Any, **keywords: Any) -> Outcome:
        """Calls a function of the module (or "Class().method") with plain data."""
        request = ("call", function, list(arguments), keywords, [])
        answer = self.ask(plain.encode(request))
        if answer is None:
            return Outcome(False, error=self.run.explain())
        try:
            kind, value, _, text = plain.decode(answer)
        except (plain.NotPlain, ValueError, TypeError):
            return Outcome(False, error="its answer is no plain data")
        if kind == "ok":
            return Outcome(True, value)
        return Outcome(False, error=f"{value}: {text}" if kind == "error" else str(text))

    def close(self) -> None:
        """Ends the module. May be called more than once."""
        if self.run is None:
            try:
                self._jail.send(_HEADER.pack(0))
                deadline = time.monotonic() + _GRACE_S
                self.run = self._jail.report(self._jail.receive(deadline), deadline)
            except _Gone:
                self._sandbox.discard(self._jail)
                self.run = Run("closed", -9, b"", b"", 0.0)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Sandbox:
    """Runs programs, one at a time, each in a fresh process. Opens its jails on first use.

    Raises SandboxError where `cfg.isolation` cannot be had; what was tried is in the message.
    """

    def __init__(self, cfg: SandboxConfig | None = None):
        self.cfg = cfg or SandboxConfig()
        self.cfg.validate()
        self._jails: dict[str, _Jail] = {}
        self.restarts = 0
        self.tier = self._probe()

    def _probe(self) -> str:
        """The strongest tier that is allowed and works: a program runs in it, for real."""
        if self.cfg.isolation == "none":
            return "none"
        tried = TIERS if self.cfg.isolation == "auto" else (self.cfg.isolation,)
        failures = []
        for tier in tried:
            try:
                jail = _Jail(tier, self.cfg)
                jail.begin("script", b"print(6 * 7)", b"", 30.0)
                deadline = time.monotonic() + 40.0
                run = jail.report(jail.receive(deadline), deadline)
                if run.ok and run.stdout == b"42\n":
                    self._jails["candidate"] = jail
                    return tier
                jail.stop()
                failures.append(f"{tier}: a program did not run in it ({run.explain()})")
            except (SandboxError, ImportError, _Gone) as error:
                failures.append(f"{tier}: {error}")
        raise SandboxError(
            f"no isolation for model-written programs here ({'; '.join(failures)}). "
            "sandbox.isolation=none runs them without any, with all rights of this process"
        )

    def _jail(self, role: str) -> _Jail:
        if role in self._jails and self._jails[role].spent:
            self.discard(self._jails[role])
        if role not in self._jails:
            self._jails[role] = _Jail(self.tier, self.cfg)
        return self._jails[role]

    def discard(self, jail: _Jail) -> None:
        """Ends a jail that is not what it was; the next program gets a new one."""
        self._jails = {k: j for k, j in self._jails.items() if j is not jail}
        self.restarts += 1
        jail.stop()

    def run(self, source: str, stdin: str | bytes = b"", *, timeout_s: float | None = None) -> Run:
        """Runs a Python program as a script."""
        seconds = timeout_s or self.cfg.timeout_s
        data = stdin.encode("utf-8", "surrogateescape") if isinstance(stdin, str) else stdin
        for last in (False, True):
            jail = self._jail("candidate")
            deadline = time.monotonic() + seconds + _GRACE_S
            began = False
            try:
                jail.begin("script", _bytes(source), data, seconds)
                frame = jail.receive(deadline)
                began = True
                return jail.report(frame, deadline)
            except _Gone:
                self.discard(jail)
                if began or last:
                    break
        return Run("closed", -9, b"", b"sandbox: the jail ended", seconds)

    def session(self, source: str, *, timeout_s: float | None = None) -> Session:
        """Loads a Python module, whose functions can then be called.

        Where it does not load, the session is over, and `session.run` says why.
        """
        seconds = timeout_s or self.cfg.timeout_s
        session = self._open("candidate", "module", _bytes(source), seconds)
        answer = session.ask(None)
        if answer is not None:
            try:
                kind, value, _, text = plain.decode(answer)
            except (plain.NotPlain, ValueError, TypeError):
                kind, value, text = "error", "it", "answered with no plain data"
            if kind != "ok":
                session.close()
                error = f"{value}: {text}".encode("utf-8", "replace")
                session.run = dataclasses.replace(session.run, code=1, stderr=error)
        return session

    def _open(self, role: str, kind: str, source: bytes, seconds: float) -> Session:
        jail = self._jail(role)
        try:
            jail.begin(kind, source, b"", seconds)
        except _Gone:
            self.discard(jail)
            jail = self._jail(role)
            jail.begin(kind, source, b"", seconds)
        return Session(self, jail, seconds)

    def call(
        self,
        source: str,
        calls: Sequence[tuple[str, Sequence[Any]]],
        *,
        timeout_s: float | None = None,
    ) -> list[Outcome]:
        """Outcomes of (function, arguments) calls of one module, one after the other."""
        with self.session(source, timeout_s=timeout_s) as session:
            return [session.call(function, *arguments) for function, arguments in calls]

    def examine(
        self,
        source: str,
        suite: str,
        *,
        prelude: str = "",
        answered: Sequence[str] = (),
        how: Literal["run", "pytest"] = "run",
        timeout_s: float | None = None,
    ) -> Examination:
        """Runs a trusted suite of asserts against the module `source` (see jail/examiner.py).

        prelude: trusted code that the suite may use; `answered`: names of it that the candidate
        answers for all the same. A suite that never asks the candidate is not passed.
        """
        seconds = timeout_s or self.cfg.timeout_s
        deadline = time.monotonic() + self.cfg.total_s
        exam = plain.encode((prelude, suite, how, list(answered)))
        with self.session(source, timeout_s=seconds) as candidate:
            if candidate.run is not None:
                return Examination(False, candidate.run.explain(), 0)
            with self._open("examiner", "exam", exam, seconds) as examiner:
                frame = examiner.ask(None)
                while frame is not None and frame[:1] == b"C":
                    if time.monotonic() > deadline:
                        return Examination(False, f"time limit of all ({self.cfg.total_s:g} s)", 0)
                    answer = candidate.ask(frame[1:])
                    if answer is None:
                        return Examination(False, f"candidate: {candidate.run.explain()}", 0)
                    frame = examiner.ask(answer)
                if frame is None:
                    return Examination(False, f"suite: {examiner.run.explain()}", 0)
                passed, reason, calls = plain.decode(frame[1:])
                if passed and not calls:
                    return Examination(False, "the suite never asked the candidate", 0)
                return Examination(passed is True, reason, calls)

    def close(self) -> None:
        """Ends the jails. May be called more than once."""
        for jail in self._jails.values():
            jail.stop()
        self._jails = {}

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bytes(source: str) -> bytes:
    return source.encode("utf-8", "surrogatepass")
