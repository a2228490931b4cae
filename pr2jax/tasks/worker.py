"""A verifier worker process: reads problems, writes verdicts (`python -m pr2jax.tasks.worker`).

Started and limited by `pool.VerifierPool`. Messages on stdin and stdout are a 4-byte length
and a body: pickled requests come in (from the trainer, which is trusted), JSON goes out (the
trainer trusts no bytes from here).
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import os
import pickle
import resource
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from pr2jax.core.config import from_config_dict
from pr2jax.tasks.base import JudgeRequest
from pr2jax.tasks.sandbox import SandboxConfig, SandboxError
from pr2jax.tasks.tools import Tools

HEADER = struct.Struct("<I")


def read_message(stream: BinaryIO) -> bytes | None:
    """One message, or None where the stream ends."""
    head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    (size,) = HEADER.unpack(head)
    body = stream.read(size)
    return body if len(body) == size else None


def _reply(stream: BinaryIO, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    stream.write(HEADER.pack(len(body)) + body)
    stream.flush()


def _score(verify: Callable, problem: Any, response: str) -> dict[str, Any]:
    try:
        verdict = verify(problem, response)
    except MemoryError:
        return {"score": 0.0, "reason": "memory limit", "failure": "memory"}
    except SandboxError as error:  # of the machine, not of the response
        return {"broken": str(error)}
    # math-verify's own time-out is no Exception; nor is a verifier's sys.exit().
    except BaseException as error:
        reason = f"verifier raised {type(error).__name__}: {error}"[:500]
        return {"score": 0.0, "reason": reason, "failure": "error"}
    if isinstance(verdict, JudgeRequest):
        return {"judge": dataclasses.asdict(verdict)}
    return {"score": verdict.score, "reason": verdict.reason, "failure": ""}


def _end_with_parent(parent: int) -> None:
    """Ends this process once `parent` is gone, even in the middle of an item."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    """Serves requests until stdin closes.

    argv: the verifier as "module:function", the address-space limit in MiB, the parent's id, and
    the sandbox's settings as JSON. A verifier that takes `tools` is given them.
    """
    requests = sys.stdin.buffer
    # What verifiers print must not get between the messages.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_end_with_parent, args=(int(sys.argv[3]),), daemon=True).start()
    limit = int(sys.argv[2]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    module, _, function = sys.argv[1].partition(":")
    try:
        verify = getattr(importlib.import_module(module), function)
        if "tools" in inspect.signature(verify).parameters:
            sandbox = from_config_dict(SandboxConfig, json.loads(sys.argv[4]))
            verify = functools.partial(verify, tools=Tools(sandbox))
    except BaseException as error:
        _reply(replies, {"broken": f"{type(error).__name__}: {error}"})
        raise
    _reply(replies, {"ready": True})
    warm: set[str] = set()
    while (body := read_message(requests)) is not None:
        item, problem, response = pickle.loads(body)
        if problem.data_source not in warm:
            # The first answer pays for imports; that is not the response's fault.
            with contextlib.suppress(BaseException):
                verify(problem, problem.answer)
            warm.add(problem.data_source)
        _reply(replies, {"item": item, "started": True})
        _reply(replies, {"item": item} | _score(verify, problem, response))


if __name__ == "__main__":
    main()
