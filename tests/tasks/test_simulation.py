"""CodeI/O by JSON equality, CRUXEval by running the reference on data."""

import json

import pytest

from pr2jax.tasks import simulation
from pr2jax.tasks.base import Problem
from pr2jax.tasks.registry import score
from pr2jax.tasks.sandbox import Outcome


def codeio(answer, response):
    return score(Problem("c", "?", answer, "simulation__codeio"), response)


def fence(value):
    return f"```json\n{value if isinstance(value, str) else json.dumps(value)}\n```"


@pytest.mark.parametrize(
    ("answer", "given", "want"),
    [
        ('"output": {"a": 1, "b": [1, 2]}', {"output": {"b": [1, 2], "a": 1}}, 1),
        ('{"output": {"a": 1}}', {"output": {"a": 1.0}}, 1),
        ('"output": {"a": 1}', {"a": 1}, 1),  # without its key
        ('"output": {"a": 1}', {"input": {"a": 1}}, 0),
        ('"input": {"x": 5}', {"input": {"x": 5}}, 1),
        ('"input": {"x": 5}', {"output": {"x": 5}}, 0),
        ('"input": {"x": 5}', {"input": {"x": 5, "y": 0}}, 0),
        ('"output": [1, 2]', {"output": [2, 1]}, 0),  # order matters
        ('"output": [1, 2]', {"output": [1, 2, 2]}, 0),
        ('"output": 1', {"output": True}, 0),
        ('"output": true', {"output": 1}, 0),
        ('"output": true', {"output": "True"}, 1),
        ('"output": "true"', {"output": True}, 1),
        ('"output": 1', {"output": "1"}, 0),
        ('"output": "[97]"', {"output": [97]}, 1),
        ('"output": {"s": "{\\"k\\": 1}"}', {"output": {"s": {"k": 1}}}, 1),
        ('"output": null', {"output": None}, 1),
        ('"output": null', {"output": 0}, 0),
        ('"output": 0.1', {"output": 0.1}, 1),
        ('"output": 0.1', {"output": 0.10000001}, 0),
        ('"output": "a b"', {"output": "a  b"}, 0),
        ('"output": ""', {"output": ""}, 1),
        ("5", 5, 1),
        ("[1, 2]", [1, 2], 1),
        ("{'a': (1, 2)}", {"a": [1, 2]}, 1),  # a Python literal as ground truth
        ('"output": 5', '"output": 5', 1),  # braces left out in the fence
        ('"output": 5', '{"output": 5', 0),
        ('"output": 5', "5", 1),
        ('"output": 5', "NaN", 0),
    ],
)
def test_codeio(answer, given, want):
    assert codeio(answer, fence(given)).score == want


def test_codeio_forms():
    answer = '"output": {"a": 1}'
    assert codeio(answer, 'Thus {"output": {"a": 1}}.').score == 1
    assert codeio(answer, r'\boxed{"output": {"a": 1}}').score == 1
    assert codeio(answer, f"<think>{fence({'output': {'a': 1}})}</think>").score == 0
    assert codeio(answer, fence({"output": {"a": 2}}) + fence({"output": {"a": 1}})).score == 1
    assert codeio(answer, "no json").reason == "no answer in the expected form"
    deep = '"[' * 60 + "1" + ']"' * 60
    assert codeio(answer, fence(deep)).score == 0
    nested: object = 1
    for _ in range(80):
        nested = [nested]
    assert "nested too deep" in codeio(answer, fence({"output": nested})).reason
    with pytest.raises(ValueError, match="ground truth of c is no JSON"):
        codeio("<<", fence(1))


class FakeSandbox:
    """Runs trusted reference code in this process: for tests of what is done with its results."""

    def __init__(self):
        self.calls = []

    def call(self, source, calls):
        outcomes = []
        for name, arguments in calls:
            self.calls.append((source, name, list(arguments)))
            space = {}
            exec(source, space)  # the test's own code
            try:
                outcomes.append(Outcome(True, space[name](*arguments)))
            except Exception as error:
                outcomes.append(Outcome(False, error=repr(error)))
        return outcomes


class FakeTools:
    def __init__(self):
        self.sandbox = FakeSandbox()


CODE = "def f(x, y=0):\n    return [x + y] * 2"


def crux(direction, given="3, 4", output="[7, 7]", code=CODE, answer=None):
    meta = {"code": code, "input": given, "output": output, "asked": direction}
    return Problem("x", "?", answer or output, "simulation__cruxeval", meta=meta)


def check(problem, answer, tools=None):
    response = answer if "ANSWER" in answer else f"[ANSWER]{answer}[/ANSWER]"
    return score(problem, response, tools or FakeTools())


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ("[7, 7]", 1),
        ("assert f(3, 4) == [7, 7]", 1),
        ("f(3, 4) == [7, 7]", 1),
        ("`[7, 7]`", 1),
        ("[7.0, 7]", 1),
        ("(7, 7)", 0),
        ("[7]", 0),
        ("[True, 7]", 0),
        ("f(3, 4)", 0),
        ("[3 + 4, 7]", 0),  # no literal
        ("[7, 7]; import os", 0),
        ("__import__('os').system('true') or [7, 7]", 0),
        ("", 0),
        ("[" * 5000, 0),
    ],
)
def test_outputs(answer, want):
    tools = FakeTools()
    assert check(crux("output"), answer, tools).score == want
    assert not tools.sandbox.calls  # the stored output is a literal: nothing has to run


