"""Code verdicts: what counts as the program, as its tests, and as the same output."""

import json

import pytest

from pr2jax.tasks import code
from pr2jax.tasks.base import JudgeRequest, Problem, Verdict
from pr2jax.tasks.judge import JudgeError
from pr2jax.tasks.pool import VerifierPool
from pr2jax.tasks.sandbox import SandboxConfig, SandboxError
from pr2jax.tasks.tools import Tools


@pytest.fixture(scope="module")
def tools():
    found = Tools(SandboxConfig(timeout_s=3.0))
    try:
        found.sandbox  # noqa: B018
    except SandboxError as error:
        pytest.skip(f"this machine cannot: {error}")
    yield found
    found.sandbox.close()


def problem(tests, **meta):
    return Problem("p", "?", tests if isinstance(tests, str) else json.dumps(tests), "x", meta=meta)


def fenced(source, language="python"):
    return f"Here:\n```{language}\n{source}\n```\n"


SUMS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
RIGHT = "print(sum(map(int, input().split())))"


@pytest.mark.parametrize(
    ("response", "score", "reason"),
    [
        (fenced(RIGHT), 1, "2 cases ["),
        (fenced("print(1)") + fenced(RIGHT), 1, ""),
        (fenced(RIGHT) + fenced("3\n7", "text"), 1, ""),
        ("<think>" + fenced("print(3)") + "</think>" + fenced(RIGHT), 1, ""),
        ("<think>" + fenced(RIGHT), 0, "no program"),
        (f"```python\n{RIGHT}", 0, "no program"),
        (RIGHT, 0, "no program"),
        ("", 0, "no program"),
        (fenced("print(3)"), 0, "case 2 of 2: printed '3', not '7' ["),
        (fenced("print(input().split()[5])"), 0, "case 1 of 2: exit code 1: IndexError"),
        (fenced("import time\ntime.sleep(9)"), 0, "case 1 of 2: time limit"),
        (fenced(RIGHT + "\nraise SystemExit(1)"), 0, "case 1 of 2: exit code 1"),
    ],
)
def test_programs_by_their_output(tools, response, score, reason):
    verdict = code.verify(problem(SUMS), response, tools)
    assert verdict.score == score
    assert verdict.reason.startswith(reason)
    assert f"[{tools.sandbox.tier}]" in verdict.reason or "no program" in verdict.reason


def test_all_cases_together_have_a_limit():
    many = {"inputs": ["1 2\n"] * 400, "outputs": ["3\n"] * 400}
    tools = Tools(SandboxConfig(total_s=0.2))
    with tools.sandbox:
        verdict = code.verify(problem(many), fenced(RIGHT), tools)
    assert verdict.score == 0.0
    assert verdict.reason.startswith("time limit of all cases (0.2 s) before case ")


def test_a_bare_program_where_the_problem_says_so(tools):
    assert code.verify(problem(SUMS, bare_code=True), RIGHT, tools).score == 1.0
    assert code.verify(problem(SUMS, bare_code=True), fenced(RIGHT), tools).score == 1.0


def test_a_prefix_and_an_entry_point(tools):
    prefix = "from typing import List\n\ndef half(x: int) -> int:\n    '''Halves.'''\n"
    tests = {"functional": "def check(c):\n    assert c(4) == 2\n    assert c(7) == 3\ncheck(half)"}
    task = problem(tests, prefix=prefix, entry_point="half")
    assert code.verify(task, fenced("    return x // 2"), tools).reason.startswith("2 calls [")
    assert code.verify(task, fenced("def half(x):\n    return x // 2"), tools).score == 1.0
    # Nothing of its own: the prefix's function, which returns None, must not pass for it.
    assert code.verify(task, fenced("y = 1"), tools).score == 0.0


