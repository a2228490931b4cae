"""Killing real processes, and whether the comparison would see a difference."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from pr2jax.chaos import __main__ as chaos
from pr2jax.chaos import judge
from pr2jax.chaos.faults import KINDS, UNSEALED, Fault, damage, schedule
from pr2jax.chaos.processes import Processes, processes_below, wait_for_orphans
from pr2jax.chaos.trial import Options, Trial, torment
from pr2jax.core.checkpoint import Checkpointer
from pr2jax.train import audit
from tests import xla

ROOT = Path(__file__).resolve().parent.parent

# Steps of a twentieth of a second, a row and every second time a checkpoint each; a worker.
RUN = """
import hashlib, json, os, pathlib, shutil, socket, subprocess, sys, threading, time
flags = dict(f.lstrip("-").split("=") for f in sys.argv[1:])
folder, index = pathlib.Path(flags["workdir"]), int(flags.get("process_id", 0))

def gone(connection):  # a peer that is there says nothing
    if not connection.recv(1) and not os.path.exists(folder / "over"):
        print("process is gone", flush=True)
        os._exit(75)

if "process_id" in flags:
    port = int(flags["coordinator_address"].rpartition(":")[2])
    if index:
        for _ in range(200):
            try:
                link = socket.create_connection(("localhost", port))
                break
            except OSError:
                time.sleep(0.05)
        gone(link)
        sys.exit()
    server = socket.create_server(("localhost", port))
    server.settimeout(10)
    link = server.accept()[0]
    threading.Thread(target=gone, args=(link,), daemon=True).start()

ALONE = "import os, time, sys\\nwhile os.getppid() == int(sys.argv[1]): time.sleep(0.05)"
worker = lambda: subprocess.Popen(
    [sys.executable, "-c", ALONE, str(os.getpid()), "pr2jax.tasks.worker"],
    stdout=subprocess.DEVNULL)
saved, done, child = folder / "checkpoints", 0, worker()
try:
    saved.mkdir(exist_ok=True)
    for step in sorted((int(p.name) for p in saved.iterdir() if p.name.isdigit()), reverse=True):
        data = (saved / str(step) / "data").read_bytes()
        if data[16:] == b"x" * 50 and data[:16] == hashlib.md5(data[16:]).digest():
            done = step
            break
        print(f"{saved}/{step}/data: damaged", flush=True)
        shutil.rmtree(saved / str(step))
    rows = folder / "ledger.jsonl"
    kept = rows.read_text().splitlines()[:done] if rows.exists() else []
    (folder / "kept").write_text("".join(line + "\\n" for line in kept))
    (folder / "kept").rename(rows)
    with open(rows, "a") as out:
        for step in range(done + 1, 13):
            time.sleep(0.05)
            child = child if child.poll() is None else worker()
            print('{"step": %d}' % step, file=out, flush=True)
            if step % 2 == 0:
                (saved / "new").mkdir(exist_ok=True)
                data = b"x" * 50
                (saved / "new" / "data").write_bytes(hashlib.md5(data).digest() + data)
                (saved / "new" / "pr2jax_manifest.json").touch()
                (saved / "new").rename(saved / str(step))
                shutil.rmtree(saved / str(step - 4), ignore_errors=True)
    (folder / "over").touch()
except OSError as error:
    print(f"StorageError: {folder}: {error}", flush=True)
    child.kill()
    os._exit(2)