def test_an_output_that_is_no_literal_is_computed():
    code = "class A(str):\n    pass\ndef f(x):\n    return {x: float('inf')}"
    problem = crux("output", given="'a'", output="{'a': float('inf')}", code=code, answer="?")
    tools = FakeTools()
    assert check(problem, "{'a': 1e999}", tools).score == 1
    assert tools.sandbox.calls == [(code, "f", ["a"])]
    broken = crux("output", given="'a'", output="g()", code="def f(x):\n    return 1 / 0")
    with pytest.raises(ValueError, match="x: its own code fails on its own input"):
        check(broken, "1")
    with pytest.raises(ValueError, match="x: its output is no literal, and its input is unknown"):
        check(crux("output", given="g(1)", output="g()"), "1")


@pytest.mark.parametrize(
    ("answer", "arguments", "want"),
    [
        ("assert f(3, 4) == [7, 7]", [3, 4], 1),
        ("f(3, 4)", [3, 4], 1),
        ("3, 4", [3, 4], 1),
        ("7", [7], 1),  # any input that gives the output
        ("f(y=4, x=3)", [3, 4], 1),
        ("f(3, y=4)", [3, 4], 1),
        ("x=3, y=4", [3, 4], 1),
        ("f(3)", [3], 0),
        ("assert f(3) == [7, 7]", [3], 0),  # what it claims does not count
        ("f(z=3)", None, 0),
        ("f(3, x=4)", None, 0),
        ("f(*[3, 4])", None, 0),
        ("f(open('x'))", None, 0),
        ("g(3, 4)", None, 0),
        ("f(3, 4) == [7, 7] and f(1)", None, 0),
        ("f(3, 4)\nf(1)", None, 0),
        ("f('a', 4)", ["a", 4], 0),  # f fails
        ("", [], 0),
    ],
)
def test_inputs(answer, arguments, want):
    tools = FakeTools()
    assert check(crux("input"), answer, tools).score == want
    called = [arguments for _, _, arguments in tools.sandbox.calls]
    assert called == ([] if arguments is None else [arguments])


EXAMPLE = "[PYTHON]\ndef f(x):\n    return 1\nassert f(??) == 17\n[/PYTHON]\n"
GURU = EXAMPLE + "[PYTHON]\n{}\n[/PYTHON]\n"
FUNCTIONAL = '{"functional": "[7, 7]"}'


@pytest.mark.parametrize(
    ("statement", "truth", "asked", "right", "wrong"),
    [
        ("assert f(??) == [7, 7]", FUNCTIONAL, "input", "assert f(3, 4) == [7, 7]", "f(3)"),
        ("assert f(3, 4) == ??", FUNCTIONAL, "output", "assert f(3, 4) == [7, 7]", "[7]"),
        ("assert f(3, 4) == ??", "[7, 7]", "output", "[7, 7]", "[8, 8]"),
        ("assert f(3, 4) == ??", "assert f(3, 4) == [7, 7]", "output", "[7, 7]", "[8, 8]"),
    ],
)  # fmt: skip
def test_gurus_rows(statement, truth, asked, right, wrong):
    prompt = GURU.format(f"{CODE}\n{statement}")
    problem = Problem(
        "g", prompt, truth, "simulation__cruxeval-i", meta={"original_prompt": prompt}
    )
    found = simulation.crux_of(problem)
    assert (found.code, found.asked) == (CODE, asked)
    assert check(problem, right).score == 1
    assert check(problem, wrong).score == 0
    assert check(problem, f"<think>[ANSWER]{right}[/ANSWER]").score == 0


def test_incomplete_rows_are_named():
    for problem in (
        Problem("g", "no block", "1", "simulation__cruxeval-i"),
        Problem("g", GURU.format("def f(): pass"), "1", "simulation__cruxeval-i"),
        Problem("g", "?", "1", "simulation__cruxeval", meta={"code": CODE, "output": "1"}),
    ):
        with pytest.raises(ValueError, match=r"^g: "):
            check(problem, "1")


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        (None, None, True),
        ("a", b"a", False),
        ([1], (1,), False),
        ({1: "a"}, {1.0: "a"}, False),
        ({True: "a"}, {1: "a"}, False),
        ({"a": [1, {2}]}, {"a": [1.0, {2}]}, True),
        ({1, 2}, {2, 1}, True),
        ({1}, {True}, False),
        (float("nan"), float("nan"), True),
        ([float("nan")], [1.0], False),
        (float("inf"), float("inf"), True),
    ],
)
def test_values_are_compared_with_their_types(a, b, same):
    assert simulation.same_value(a, b) is same
    assert simulation.same_value(b, a) is same


def test_in_the_sandbox():
    """The real sandbox where this machine can isolate programs."""
    from pr2jax.tasks.sandbox import SandboxError
    from pr2jax.tasks.tools import Tools

    tools = Tools()
    try:
        assert check(crux("input"), "f(3, 4)", tools).score == 1
    except SandboxError as error:
        pytest.skip(str(error))
    assert check(crux("input"), "f(1, 1)", tools).score == 0
