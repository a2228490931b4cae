"""Code: programs judged by what they print, by what their functions return, and by asserts.

Ground truths are those of Guru's files: JSON with "inputs" and "outputs" (stdin and stdout of a
script), or "functional" (asserts) or "pytest" (a test module) to be run against the program. All
cases must pass. Every reason ends with the tier of isolation that the program ran under.
"""

from __future__ import annotations

import json
import math
import re
import time
from typing import Any

from pr2jax.tasks import answers
from pr2jax.tasks.base import Problem, Verdict
from pr2jax.tasks.sandbox import Run, Sandbox
from pr2jax.tasks.tools import Tools

_LANGUAGES = ("python", "python3", "py")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
ABS_TOL, REL_TOL = 1e-6, 1e-9


class TestsError(ValueError):
    """A ground truth that is no set of tests: no response could be right."""

    __test__ = False


def tests_of(problem: Problem) -> dict[str, Any]:
    """The problem's tests. Raises TestsError naming the problem."""
    try:
        tests = json.loads(problem.answer)
    except ValueError as error:
        raise TestsError(f"tests of {problem.id} are no JSON ({error})") from None
    if isinstance(tests, dict):
        if any(isinstance(tests.get(key), str) and tests[key] for key in ("functional", "pytest")):
            return tests
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
        lists = isinstance(inputs, list) and isinstance(outputs, list)
        if lists and inputs and len(inputs) == len(outputs):
            return {"inputs": [*map(_text, inputs)], "outputs": [*map(_text, outputs)]}
    raise TestsError(
        f"tests of {problem.id} have neither functional, nor pytest, nor inputs and outputs of "
        "equal number"
    )


def _text(value: Any) -> str:
    """Some files give a text as its lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def program_of(problem: Problem, response: str) -> str | None:
    """The program in a response: its last Python block; None where there is none.

    A problem with meta["bare_code"] takes a response without any fence as the program.
    """
    code = answers.last_code(response, _LANGUAGES)
    if code is None and problem.meta.get("bare_code") and "```" not in response:
        code = answers.after_think(response)
    return code if code and code.strip() else None


def verify(problem: Problem, response: str, tools: Tools) -> Verdict:
    """1 if the program passes all of the problem's tests, else 0 with the reason.

    meta["prefix"] stands before the program (imports, helpers, or the beginning of the function
    that the response goes on with); meta["entry_point"] is answered for by the program even where
    the prefix defines it. Raises TestsError, and SandboxError where programs cannot be isolated.
    """
    sandbox = tools.sandbox
    tests = tests_of(problem)
    code = program_of(problem, response)
    if code is None:
        return Verdict(0.0, "no program in the response")
    prefix = problem.meta.get("prefix") or ""
    source = f"{prefix}\n{code}" if prefix else code
    if "inputs" in tests:
        reason = check_outputs(sandbox, source, tests["inputs"], tests["outputs"])
        count = f"{len(tests['inputs'])} cases"
    else:
        how = "pytest" if not tests.get("functional") else "run"
        entry = problem.meta.get("entry_point")
        exam = sandbox.examine(
            source,
            tests["functional" if how == "run" else "pytest"],
            prelude=prefix,
            answered=[entry] if entry else [],
            how=how,
        )
        reason = "" if exam.passed else exam.reason
        count = f"{exam.calls} calls"
    where = f"[{sandbox.tier}]"
    return Verdict(0.0, f"{reason} {where}") if reason else Verdict(1.0, f"{count} {where}")


def check_outputs(sandbox: Sandbox, source: str, inputs: list[str], outputs: list[str]) -> str:
    """Runs a script on each input; why the first wrong output is wrong, empty where none is."""
    deadline = time.monotonic() + sandbox.cfg.total_s
    for number, (given, wanted) in enumerate(zip(inputs, outputs, strict=True), start=1):
        if time.monotonic() > deadline:
            return f"time limit of all cases ({sandbox.cfg.total_s:g} s) before case {number}"
        run = sandbox.run(source, given)
        reason = _wrong_output(run, wanted)
        if reason:
            return f"case {number} of {len(inputs)}: {reason}"
    return ""


def _wrong_output(run: Run, wanted: str) -> str:
    if not run.ok:
        return run.explain()
    try:
        printed = run.stdout.decode("utf-8")
    except UnicodeDecodeError:
        return "its output is not UTF-8"
    if same_output(printed, wanted):
        return ""
    return f"printed {printed.strip()[:80]!r}, not {wanted.strip()[:80]!r}"


def same_output(printed: str, wanted: str) -> bool:
    """Whether two outputs agree line by line and word by word.

    Space around lines does not count, nor the case of yes and no; numbers with a decimal point or
    exponent on either side agree within 1e-6 (or 1e-9 of the larger).
    """
    ours, theirs = printed.strip().splitlines(), wanted.strip().splitlines()
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        words = a.split(), b.split()
        if len(words[0]) != len(words[1]) or not all(map(_same_word, *words)):
            return False
    return True


def _same_word(a: str, b: str) -> bool:
    if a == b:
        return True
    if a.lower() == b.lower() in ("yes", "no"):
        return True
    if not (_NUMBER.fullmatch(a) and _NUMBER.fullmatch(b)):
        return False
    if a.lstrip("+-").isdigit() and b.lstrip("+-").isdigit():
        return int(a) == int(b) if max(len(a), len(b)) < 4000 else False
    return math.isclose(float(a), float(b), rel_tol=REL_TOL, abs_tol=ABS_TOL)