child.kill()
"""


def _torment(folder, kinds, code=RUN, **options):
    said = []
    whole, trials = torment(
        [sys.executable, "-c", code],
        folder,
        kinds,
        random.Random(0),
        dict(os.environ),
        said.append,
        options=Options(hang_s=1.0, **options),
    )
    for name in ["whole", *(trial.workdir.name for trial in trials if not trial.failed)]:
        assert len((folder / name / "ledger.jsonl").read_text().splitlines()) == 12
    return whole, trials, said


def test_kills_are_as_many_as_told_and_the_run_comes_through(tmp_path):
    whole, trials, _ = _torment(tmp_path, ["kill"] * 6)
    assert whole.steps == 12
    assert [fault.kind for trial in trials for fault in trial.faults] == ["kill"] * 6
    assert not any(trial.failed for trial in trials)


def test_every_kind_of_fault_is_put_and_survived(tmp_path):
    kinds = ["torn", "pool", "hang", "flip", "disk", "kill", "peer", "torn", "pool", "flip"]
    _, trials, _ = _torment(tmp_path, kinds, hosts=2)
    assert [trial.failed for trial in trials if trial.failed] == []
    faults = [fault for trial in trials for fault in trial.faults]
    assert [fault.kind for fault in faults] == kinds
    found = {fault.kind: fault for fault in faults}
    assert found["hang"].wait_s >= 1.0
    assert found["disk"].detail.startswith("StorageError: ")
    assert found["pool"].detail == "1 workers"
    assert "exit codes" in found["peer"].detail
    for trial in trials:
        assert judge._untold(trial) == []
        # One start more than faults that end a process.
        assert len(trial.starts) == 1 + sum(f.kind != "pool" for f in trial.faults)


def test_damage_says_whether_a_manifest_was_there(tmp_path):
    step = tmp_path / "checkpoints" / "5"
    step.mkdir(parents=True)
    (step / "data").write_bytes(b"x" * 50)
    told = damage(tmp_path, "flip", random.Random(0))
    assert told == f"{step}/data{UNSEALED}"
    trial = Trial([], tmp_path, {})
    (tmp_path / "chaos.log").write_text("")
    trial.faults = [Fault("flip", 0.0, 5, "stepping", detail=told)]
    assert judge._untold(trial) == []
    (step / "pr2jax_manifest.json").touch()
    told = damage(tmp_path, "torn", random.Random(0))
    trial.faults = [Fault("torn", 0.0, 5, "stepping", detail=told)]
    assert judge._untold(trial) == [f"{step}/data: its damage was not told"]


def test_workers_that_ended_before_the_blow_are_no_fault(tmp_path, monkeypatch):
    real, calls = Processes.having, []

    def having(self, word):  # found to be possible; at the first blow they are gone
        calls.append(word)
        return [] if len(calls) == 2 else real(self, word)

    monkeypatch.setattr(Processes, "having", having)
    _, trials, _ = _torment(tmp_path, ["pool"])
    assert [f.detail for trial in trials for f in trial.faults] == ["1 workers"]
    assert len(calls) >= 4


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("disk", ("os._exit(2)", "os._exit(3)"), "without a clear error"),
        ("disk", ("StorageError: ", "oh: "), "without a clear error"),
        ("flip", ("shutil.rmtree(saved / str(step))", "sys.exit(1)"), "exit code 1"),
    ],
)
def test_a_run_that_does_not_survive_is_told(tmp_path, kind, change, message):
    # One of them may come when all is written already.
    _, trials, said = _torment(tmp_path, [kind] * 3, RUN.replace(*change))
    failed = [trial for trial in trials if trial.failed]
    assert failed
    assert all(message in trial.failed for trial in failed)
    assert any("NOT SURVIVED" in line for line in said)
    assert not judge.passed(judge.judge(tmp_path / "whole", failed[0]))


def test_a_fault_that_is_never_possible_is_told(tmp_path):
    code = RUN.replace("pr2jax.tasks.worker", "another.worker")
    _, trials, said = _torment(tmp_path, ["pool", "kill"], code)
    assert "pool: 5 runs never came to where it is possible" in said[-1]
    assert trials[-1].failed


def test_a_run_that_fails_by_itself_is_told(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with pytest.raises(RuntimeError, match="exit code 1\nno such thing"):
        torment(command, tmp_path, ["kill"], random.Random(0), dict(os.environ), lambda line: None)


def test_a_schedule_has_as_many_of_each_kind_as_can_be():
    kinds = schedule(20, KINDS, random.Random(0))
    assert sorted(map(kinds.count, KINDS)) == [2, 3, 3, 3, 3, 3, 3]
    assert kinds == schedule(20, KINDS, random.Random(0)) != schedule(20, KINDS, random.Random(1))


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--kills=0"], "at least 1"),
        (["--kills=3", "--faults=3"], "one of the two"),
        (["--faults=3", "--kinds=flood"], "'flood' is none of kill,hang"),
        (["--faults=3", "--kinds=peer"], "peer needs --hosts=2"),
        (["--kinds=kill"], "only with --faults"),
        (["--faults=3", "--hosts=2", "--devices=3"], "not divided by"),
    ],
)
def test_flags_that_cannot_be(tmp_path, capsys, flags, why):
    with pytest.raises(SystemExit):
        chaos.main(["--config=x.py", f"--workdir={tmp_path}", *flags])
    assert why in capsys.readouterr().err


def _row(faults, starts, failed=""):
    """Faults as (kind, amid), starts as (after, restart_s, steps, redone)."""
    return {
        "workdir": "w",
        "failed": failed,
        "faults": [{"kind": kind, "amid": amid, "wait_s": 2.0} for kind, amid in faults],
        "starts": [
            dict(zip(("after", "restart_s", "steps", "redone"), start, strict=True))
            for start in starts
        ],
    }


def test_figures_by_kind_and_the_time_that_would_be_kept():
    rows = [
        _row(
            [("kill", "stepping"), ("flip", "")],
            [("", 9.0, 3, 0), ("kill", 10.0, 4, 1), ("flip", 12.0, 5, 3)],
        ),
        _row([("kill", "stepping")], [("", 9.0, 1, 0)], failed="it did not"),
    ]
    found = judge.by_kind(rows)
    assert found["kill"] == {
        "faults": 2,
        "survived": 1,
        "restart_s": [10.0, 10.0],
        "redone": [1.0, 1],
        "wait_s": [2.0, 2.0],
    }
    assert found["flip"]["redone"] == [3.0, 3]
    # R = 11, W = 2, r = 2: of 30 s and a tenth of 11 + 2 + 2.5 * 30.
    assert judge.effective_time(rows)["effective"] == pytest.approx(30 / (30 + 8.8), abs=1e-4)


@pytest.mark.parametrize(
    ("faults", "starts", "said"),
    [
        ([("kill", "stepping")], [("", 1, 3, 0), ("kill", 1, 5, 2)], 0),
        ([("kill", "stepping")], [("", 1, 3, 0), ("kill", 1, 5, 3)], 1),
        ([("kill", "writing a checkpoint")], [("", 1, 3, 0), ("kill", 1, 5, 3)], 0),
        ([("flip", "stepping")], [("", 1, 6, 0), ("flip", 1, 5, 4)], 0),
        ([("flip", "stepping")], [("", 1, 6, 0), ("flip", 1, 5, 5)], 1),
        # What a damaged checkpoint cost is owed until another one is saved.
        ([("flip", ""), ("kill", "")], [("", 1, 6, 0), ("flip", 1, 4, 4), ("kill", 1, 4, 4)], 0),
        ([("flip", ""), ("kill", "")], [("", 1, 6, 0), ("flip", 1, 6, 4), ("kill", 1, 4, 4)], 1),
    ],
)
def test_steps_done_again_are_held_against_the_interval(faults, starts, said):
    assert len(judge.too_much_again([_row(faults, starts)], every=2)) == said


@pytest.fixture
def parent():
    """Starts a program that prints a line, and kills it at the end."""
    started = []

    def start(code):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True, cwd=ROOT
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            process.kill()


def test_descendants_are_found_and_orphans_counted(parent):
    child = "import time; print(1, flush=True); time.sleep(60)"
    process = parent(
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True).wait()"
    )
    process.stdout.readline()
    below = processes_below(process.pid)
    assert len(below) == 1
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert wait_for_orphans(below, seconds=0.3) == list(below)
    os.kill(next(iter(below)), signal.SIGKILL)
    assert wait_for_orphans(below, seconds=10) == []


def test_verifier_workers_end_with_a_killed_trainer(parent):
    process = parent(
        "from pr2jax.tasks.pool import VerifierPool\n"
        "from pr2jax.tasks.base import Problem\n"
        "import time\n"
        "pool = VerifierPool(workers=2, timeout_s=60, verifier='tests.test_chaos:slow')\n"
        "print(1, flush=True)\n"
        "pool.score_batch([(Problem('a', 'q', 'a', 'source'), 'x')] * 2)\n"
    )
    process.stdout.readline()
    limit = time.monotonic() + 60
    while len(below := processes_below(process.pid)) < 2 and time.monotonic() < limit:
        time.sleep(0.05)
    assert len(below) == 2
    time.sleep(1.0)  # one is amid an item, or still importing: both must end
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert wait_for_orphans(below, seconds=30) == []


def slow(problem, response):
    """A verifier that is busy when its trainer is killed."""
    time.sleep(60)


def _stage(folder, value=0.0, items=("a", "b"), loss=1.0, memory=0, steps=2):
    folder.mkdir()
    state = {"step": jnp.int32(steps), "params": {"w": jnp.array([1.0, value])}}
    extra = {"position": steps, "memory": {"m": memory}, "config": {}}
    with Checkpointer(folder / "checkpoints") as checkpoints:
        checkpoints.save(steps, state, extra)
    for name, row in (
        ("metrics.jsonl", {"loss": loss, "time": time.time(), "time/sample": time.time()}),
        ("ledger.jsonl", {"items": list(items)}),
    ):
        lines = [json.dumps({"step": s + 1} | row) + "\n" for s in range(steps)]
        (folder / name).write_text("".join(lines))
    (folder / "eval_end.json").write_text(json.dumps({"metrics": loss, "seconds": time.time()}))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"value": -0.0}, ["array params/w differs"]),  # equal as numbers, not as bits
        ({"memory": 1}, ["memory in the checkpoint differs"]),
        ({"steps": 1}, ["the last checkpoint is of step 1, not 2"]),
        (
            {"loss": 1.0000001},
            ["metrics.jsonl, step 1: loss differs", "metrics.jsonl, step 2: loss differs"],
        ),
        (
            {"items": ["b", "a"]},
            ["ledger.jsonl, step 1: items differs", "ledger.jsonl, step 2: items differs"],
        ),
    ],
)
def test_a_difference_is_seen(tmp_path, changes, said):
    whole, other = _stage(tmp_path / "a"), _stage(tmp_path / "b", **changes)
    assert audit.compare_stage(whole, other) == said
    expected = ["eval_end.json differs"] if "loss" in changes else []
    assert audit.compare_files(whole, other) == expected


def test_a_planted_divergence_is_caught(tmp_path):
    whole, good = _stage(tmp_path / "whole"), _stage(tmp_path / "good")
    assert audit.compare_stage(whole, good) == []
    said = judge.plant(whole, good, tmp_path / "planted")
    assert said == {
        "parameter": ["array params/w differs"],
        "ledger": ["ledger.jsonl, step 2: items differs"],
    }
    assert audit.compare_stage(whole, good) == []  # only copies were changed


def test_repeated_rows_leftovers_and_missing_files_are_seen(tmp_path):
    whole, other = _stage(tmp_path / "a"), _stage(tmp_path / "b")
    with open(other / "metrics.jsonl", "a") as out:
        out.write('{"step": 2, "loss": 1.0}\n')
    (other / "checkpoints" / "3.orbax-checkpoint-tmp-1").mkdir()
    (other / ".wall.json.77").write_text("half")
    (whole / "report.html").write_text("<html>")
    assert audit.compare_stage(whole, other) == [
        "metrics.jsonl: steps [1, 2, 2]",
        "3.orbax-checkpoint-tmp-1 was left behind",
        ".wall.json.77 was left behind",
    ]
    assert audit.compare_files(whole, other) == ["report.html is missing"]


@pytest.mark.parametrize(
    ("rows", "skipped", "twice"),
    [
        ([["a", "b"], ["c", "d"]], 0, 0),
        ([["b", "a"], ["d", "c"]], 0, 0),  # within a step the order is free
        ([["a", "b"], ["b", "d"]], 1, 1),
        ([["c", "d"], ["a", "b"]], 4, 4),
        ([["a", "b", "c"], ["d"]], 0, 0),
        ([["a", "a"], ["c", "d"]], 1, 1),
    ],
)
def test_the_ledger_is_held_against_the_order(tmp_path, monkeypatch, rows, skipped, twice):
    (tmp_path / "ledger.jsonl").write_text(
        "".join(
            json.dumps({"step": i, "items": r[:1], "filtered": r[1:]}) + "\n"
            for i, r in enumerate(rows, 1)
        )
    )
    monkeypatch.setattr(audit, "expected_items", lambda *_: list("abcdefgh")[: sum(map(len, rows))])
    found = audit.account(tmp_path, tmp_path, tmp_path)
    assert found == {"items": 4, "skipped": skipped, "twice": twice}


CONFIG = """
import dataclasses
from pr2jax.core.config import to_config_dict
from pr2jax.sampler.types import SamplingParams
from tests.train import tiny

