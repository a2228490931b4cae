"""Forks a process for every program (argv: how to confine it, and the modules to have ready).

This process only starts others, so what is in its memory, and in that of every program at its
start, is what it was when it began. For each program it forks a monitor, which reads the program
from the control stream (descriptor 0), forks the candidate, feeds and watches it, and writes what
came of it to descriptor 1. Once the monitor has ended everything else in this sandbox is killed
and the working directory is emptied; then a closing frame tells that nothing is left.

Frames from the parent: "S" + JSON settings, the source, the input; then for a module calls, and
an empty frame at its end. Frames to the parent: see `monitor.py`.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import confinement  # noqa: E402
import driver  # noqa: E402
import monitor  # noqa: E402

sys.path.remove(HERE)
for _name in ("confinement", "driver", "examiner", "monitor", "plain"):
    sys.modules.pop(_name)  # a program may have modules of these names

# Imported once, so that programs need not.
WARM = (
    *("collections", "heapq", "bisect", "math", "itertools", "functools", "operator"),
    *("re", "string", "random", "datetime", "json", "copy", "typing"),
    *("statistics", "fractions", "decimal", "dataclasses", "enum", "abc", "io"),
    *("queue", "threading", "traceback", "atexit", "array", "cmath", "hashlib"),
    *("textwrap",),
)


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
    confinement.drop_capabilities()
    for name in WARM:
        importlib.import_module(name)
    for name, folder in settings["packages"]:
        confinement.load(name, folder)
    limits = confinement.Confinement(settings)
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
                monitor.watch(limits)
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
