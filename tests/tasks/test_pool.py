"""VerifierPool against verifiers that hang, crash, eat memory, print, and lie."""

import pathlib
import subprocess
import sys
import threading
import time

import pytest

from pr2jax.tasks import pool as pool_module
from pr2jax.tasks.base import Problem, TaskConfig
from pr2jax.tasks.pool import VerifierPool
from pr2jax.tasks.registry import build_task

HERE = pathlib.Path(__file__).parent
PROBLEM = Problem("p", "?", "ok", "test")


@pytest.fixture(scope="module")
def pool():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        with VerifierPool(2, timeout_s=1.0, memory_mb=1024, verifier="hostile_verifier:score") as p:
            yield p


@pytest.mark.parametrize(
    ("response", "reason", "counter"),
    [
        ("hang", "time limit of 1 s", "timeouts"),
        ("segfault", "crashed", "crashes"),
        ("exit", "crashed", "crashes"),
        ("sys.exit", "raised SystemExit", "errors"),
        ("raise", "RuntimeError: no such luck", "errors"),
        ("memory", "memory limit", "memory"),
        ("nan", "outside [0, 1]", None),
        ("big", "outside [0, 1]", None),
        ("forge", "crashed", "crashes"),
        ("answer others", "crashed", "crashes"),
    ],
)
def test_a_bad_item_costs_only_itself(pool, response, reason, counter):
    before = dict(pool.stats)
    responses = ["ok", response, "ok", "no", "ok", response, "ok"]
    verdicts = pool.score_batch([(PROBLEM, r) for r in responses])
    assert [v.score for v in verdicts] == [1, 0, 1, 0, 1, 0, 1]
    assert reason in verdicts[1].reason
    assert reason in verdicts[5].reason
    changed = {k: n - before.get(k, 0) for k, n in pool.stats.items() if n != before.get(k, 0)}
    assert changed.pop("scored") == 7
    restarts = changed.pop("restarts", 0)
    assert changed == ({counter: 2} if counter else {})
    assert restarts == (2 if counter in ("timeouts", "crashes", "memory") else 0)


def test_an_item_whose_worker_is_killed_from_outside_is_verified_by_another(pool):
    before = dict(pool.stats)
    victims = [worker.process for worker in pool._workers]
    timer = threading.Timer(0.3, lambda: [victim.kill() for victim in victims])
    timer.start()
    responses = ["sleep0.7", "sleep0.7", "ok", "no"]
    verdicts = pool.score_batch([(PROBLEM, r) for r in responses])
    assert [v.reason for v in verdicts[:2]] == responses[:2]
    assert [v.score for v in verdicts[2:]] == [1, 0]
    assert pool.stats["restarts"] - before.get("restarts", 0) == 2
    assert pool.stats["crashes"] == before.get("crashes", 0)


def test_an_item_that_gets_its_worker_killed_every_time_is_a_crash(pool):
    before = dict(pool.stats)
    verdicts = pool.score_batch([(PROBLEM, "ok"), (PROBLEM, "kill"), (PROBLEM, "ok")])
    assert [v.score for v in verdicts] == [1, 0, 1]
    assert "crashed (exit code -9)" in verdicts[1].reason
    assert pool.stats["crashes"] - before.get("crashes", 0) == 1
    assert pool.stats["restarts"] - before.get("restarts", 0) == 2


def test_order_is_kept_when_items_finish_out_of_order(pool):
    responses = ["sleep0.3", "sleep0.0", "sleep0.1", "sleep0.0", "sleep0.2"]
    verdicts = pool.score_batch([(PROBLEM, r) for r in responses])
    assert [v.reason for v in verdicts] == responses


def test_workers_persist_and_import_no_jax(pool):
    pids = [{v.reason for v in pool.score_batch([(PROBLEM, "pid")] * 8)} for _ in range(2)]
    assert pids[0] | pids[1] <= {str(w.process.pid) for w in pool._workers}
    assert pool.score_batch([(PROBLEM, "modules"), (PROBLEM, "print")])[0].score == 1.0
    assert pool.score_batch([]) == []


def test_a_worker_killed_between_batches_is_replaced(pool):
    victim = pool._workers[0].process
    victim.kill()
    victim.wait()
    assert [v.score for v in pool.score_batch([(PROBLEM, "ok")] * 4)] == [1, 1, 1, 1]


def test_an_interrupted_batch_leaves_no_late_answers(pool, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pool, "_read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.score_batch([(PROBLEM, "sleep0.2")] * 2)
    assert [v.score for v in pool.score_batch([(PROBLEM, "no"), (PROBLEM, "ok")])] == [0, 1]


def test_workers_end_when_the_parent_is_killed():
    code = (
        "import os, sys; from pr2jax.tasks.pool import VerifierPool;"
        "p = VerifierPool(1); print(p._workers[0].process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid = int(out.stdout)
    stat = pathlib.Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not stat.exists() or " Z " in stat.read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"worker {pid} outlived its parent")


def test_gym_and_math_through_the_pool():
    task = build_task(TaskConfig(size=4, held_out=0))
    math = Problem("m", "?", r"\frac{1}{2}", "math__x")
    with VerifierPool(2, timeout_s=3) as pool:
        items = [(p, p.answer) for p in task.train] + [(task.train[0], "x")]
        items += [(math, r"\boxed{0.5}"), (math, r"\boxed{2}"), (math, r"\boxed{9^{9^{9^{9}}}}")]
        items += [(Problem("u", "?", "1", "chess__taco"), "1")]
        verdicts = pool.score_batch(items)
        assert [v.score for v in verdicts] == [1, 1, 1, 1, 0, 1, 0, 0, 0]
        assert "chess__taco" in verdicts[-1].reason
        assert pool.stats["errors"] == 1
    with pytest.raises(ValueError, match="closed"):
        pool.score_batch(items)


def test_bad_limits_are_refused():
    with pytest.raises(ValueError, match="0 workers"):
        VerifierPool(0)


def test_workers_that_cannot_start_are_an_error_not_a_zero():
    broken = pytest.raises(RuntimeError, match="do not work: ModuleNotFoundError.*nowhere")
    with VerifierPool(1, verifier="nowhere:score") as pool, broken:
        pool.score_batch([(PROBLEM, "ok")])


@pytest.mark.parametrize("doomed", [3, 50])
def test_workers_killed_as_they_start_cost_no_item_and_an_endless_row_of_them_ends(
    monkeypatch, doomed
):
    left = [None] * doomed

    class Doomed(pool_module._Worker):
        def __init__(self, *start):
            super().__init__(*start)
            if left:
                left.pop()
                self.process.kill()

    monkeypatch.setattr(pool_module, "_Worker", Doomed)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    with VerifierPool(1, verifier="hostile_verifier:score") as pool:
        if doomed == 50:
            with pytest.raises(RuntimeError, match="exit code -9; 5 in a row were killed"):
                pool.score_batch([(PROBLEM, "ok")])
            return
        assert [v.score for v in pool.score_batch([(PROBLEM, "ok"), (PROBLEM, "no")])] == [1, 0]
        assert pool.stats["crashes"] == 0
