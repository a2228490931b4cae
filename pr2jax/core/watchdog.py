"""A watch over steps: one that takes far longer than those before leaves all threads' stacks.

It only looks. Whoever reads WORKDIR/stacks/step_N.pI.txt sees what every thread of process I was
about while step N went on: a verifier that does not answer, a read that hangs, a collective whose
peer is gone.
"""

from __future__ import annotations

import collections
import faulthandler
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable

import jax

from pr2jax.core import goodput
from pr2jax.core.store import Staged, as_path, storing

log = logging.getLogger("pr2jax")

STACKS = "stacks"
_REMEMBERED = 100  # steps that the median is of


class Watchdog:
    """Watches the steps between `begin` and `end`; use it as a context.

    A step is too long at `factor` times the median of the earlier ones of this process, and at
    least `least_s` seconds; the first step, which compiles, is not watched and not counted.
    factor=0 watches nothing.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        factor: float,
        least_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder = as_path(workdir) / STACKS
        self.factor, self.least_s, self._clock = factor, least_s, clock
        self._seconds: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._steps = 0
        self._began: float | None = None
        self._step = 0
        self._wake, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.factor:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        with self._wake:
            self._closed, self._began = True, None
            self._wake.notify()
        if self.factor:
            self._thread.join(timeout=5.0)

    def limit(self) -> float | None:
        """Seconds from which a step is too long; None while there is none to compare with."""
        if not self._seconds:
            return None
        return max(self.factor * statistics.median(self._seconds), self.least_s)

    def begin(self, step: int) -> None:
        """Step number `step` begins."""
        with self._wake:
            self._step, self._began = step, self._clock()
            self._wake.notify()

    def end(self) -> None:
        """The step is done."""
        with self._wake:
            if self._began is not None and self._steps:
                self._seconds.append(self._clock() - self._began)
            self._steps += 1
            self._began = None

    def _watch(self) -> None:
        told = None
        while True:
            with self._wake:
                if self._closed:
                    return
                step, began, limit = self._step, self._began, self.limit()
                if began is None or limit is None or (step, began) == told:
                    self._wake.wait()
                    continue
                left = began + limit - self._clock()
                if left > 0:
                    self._wake.wait(left)
                    continue
                told = step, began
            self._tell(step, limit)

    def _tell(self, step: int, limit: float) -> None:
        name = f"step_{step}.p{jax.process_index()}.txt"
        activity = goodput.doing() or "a step"
        try:
            with (
                storing(self.folder),
                Staged(self.folder) as staged,
                open(staged.path / name, "w", encoding="utf-8") as file,
            ):
                file.write(f"step {step}, {limit:.3g} s after its begin, during: {activity}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            log.warning("step %d takes too long; its stacks cannot be written: %s", step, error)
            return
        log.warning(
            "step %d takes longer than %.3g s (%s is going on); what every thread does: %s",
            *(step, limit, activity, self.folder / name),
        )
