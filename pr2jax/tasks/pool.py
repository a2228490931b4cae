"""Verifiers in worker processes, with limits on time and memory.

Workers are programs of their own (not forks of a process that runs JAX, and not
`multiprocessing` children, which would import the trainer's main module again). They persist:
a verifier's imports are paid once a worker.
"""

import atexit
import collections
import contextlib
import dataclasses
import json
import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pr2jax.tasks.base import JudgeRequest, Problem, Verdict, checked
from pr2jax.tasks.registry import needs
from pr2jax.tasks.sandbox import SandboxConfig
from pr2jax.tasks.worker import HEADER

if TYPE_CHECKING:
    from pr2jax.tasks.judge import Judge

_START_S = 120.0
_KILLED_STARTS = 5  # in a row, for each worker: one blow may hit all of a large pool
_MAX_REPLY = 2**20
_GONE_S = 0.5
_UNTRUSTED = 1  # of a process that we end ourselves


class _Worker:
    """One process, the item it works on, and the deadline of that."""

    def __init__(self, verifier: str, memory_mb: int, sandbox: str):
        # One thread each: many workers share a machine, and thread stacks count as memory.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [
                sys.executable,
                *("-m", "pr2jax.tasks.worker", verifier, str(memory_mb), str(os.getpid()), sandbox),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | threads | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            start_new_session=True,  # Ctrl-C is for the trainer, which then closes the pool
        )
        os.set_blocking(self.process.stdout.fileno(), False)
        self.buffer = b""
        self.ready = False
        self.item: int | None = None
        self.deadline = 0.0

    def send(self, item: int, problem: Problem, response: str) -> None:
        """Hands over an item. If the process is gone, `receive` will tell."""
        self.item, self.deadline = item, time.monotonic() + _START_S
        body = pickle.dumps((item, problem, response))
        with contextlib.suppress(OSError):
            self.process.stdin.write(HEADER.pack(len(body)) + body)
            self.process.stdin.flush()

    def receive(self) -> list[dict] | None:
        """Messages that have arrived; None if the process is gone or writes what it should not."""
        data = self.process.stdout.read1(65536)
        if not data:  # readable and empty: closed
            return None
        self.buffer += data
        messages = []
        while len(self.buffer) >= HEADER.size:
            (size,) = HEADER.unpack_from(self.buffer)
            if size > _MAX_REPLY:
                return None
            if len(self.buffer) < HEADER.size + size:
                break
            try:
                message = json.loads(self.buffer[HEADER.size : HEADER.size + size])
            except ValueError:
                return None
            if not isinstance(message, dict):
                return None
            messages.append(message)
            self.buffer = self.buffer[HEADER.size + size :]
        return messages

    def end(self) -> int:
        """Waits for a process that closed its pipe, or kills it; its exit code."""
        try:
            return self.process.wait(timeout=_GONE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return _UNTRUSTED

    def stop(self) -> None:
        """Kills the process and closes its pipes."""
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        self.process.wait()


class VerifierPool:
    """Scores (problem, response) pairs in `workers` processes.

    verifier: "module:function" of (problem, response) -> Verdict, imported by the workers.
    timeout_s: wall-clock limit of one item, besides sandbox.total_s where it runs programs; the
        worker is killed and replaced.
    memory_mb: address-space limit of a worker (virtual memory: the libraries alone take about
        500 MiB).
    sandbox: limits of the programs that verifiers run, and how these are isolated.
    judge: grades what a verifier cannot decide; without one such an item raises.
    stats: counts of "scored", "judged", "timeouts", "crashes", "memory", "errors" and "restarts";
        "timeouts" to "errors" gave score 0.

    An item whose worker is killed from outside (SIGKILL: an operator, the kernel's memory killer)
    is put to another one; only where that is killed, too, does it count as a crash. A worker that
    is killed before it has started costs the item nothing; five in a row for each worker are an
    error.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout_s: float = 10.0,
        memory_mb: int = 2048,
        verifier: str = "pr2jax.tasks.registry:score",
        sandbox: SandboxConfig | None = None,
        judge: "Judge | None" = None,
    ):
        if workers < 1 or timeout_s <= 0 or memory_mb < 256:
            raise ValueError(
                f"VerifierPool: {workers} workers, {timeout_s} s, {memory_mb} MiB: at least 1, "
                "more than 0, and 256 are needed"
            )
        sandbox = sandbox or SandboxConfig()
        settings = json.dumps(dataclasses.asdict(sandbox))
        self.programs_s = sandbox.total_s
        self.timeout_s, self._start = timeout_s, (verifier, memory_mb, settings)
        self.judge = judge
        self.stats: collections.Counter[str] = collections.Counter()
        self._workers = [_Worker(*self._start) for _ in range(workers)]
        self._closed = False
        self._killed: set[int] = set()  # items of this batch whose worker was
        self._killed_starts = 0  # in a row
        atexit.register(self.close)

    def score_batch(self, items: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Verdicts in the order of `items`, whatever an item does.

        Raises RuntimeError where workers cannot start or programs cannot be isolated (that is no
        response's fault), JudgeError where a judge is needed and there is none or it does not
        answer, ValueError once closed.
        """
        if self._closed:
            raise ValueError("VerifierPool is closed")
        verdicts: list[Verdict | JudgeRequest | None] = [None] * len(items)
        waiting = collections.deque(range(len(items)))
        self._killed.clear()
        try:
            self._serve(items, waiting, verdicts)
        except BaseException:
            # Workers may be in the middle of items: their late answers must not reach a next call.
            for i, worker in enumerate(self._workers):
                if worker.item is not None:
                    self._replace(i)
            raise
        self._ask_judge(items, verdicts)
        self.stats["scored"] += len(items)
        return verdicts  # type: ignore[return-value]

    def _ask_judge(self, items, verdicts) -> None:
        """Puts the judge's verdicts in the place of the requests for them."""
        open_ones = [i for i, v in enumerate(verdicts) if isinstance(v, JudgeRequest)]
        if not open_ones:
            return
        if self.judge is None:
            from pr2jax.tasks.judge import JudgeError

            raise JudgeError(
                f"problem {items[open_ones[0]][0].id} ({items[open_ones[0]][0].data_source}) needs "
                "a model judge, and verifier.judge.kind is 'none'"
            )
        for i, verdict in zip(
            open_ones, self.judge.judge([verdicts[i] for i in open_ones]), strict=True
        ):
            verdicts[i] = checked(verdict)
        self.stats["judged"] += len(open_ones)

    def _serve(self, items, waiting, verdicts) -> None:
        with selectors.DefaultSelector() as selector:
            for i in range(len(self._workers)):
                self._feed(i, items, waiting, selector, verdicts)
            while selector.get_map():
                now = time.monotonic()
                next_deadline = min(self._workers[k.data].deadline for k in self._keys(selector))
                for key, _ in selector.select(timeout=max(0.0, next_deadline - now)):
                    self._read(key.data, items, waiting, selector, verdicts)
                now = time.monotonic()
                for key in self._keys(selector):
                    worker = self._workers[key.data]
                    if worker.deadline <= now:
                        limit = self._limit(items[worker.item][0])
                        reason = f"time limit of {limit:g} s"
                        self._fail(key.data, "timeouts", reason, selector, verdicts)
                        self._feed(key.data, items, waiting, selector, verdicts)

    def _limit(self, problem: Problem) -> float:
        """Seconds that a problem's verifier may take."""
        try:
            runs = needs(problem) == "sandbox"
        except ValueError:  # a source that the registry does not know: of a verifier of its own
            runs = False
        return self.timeout_s + (self.programs_s if runs else 0.0)

    @staticmethod
    def _keys(selector) -> list[selectors.SelectorKey]:
        return list(selector.get_map().values())

    def _feed(self, i, items, waiting, selector, verdicts) -> None:
        """Gives worker `i` its next item and watches it, if one waits."""
        if waiting:
            item = waiting.popleft()
            if self._workers[i].process.poll() is not None:
                self._replace(i)  # it died between items: not the next item's fault
            self._workers[i].send(item, *items[item])
            selector.register(self._workers[i].process.stdout, selectors.EVENT_READ, i)

    def _read(self, i, items, waiting, selector, verdicts) -> None:
        worker = self._workers[i]
        messages = worker.receive()
        for message in messages or ():
            if "broken" in message:
                raise RuntimeError(f"verifier workers do not work: {message['broken']}")
            if message.get("ready"):
                worker.ready = True
                self._killed_starts = 0
            elif message.get("item") != worker.item:
                messages = None  # not what was asked: nothing from this process can be trusted
                break
            elif message.get("started"):
                worker.deadline = time.monotonic() + self._limit(items[worker.item][0])
            else:
                self._accept(i, message, selector, verdicts)
                self._feed(i, items, waiting, selector, verdicts)
                return
        if messages is None:
            code = worker.end()
            if code == -signal.SIGKILL and self._excused(worker):
                waiting.appendleft(worker.item)
                selector.unregister(worker.process.stdout)
                self._replace(i)
                self._feed(i, items, waiting, selector, verdicts)
                return
            if not worker.ready:
                raise RuntimeError(
                    f"a verifier worker ended as it started (exit code {code}; "
                    f"{self._killed_starts} in a row were killed)"
                )
            reason = f"verifier process crashed (exit code {code})"
            self._fail(i, "crashes", reason, selector, verdicts)
            self._feed(i, items, waiting, selector, verdicts)

    def _excused(self, worker: _Worker) -> bool:
        """Whether a worker that was killed from outside leaves its item to another one."""
        if not worker.ready:  # it had not seen the item
            self._killed_starts += 1
            return self._killed_starts < _KILLED_STARTS * len(self._workers)
        first = worker.item not in self._killed
        self._killed.add(worker.item)
        return first

    def _accept(self, i, message, selector, verdicts) -> None:
        """Takes the verdict in `message` for the item of worker `i`."""
        worker = self._workers[i]
        score, reason = message.get("score"), str(message.get("reason", ""))
        if isinstance(message.get("judge"), dict):
            verdicts[worker.item] = JudgeRequest(**message["judge"])
        else:
            verdicts[worker.item] = checked(Verdict(score, reason))
        worker.item = None
        selector.unregister(worker.process.stdout)
        failure = message.get("failure")
        if failure:
            self.stats["memory" if failure == "memory" else "errors"] += 1
        if failure == "memory":
            self._replace(i)  # what it still holds is unknown

    def _fail(self, i, count, reason, selector, verdicts) -> None:
        """Scores the item of worker `i` 0 and replaces the worker."""
        worker = self._workers[i]
        verdicts[worker.item] = Verdict(0.0, reason)
        self.stats[count] += 1
        selector.unregister(worker.process.stdout)
        self._replace(i)

    def _replace(self, i) -> None:
        self._workers[i].stop()
        self._workers[i] = _Worker(*self._start)
        self.stats["restarts"] += 1

    def close(self) -> None:
        """Ends the workers. May be called more than once."""
        if not self._closed:
            self._closed = True
            atexit.unregister(self.close)
            for worker in self._workers:
                worker.stop()

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