def test_tests_of_the_shapes_that_the_files_have(tools):
    lines = {"inputs": [["1 2"], "3 4\n"], "outputs": [["3"], "7"]}
    assert code.verify(problem(lines), fenced(RIGHT), tools).score == 1.0
    deep = (
        "_inputs = [[[1, 2]], [[3]]]\n_outputs = [[3], [3]]\nimport math\n"
        "def _eq(a, b): return math.isclose(a, b) if isinstance(a, float) else a == b\n"
        "for i, o in zip(_inputs, _outputs):\n    assert _eq(total(*i), o[0])\n"
    )
    task = problem({"functional": deep})
    assert code.verify(task, fenced("def total(xs): return sum(xs)"), tools).score == 1.0
    assert code.verify(task, fenced("def total(xs): return xs[0]"), tools).score == 0.0
    method = {"functional": "assert Solution().twice(4) == 8\nassert Solution().twice(x=1) == 2"}
    good = "class Solution:\n    def twice(self, x):\n        return 2 * x"
    assert code.verify(problem(method), fenced(good), tools).score == 1.0
    suite = {"pytest": "from solution import add\n\ndef test_add():\n    assert add(1, 2) == 3\n"}
    assert code.verify(problem(suite), fenced("def add(a, b): return a + b"), tools).score == 1.0
    assert code.verify(problem(suite), fenced("def add(a, b): return 4"), tools).score == 0.0


@pytest.mark.parametrize(
    "tests",
    ["", "[]", "{}", "not json", {"inputs": [], "outputs": []}, {"inputs": ["1"], "outputs": []}],
)
def test_a_ground_truth_that_is_no_test_is_an_error(tools, tests):
    with pytest.raises(code.TestsError, match="tests of p "):
        code.verify(problem(tests), fenced(RIGHT), tools)


@pytest.mark.parametrize(
    ("printed", "wanted", "same"),
    [
        ("3\n", "3", True),
        ("  3 \n\n", "3\n", True),
        ("1 2\n3", "1  2 \n3\n", True),
        ("1\n2", "1 2", False),
        ("1 2 3", "1 2", False),
        ("YES", "yes", True),
        ("True", "true", False),
        ("0.3333333", "0.33333333", True),
        ("0.333", "0.334", False),
        ("1.0", "1", True),
        ("1e3", "1000", True),
        ("1000000000000000001", "1000000000000000000", False),
        ("007", "7", True),
        ("1_0", "10", False),
        ("nan", "nan", True),
        ("nan", "NaN", False),
        ("inf", "1e999", False),
        ("", "", True),
        ("", "0", False),
        ("9" * 5000, "9" * 4999 + "8", False),
        ("٣", "3", False),
    ],
)
def test_same_output(printed, wanted, same):
    assert code.same_output(printed, wanted) is same


# ------------------------------------------------------------------ through the pool


def test_the_pool_gives_verifiers_a_sandbox_and_asks_the_judge(tools):
    class Judge:
        def judge(self, requests):
            assert requests == [JudgeRequest("Why is the sky blue?", "scattering", "it scatters")]
            return [Verdict(1.0, "the judge agrees")]

    programs = Problem("c", "?", json.dumps(SUMS), "codegen__x")
    essay = Problem("s", "Why is the sky blue?", "scattering", "stem_web")
    items = [(programs, fenced(RIGHT)), (essay, r"\boxed{it scatters}"), (programs, fenced("1"))]
    with VerifierPool(2, timeout_s=20, sandbox=SandboxConfig(timeout_s=3), judge=Judge()) as pool:
        verdicts = pool.score_batch(items)
        assert [v.score for v in verdicts] == [1.0, 1.0, 0.0]
        assert verdicts[1].reason == "the judge agrees"
        assert pool.stats["judged"] == 1
        pool.judge = None
        with pytest.raises(JudgeError, match=r"problem s \(stem_web\) needs a model judge"):
            pool.score_batch(items)


def test_a_machine_that_cannot_isolate_is_an_error_and_no_zero():
    settings = SandboxConfig(isolation="namespaces", packages=("no_such_package",))
    programs = Problem("c", "?", json.dumps(SUMS), "codegen__x")
    broken = pytest.raises(RuntimeError, match="no isolation for model-written programs here")
    with VerifierPool(1, timeout_s=20, sandbox=settings) as pool, broken:
        pool.score_batch([(programs, fenced(RIGHT))])


def test_programs_have_their_own_time_in_the_pool():
    slow = "import time\ntime.sleep(1.5)\n" + RIGHT
    programs = Problem("c", "?", json.dumps(SUMS), "codegen__x")
    with VerifierPool(1, timeout_s=1.0, sandbox=SandboxConfig(timeout_s=5.0)) as pool:
        [verdict] = pool.score_batch([(programs, fenced(slow))])  # 3 seconds in all
        assert verdict.score == 1.0
        assert not pool.stats["timeouts"]
