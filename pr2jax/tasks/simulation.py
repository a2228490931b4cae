"""Simulation: CodeI/O by equality of JSON, CRUXEval by running the reference function.

CodeI/O (arXiv 2502.07316) ground truths are texts such as `"output": {...}` or `"input": {...}`,
with or without outer braces. CRUXEval (arXiv 2401.03065) rows are read in three forms: meta with
code, input and output; Guru's {"functional": "<output>"} with the code in the prompt between
[PYTHON] and [/PYTHON]; and a text "assert f(...) == ...". Model-written text is only ever read as
JSON or as a literal.
"""

import ast
import dataclasses
import json
import re
from typing import Any

from pr2jax.tasks import answers
from pr2jax.tasks.base import Problem, Verdict
from pr2jax.tasks.tools import Tools

NO_ANSWER = "no answer in the expected form"
_ASKED_INPUT = re.compile(r"f\(\s*\?\?\s*\)\s*==")
_ASKED_OUTPUT = re.compile(r"\s*==\s*\?\?\s*$")
_DEPTH = 50  # JSON within JSON texts, and nesting of values that are compared


# --- CodeI/O -----------------------------------------------------------------------------------


def normalised(value: Any, depth: int = 0) -> Any:
    """JSON data with texts that hold an object, a list or a truth value read as such.

    Raises ValueError where it is nested deeper than 50.
    """
    if depth > _DEPTH:
        raise ValueError("nested too deep")
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        if (text[:1], text[-1:]) in (("{", "}"), ("[", "]")):
            good, inner = answers.parse_json(text)
            if good:
                return normalised(inner, depth + 1)
        return value
    if isinstance(value, list):
        return [normalised(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {key: normalised(item, depth + 1) for key, item in value.items()}
    return value


def same_json(a: Any, b: Any) -> bool:
    """Equality of JSON data: 1 equals 1.0, true equals no number, keys have no order."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    return a == b


def codeio_truth(problem: Problem) -> tuple[str, Any]:
    """("output" or "input", the reference data). Raises ValueError naming the problem."""
    text = problem.answer.strip()
    for body in (text, "{" + text + "}"):
        good, value = answers.parse_json(body)
        if good and isinstance(value, dict):
            for key in ("output", "input"):
                if len(value) == 1 and key in value:
                    return key, value[key]
        if good:
            return "output", value
    good, value = answers.literal(text)
    if good:
        try:
            return "output", json.loads(json.dumps(value))
        except (TypeError, ValueError):
            pass
    raise ValueError(f"ground truth of {problem.id} is no JSON: {problem.answer[:80]!r}")


def verify_codeio(problem: Problem, response: str) -> Verdict:
    """1 where the response's JSON equals the reference, under its key or, without it, whole.

    Raises ValueError where the ground truth is no JSON.
    """
    key, want = codeio_truth(problem)
    if problem.meta.get("response_regex"):
        found = answers.stated(problem, response)
        good, given = (False, None) if found is None else answers.json_answer(found)
    else:
        good, given = answers.json_answer(response)
    if not good:
        return Verdict(0.0, NO_ANSWER)
    if isinstance(given, dict) and key in given:
        given = given[key]
    try:
        right = same_json(normalised(given), normalised(want))
    except ValueError as error:
        return Verdict(0.0, f"the answer is {error}")
    return Verdict(1.0) if right else Verdict(0.0, f"wrong: read {str(given)[:80]!r}")


# --- CRUXEval ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Crux:
    """code: defines f. asked: "output" or "input". call: source of f(...), "" where unknown.

    output: source of the value that f(...) has, "" where unknown.
    """

    code: str
    asked: str
    call: str
    output: str


def _block(problem: Problem) -> str:
    """The last [PYTHON] block of the prompt."""
    for text in (problem.meta.get("original_prompt"), problem.meta.get("question"), problem.prompt):
        end = text.rfind("[/PYTHON]") if isinstance(text, str) else -1
        start = text.rfind("[PYTHON]", 0, end) if end >= 0 else -1
        if start >= 0:
            return text[start + len("[PYTHON]") : end].strip()
    return ""


def crux_of(problem: Problem) -> Crux:
    """The problem's parts. Raises ValueError naming the problem where they cannot be found."""
    meta = problem.meta
    if isinstance(meta.get("code"), str):
        given, output = meta.get("input"), meta.get("output")
        asked = meta.get("asked") or meta.get("family") or _asked(problem.data_source)
        if asked in ("input", "output") and output is not None:
            call = "" if given is None else f"f({given})"
            return Crux(meta["code"], asked, call, str(output))
        raise ValueError(f"{problem.id}: neither input nor output is said to be asked for")
    code, found, statement = _block(problem).rpartition("\nassert ")
    statement = statement.strip()
    if found and (match := _ASKED_INPUT.match(statement)):
        return Crux(code, "input", "", statement[match.end() :].strip())
    if found and (match := _ASKED_OUTPUT.search(statement)):
        return Crux(code, "output", statement[: match.start()].strip(), _output_text(problem))
    raise ValueError(
        f"{problem.id}: the prompt has no [PYTHON] block that ends in assert f(??) == ... or "
        "assert f(...) == ??"
    )


def _output_text(problem: Problem) -> str:
    """Source of the output in a ground truth: {"functional": ...}, an assert, or bare."""
    good, truth = answers.parse_json(problem.answer)
    if good and isinstance(truth, dict) and isinstance(truth.get("functional"), str):
        text = truth["functional"].strip()
    else:
        text = problem.answer.strip()
    node = _expression(text) if text.startswith("assert ") else None
    return ast.unparse(node.comparators[0]) if node is not None and _is_equation(node) else text


def _asked(source: str) -> str:
    name = source.lower().rstrip("_")
    if name.endswith(("-o", "_o", "output")):
        return "output"
    return "input" if name.endswith(("-i", "_i", "input")) else ""


def _expression(text: str) -> ast.expr | None:
    """The expression that `text` is, the test of an assert included; None where it is neither."""
    text = text.strip().strip("`").strip()
    if len(text) > answers.LITERAL_LIMIT:
        return None
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    if len(body) != 1:
        return None
    if isinstance(body[0], ast.Assert):
        return body[0].test
    return body[0].value if isinstance(body[0], ast.Expr) else None


def _value(node: ast.expr) -> tuple[bool, Any]:
    try:
        return True, ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        return False, None


def _is_equation(node: ast.expr) -> bool:
    return isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq)


def output_of(text: str) -> tuple[bool, Any]:
    """(True, value) of "assert f(...) == 17", "f(...) == 17" or "17"; (False, None) of others."""
    node = _expression(text)
    if node is None:
        return False, None
    return _value(node.comparators[0] if _is_equation(node) else node)


def arguments_of(text: str, code: str) -> list[Any] | None:
    """Positional arguments in "assert f(16) == 17", "f(16)" or "16"; None where they are none.

    Keyword arguments are put at their place in the signature of f in `code`.
    """
    node = _expression(text)
    if node is not None and _is_equation(node):
        node = node.left
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    if not (is_call and node.func.id == "f"):
        node = _expression(f"f({text.strip().strip('`')}\n)")
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return None
    values = [_value(argument) for argument in node.args]
    if not all(good for good, _ in values):
        return None
    held = [value for _, value in values]
    if not node.keywords:
        return held
    names = _parameters(code)
    named = {}
    for keyword in node.keywords:
        good, named[keyword.arg] = _value(keyword.value)
        if not good:
            return None
    rest = names[len(held) : len(held) + len(named)]
    return held + [named[name] for name in rest] if set(rest) == set(named) else None


def _parameters(code: str) -> list[str]:
    """Names of the positional parameters of f."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef) and node.name == "f":
            return [a.arg for a in node.args.posonlyargs + node.args.args]
    return []


def same_value(a: Any, b: Any, depth: int = 0) -> bool:
    """Python's equality of plain data, but True is not 1, and nan equals nan."""
    if depth > _DEPTH:
        return False
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b or (a != a and b != b)
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(
            same_value(x, y, depth + 1) for x, y in zip(a, b, strict=True)
        )
    if isinstance(a, dict):
        typed = {(type(key), key) for key in a} == {(type(key), key) for key in b}
        return typed and all(same_value(a[key], b[key], depth + 1) for key in a)
    if isinstance(a, set | frozenset):
        return {(type(item), item) for item in a} == {(type(item), item) for item in b}
    return a == b


def verify_cruxeval(problem: Problem, response: str, tools: Tools) -> Verdict:
    """1 where f has the value that the answer says, or gets it from the arguments it gives.

    The answer stands in [ANSWER]...[/ANSWER]: an assert, a call, or a bare literal. Only the
    reference's code runs, in the sandbox, on data. Raises ValueError where the problem is
    incomplete, or its own code fails on its own input.
    """
    crux = crux_of(problem)
    if problem.meta.get("response_regex"):
        found = answers.stated(problem, response)
    else:
        found = answers.answer_block(response)
    if found is None:
        return Verdict(0.0, NO_ANSWER)
    if crux.asked == "output":
        good, given = output_of(found)
        if not good:
            return Verdict(0.0, "the answer is no literal")
        want = _reference_output(problem, crux, tools)
        if same_value(given, want):
            return Verdict(1.0)
        return Verdict(0.0, f"wrong: read {repr(given)[:80]}")
    arguments = arguments_of(found, crux.code)
    if arguments is None:
        return Verdict(0.0, "the answer is no call of f with literals")
    want = _reference_output(problem, crux, tools)
    outcome = tools.sandbox.call(crux.code, [("f", arguments)])[0]
    if not outcome.ok:
        return Verdict(0.0, f"f fails on the answer: {outcome.error[:200]}")
    if same_value(outcome.value, want):
        return Verdict(1.0)
    return Verdict(0.0, f"wrong: f gives {repr(outcome.value)[:80]}")


def _reference_output(problem: Problem, crux: Crux, tools: Tools) -> Any:
    """The stored output where it is a literal, else what f returns on the stored input."""
    good, value = answers.literal(crux.output)
    if good:
        return value
    arguments = arguments_of(crux.call, crux.code) if crux.call else None
    if arguments is None:
        raise ValueError(f"{problem.id}: its output is no literal, and its input is unknown")
    outcome = tools.sandbox.call(crux.code, [("f", arguments)])[0]
    if not outcome.ok:
        raise ValueError(f"{problem.id}: its own code fails on its own input: {outcome.error}")
    return outcome.value