def get_config(arg=""):
    cfg = tiny.config(mode=arg)
    # Answers that contain the right one score something: random parameters have a signal.
    task = dataclasses.replace(cfg.rl_task, partial_credit=1.0)
    rl = dataclasses.replace(
        cfg.rl, steps=10, eval_every=4, filter_zero_variance=True, dynamic_sampling=True
    )
    sft = dataclasses.replace(cfg.sft, steps=40, eval_every=15)
    return to_config_dict(dataclasses.replace(cfg, rl=rl, sft=sft, rl_task=task))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "flags", "kinds"),
    [
        ("sft", ["--kills=2"], {"kill"}),
        (
            "rl",
            ["--faults=6", "--kinds=kill,hang,torn,flip,disk,pool", "--hang_s=10", "--plant"],
            {"kill", "hang", "torn", "flip", "disk", "pool"},
        ),
    ],
)
def test_a_run_under_faults_ends_as_the_one_left_alone(mode, flags, kinds, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pr2jax.chaos", f"--config={config}:{mode}", *flags),
            *(f"--workdir={tmp_path / 'runs'}", "--seed=1", f"--json={tmp_path / 'out.json'}"),
        ],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": xla.flags(1)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["equal"]
    assert {f["kind"] for t in found["trials"] for f in t["faults"]} == kinds
    assert all(found["planted"].values()) if "--plant" in flags else found["planted"] is None
    for trial in found["trials"]:
        assert trial["differences"] == []
        assert (trial["skipped"], trial["twice"], trial["orphans"]) == (0, 0, 0)
        assert trial["updates"] > 10
