"""A test-suite of asserts (trusted: it comes with the data) against a candidate that is elsewhere.

The suite runs here; the names that it takes from the candidate are proxies. A proxy's call crosses
as plain data and its value comes back as plain data, so an assert compares values of built-in
types and of the suite's own classes, whatever the candidate's classes would have said of
themselves. A verdict is a frame of this process, which runs no line of the candidate.
"""

import ast
import builtins
import contextlib
import os
import types
from collections import deque

import driver


class CandidateError(Exception):
    """The candidate raised what is no built-in exception, or ended."""


class Link:
    """Calls to the candidate: frames out, frames in. `names` are those of the suite."""

    def __init__(self, plain, names):
        self.plain, self.names = plain, names
        self.calls = 0

    def ask(self, verb, path, arguments=(), keywords=None):
        """The value of a call or attribute; arguments that it changed in place change here too.

        An exception of a built-in type is raised as that type, so that a suite may expect it.
        """
        self.calls += 1
        classes = {k: v for k, v in self.names.items() if _own(v)}
        request = (verb, path, list(arguments), keywords or {}, list(classes))
        driver.write_frame(driver.REPLIES, b"C" + self.plain.encode(request))
        body = driver.read_frame(driver.REQUESTS)
        if body is None:
            os._exit(1)
        kind, value, after, text = self.plain.decode(body, classes)
        if kind == "error":
            known = getattr(builtins, str(value), None)
            if isinstance(known, type) and issubclass(known, Exception):
                raise known(text)
            raise CandidateError(f"{value}: {text}")
        if kind in ("object", "callable"):
            return Proxy(self, str(value), kind == "object")
        for ours, theirs in zip(arguments, after or (), strict=False):
            _update(ours, theirs)
        return value


def _own(value):
    """Whether `value` is a class of the suite itself."""
    return isinstance(value, type) and value.__module__ == "suite"


def _update(ours, theirs):
    if type(ours) is not type(theirs):
        return
    if isinstance(ours, list | bytearray):
        ours[:] = theirs
    elif isinstance(ours, dict | set):
        ours.clear()
        ours.update(theirs)
    elif isinstance(ours, deque):
        ours.clear()
        ours.extend(theirs)
    elif type(ours).__module__ == "suite":
        vars(ours).clear()
        vars(ours).update(vars(theirs))


class Proxy:
    """A function, class or object of the candidate, known by its path there."""

    def __init__(self, link, path, is_object=False):
        self._link, self._path, self._object = link, path, is_object

    def __call__(self, *arguments, **keywords):
        return self._link.ask("call", self._path, arguments, keywords)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.ask("get", f"{self._path}.{name}")

    def __bool__(self):
        # An assert on a function that was not called would hold whatever it does.
        if self._object:
            return True
        raise TypeError(f"{self._path} is a function of the candidate, not a value")


def wanted(tree):
    """Names that a suite reads and neither binds nor finds among the built-in ones."""
    bound, read, stars = set(dir(builtins)), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            stars += [node.module for a in node.names if a.name == "*"]
            bound |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    for module in stars:
        with contextlib.suppress(ImportError):
            bound |= set(dir(__import__(module)))
    return read - bound


class _FromCandidate(ast.NodeTransformer):
    """Takes out `from solution import ...`: those names are the candidate's."""

    def __init__(self):
        self.names = set()

    def visit_ImportFrom(self, node):
        if node.module in ("solution", "program"):
            self.names |= {a.name for a in node.names if a.name != "*"}
            return None
        return node


def _tests(names):
    """pytest's way to find tests: functions named test*, and methods of classes named Test*."""
    for name, value in list(names.items()):
        if name.startswith("test") and isinstance(value, types.FunctionType):
            yield value
        elif name.startswith("Test") and _own(value):
            for method in dir(value):
                if method.startswith("test"):
                    yield getattr(value(), method)


def examine(source, plain):
    """Runs the suite in `source`, the plain form of (prelude, suite, how, names).

    prelude: trusted code before it (classes and helpers of the problem), "" for none; its names
    that the candidate must answer for are `names`. how: "run" executes the suite, "pytest" then
    calls its tests. The last frame is b"V" and the plain form of (passed, reason, calls).
    """
    driver._streams()
    prelude, suite, how, answered = plain.decode(source)
    module = driver.new_main("suite")
    names = vars(module)
    link = Link(plain, names)
    try:
        taken = _FromCandidate()
        tree = ast.fix_missing_locations(taken.visit(ast.parse(suite)))
        if prelude:
            exec(compile(prelude, "prelude.py", "exec"), names)
        for name in (wanted(tree) - set(names)) | taken.names | set(answered):
            names[name] = Proxy(link, name)
        exec(compile(tree, "suite.py", "exec"), names)
        if how == "pytest":
            tests = list(_tests(names))
            if not tests:
                raise LookupError("the suite has no tests")
            for test in tests:
                test()
        verdict = (True, "", link.calls)
    except AssertionError as error:
        verdict = (False, f"assertion failed {_where(error)}: {error}"[:500], link.calls)
    except CandidateError as error:
        verdict = (False, f"candidate raised {error}"[:500], link.calls)
    except plain.NotPlain as error:
        verdict = (False, f"candidate returned what cannot be compared: {error}"[:500], link.calls)
    except BaseException as error:
        verdict = (False, f"suite raised {type(error).__name__}: {error}"[:500], link.calls)
    driver.write_frame(driver.REPLIES, b"V" + plain.encode(verdict))


def _where(error):
    at, trace = 0, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "suite.py":
            at = trace.tb_lineno
        trace = trace.tb_next
    return f"in line {at}"
