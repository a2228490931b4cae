"""What happens inside a program's own process: a script is run, or a module answers calls.

Whatever stands here can be overwritten by the program itself. Nothing depends on that: what leaves
the process is output, and it is judged elsewhere.
"""

import os
import struct
import sys
import traceback
import types

HEADER = struct.Struct("<I")
REQUESTS, REPLIES = 3, 4  # descriptors of a module's calls
SCRIPT, MODULE, EXAM = "script", "module", "exam"


def read_exactly(fd, size):
    """`size` bytes, or None where the stream ends."""
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_frame(fd):
    """One frame: a length and so many bytes; None where the stream ends."""
    head = read_exactly(fd, HEADER.size)
    return None if head is None else read_exactly(fd, HEADER.unpack(head)[0])


def write_frame(fd, body):
    """Writes a frame, all of it."""
    data = memoryview(HEADER.pack(len(body)) + body)
    while data:
        data = data[os.write(fd, data) :]


def _streams():
    """sys.stdin, stdout and stderr of this process: UTF-8 whatever the locale, as `-X utf8`."""
    text = {"encoding": "utf-8", "errors": "surrogateescape", "closefd": False}
    sys.stdin = open(0, **text)  # noqa: SIM115
    sys.stdout = open(1, "w", **text)  # noqa: SIM115
    sys.stderr = open(2, "w", **(text | {"errors": "backslashreplace"}))  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def new_main(name):
    """A fresh module under `name` in sys.modules."""
    module = types.ModuleType(name)
    module.__builtins__ = __builtins__
    sys.modules[name] = module
    return module


def run_script(source):
    """Runs `source` as `__main__`; the exit code that an interpreter would give."""
    _streams()
    sys.argv = ["program.py"]
    code = 0
    try:
        exec(compile(source, "program.py", "exec"), vars(new_main("__main__")))
    except SystemExit as leaving:
        code = leaving.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
        code = 0 if code is None else int((isinstance(code, int) and code) or 1)
    except BaseException as error:
        frames = error.__traceback__.tb_next  # the program's own
        traceback.print_exception(type(error), error, frames)
        code = 1
    return _leave(code)


def _leave(code):
    """What an interpreter does at its end: threads are waited for, buffers are flushed."""
    import atexit
    import threading

    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        return code or 1
    return code & 0xFF


def serve_calls(source, plain):
    """Loads `source`, then answers requests until they end.

    The first frame that leaves is the outcome of loading: ("ok", None, None, None) or an error. A
    request is the plain form of (verb, path, arguments, keywords, records): "call" calls what
    the dotted path names, "get" asks what it is. `records` are the classes whose instances the
    asker can take; an object of another class stays here and is known by a path "#N". The answer
    is the plain form of (kind, value, arguments as they are afterwards, text): kind "ok",
    "object" (value: its path), "callable" (value: the path) or "error" (value: the exception's
    name).
    """
    _streams()
    names = vars(new_main("solution"))
    sys.modules["__main__"] = sys.modules["solution"]
    try:
        exec(compile(source, "solution.py", "exec"), names)
        reply = ("ok", None, None, "")
    except BaseException as error:
        reply = _error(error)
    write_frame(REPLIES, plain.encode(reply))
    objects = {}
    while (body := read_frame(REQUESTS)) is not None:
        try:
            reply = _answer(body, names, objects, plain)
        except BaseException as error:
            reply = plain.encode(_error(error))
        write_frame(REPLIES, reply)


def _error(error):
    return ("error", type(error).__name__, None, str(error)[:500])


def _answer(body, names, objects, plain):
    classes = {k: v for k, v in names.items() if isinstance(v, type)}
    verb, path, arguments, keywords, records = plain.decode(body, classes)
    found = _find(path, names, objects)
    if verb == "get":
        if callable(found):
            return plain.encode(("callable", path, None, ""))
        value, arguments = found, None
    else:
        value = found(*arguments, **keywords)
    for reply in (
        ("ok", value, arguments, ""),
        ("ok", value, None, ""),  # arguments may hold what cannot travel back
    ):
        try:
            return plain.encode(reply, records)
        except plain.NotPlain as error:
            text = str(error)
    name = f"#{len(objects)}"
    objects[name] = value
    return plain.encode(("object", name, None, text))


def _find(path, names, objects):
    """What a dotted path names; `Class().method` makes an instance first."""
    found = None
    for i, part in enumerate(path.split(".")):
        name = part.removesuffix("()")
        if i:
            found = getattr(found, name)
        elif name in objects:
            found = objects[name]
        elif name in names:
            found = names[name]
        else:
            raise NameError(f"name {name!r} is not defined")
        if part.endswith("()"):
            found = found()
    return found
