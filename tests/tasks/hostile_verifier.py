"""A verifier that does what the response says, for test_pool.py."""

import contextlib
import ctypes
import os
import signal
import sys
import time

from pr2jax.tasks.base import Verdict


def score(problem, response):
    if response == "hang":
        while True:
            time.sleep(0.1)
    if response == "segfault":
        ctypes.string_at(0)
    if response == "exit":
        os._exit(0)
    if response == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "sys.exit":
        sys.exit(0)
    if response == "raise":
        raise RuntimeError("no such luck")
    if response == "memory":
        bytearray(4 * 2**30)
    if response == "nan":
        return Verdict(float("nan"))
    if response == "big":
        return Verdict(1e9)
    if response == "print":
        print("\x00\x00\x00\x00 a verifier may print")
        sys.stdout.flush()
    if response == "forge":
        os.write(1, b"\x02\x00\x00\x00{}")
        for fd in range(3, 20):
            with contextlib.suppress(OSError):
                os.write(fd, b"\xff\xff\xff\xff")
    if response == "answer others":
        body = b'{"item": 99, "score": 1.0}'
        for fd in range(3, 20):
            with contextlib.suppress(OSError):
                os.write(fd, len(body).to_bytes(4, "little") + body)
    if response == "modules":
        return Verdict(0.0 if "jax" in sys.modules else 1.0)
    if response == "pid":
        return Verdict(1.0, str(os.getpid()))
    if response.startswith("sleep"):
        time.sleep(float(response[5:]))
        return Verdict(1.0, response)
    return Verdict(1.0 if response == problem.answer else 0.0)
