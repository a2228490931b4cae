"""Studies: overrides and order of runs, figures and intervals by hand, resume, failures, report."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.replay.modes import ReplayConfig
from pr2jax.train import study, study_report
from pr2jax.train.config import CellConfig, Config, StudyConfig
from tests import xla

ROOT = Path(__file__).resolve().parents[2]


def load(arg="", name="replay"):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"configs/studies/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(Config, module.get_config(arg))


def with_cells(*cells, **settings):
    return dataclasses.replace(load("smoke"), study=StudyConfig(cells=cells, **settings))


def test_the_replay_study_holds_what_was_planned(tmp_path):
    jobs = study.plan_jobs(load(), tmp_path)
    count = {}
    for job in jobs:
        if job.cell is not None:
            count.setdefault(job.cell.group, {}).setdefault(job.cell.name, []).append(job.seed)
    modes = {"off", "r2", "r3", "pr2", "lookahead", "pr2+lookahead", "frozen router"}
    main = {"r3", "pr2", "lookahead", "pr2+lookahead"}
    assert len(count) == 6
    for group, cells in count.items():
        deep = group.startswith("off-8")
        assert set(cells) == (modes | {"pr2 by Adam"} if deep else modes)
        for name, seeds in cells.items():
            assert len(seeds) == (5 if deep and name in main else 3 if deep else 2)
    by_name = {(j.cell.group, j.cell.name, j.seed): j.config for j in jobs if j.cell}
    one = by_name["off-4, beta1 0.9", "pr2+lookahead", 1]
    assert one["rl"]["mini_steps"] == 4
    assert one["rl"]["optim"]["b1"] == 0.9
    assert one["replay"]["mode"] == "pr2+lookahead"
    assert one["replay"]["kappa"] == 4.0
    assert one["seed"] == 1
    assert one["init_from"] == str(tmp_path / "warmup" / "seed_1")
    frozen = by_name["off-2, beta1 0.98", "frozen router", 0]
    assert "router" in frozen["rl"]["optim"]["trainable"]


def test_order_warm_ups_then_priority_then_seed(tmp_path):
    cfg = with_cells(
        CellConfig("a", seeds=1, priority=1), CellConfig("b", seeds=2), CellConfig("c", seeds=3)
    )
    names = [(j.cell.name if j.cell else "warm", j.seed) for j in study.plan_jobs(cfg, tmp_path)]
    assert names[:3] == [("warm", 0), ("warm", 1), ("warm", 2)]
    assert names[3:] == [("b", 0), ("c", 0), ("b", 1), ("c", 1), ("c", 2), ("a", 0)]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rl.stepss=3", r"study.cells\[1\] \(g x\): rl.stepss: unknown key; did you mean rl.steps"),
        ("rl.nothing.here=3", r"study.cells\[1\] \(g x\): rl.nothing.here: there is no such key"),
        ("rl.steps", "'rl.steps' is not KEY=VALUE"),
        ("replay.mode=r9", r"\(g x\): replay.mode: must be one of"),
        ("rl.mini_steps=3", r"\(g x\): rl.mini_steps: 3 does not divide"),
    ],
)
def test_a_bad_override_names_its_cell(override, said, tmp_path):
    cfg = with_cells(CellConfig("ok", "g"), CellConfig("x", "g", (override,)))
    with pytest.raises(ConfigError, match=said):
        study.plan_jobs(cfg, tmp_path)


def test_bad_settings_are_told():
    with pytest.raises(ConfigError, match="study.cells: mode 'study' needs"):
        from_config_dict(Config, {"mode": "study"})
    with pytest.raises(ConfigError, match=r"cells\[0\].against: group 'g' has no cell 'b'"):
        StudyConfig((CellConfig("a", "g", against="b"), CellConfig("b", "h"))).validate()
    cfg = dataclasses.asdict(load("smoke"))
    with pytest.raises(ConfigError, match="steady_from: leaves nothing"):
        from_config_dict(Config, cfg | {"study": cfg["study"] | {"steady_from": 2}})
    with pytest.raises(ConfigError, match="feature_tokens: keep_features"):
        ReplayConfig(mode="r3", feature_tokens=0, keep_features=True).validate()


def test_two_cells_of_one_name_are_refused(tmp_path):
    cfg = with_cells(CellConfig("A b", "g"), CellConfig("a_b", "g"))
    with pytest.raises(ConfigError, match="same group and name"):
        study.plan_jobs(cfg, tmp_path)


def rows(seed, steps=10):
    rng = np.random.default_rng(seed)
    out = []
    for step in range(1, steps + 1):
        row = {"step": step, "time": 2.0 * step, "reward": rng.random(), "entropy": None}
        for i in (1, 2):
            row |= {
                f"mini_{i}/zero_deviation": rng.random(),
                f"mini_{i}/paired_zero_deviation": rng.random(),
                f"mini_{i}/old_route_zero_deviation": rng.random(),
                f"mini_{i}/old_logits_kl": rng.random(),
                f"mini_{i}/shifted_logits_kl": rng.random(),
                f"mini_{i}/log_ratio_square": 1 + rng.random(),
                f"mini_{i}/old/k1": rng.random(),
            }
        if step == 3:  # a batch of which only one mini-step had anything to learn
            row = {k: v for k, v in row.items() if not k.startswith("mini_2")}
        if step % 4 == 0:
            row["probe/last/cosine"] = rng.random()
        out.append(row)
    return out


def test_figures_of_a_run():
    data, steady = rows(0), rows(0)[2:]
    got = study_report.run_figures(data, steady_from=2)
    mean = lambda values: np.mean(list(values))
    pick = lambda key: [r[key] for r in steady if key in r]
    gain = lambda i: mean(
        r[f"mini_{i}/paired_zero_deviation"] - r[f"mini_{i}/old_route_zero_deviation"]
        for r in steady
        if f"mini_{i}/zero_deviation" in r
    )
    np.testing.assert_allclose(got["reward"], mean(pick("reward")))
    np.testing.assert_allclose(got["reward_end"], steady[-1]["reward"])
    np.testing.assert_allclose(got["mini_2/zero_deviation"], mean(pick("mini_2/zero_deviation")))
    np.testing.assert_allclose(got["last/zero_deviation_gain"], gain(2))
    np.testing.assert_allclose(got["window/zero_deviation_gain"], (gain(1) + gain(2)) / 2)
    kl = [r["mini_1/old_logits_kl"] - r["mini_1/shifted_logits_kl"] for r in steady]
    np.testing.assert_allclose(got["mini_1/kl_gain"], mean(kl))
    std = [np.sqrt(r["mini_1/log_ratio_square"] - r["mini_1/old/k1"] ** 2) for r in steady]
    np.testing.assert_allclose(got["mini_1/log_ratio_std"], mean(std))
    np.testing.assert_allclose(got["probe/last/cosine"], mean(pick("probe/last/cosine")))
    assert got["seconds"] == 2.0
    assert "entropy" not in got


def test_intervals_and_paired_differences():
    runs = {s: study_report.run_figures(rows(s), 0) for s in range(4)}
    other = {s: study_report.run_figures(rows(s + 10), 0) for s in range(1, 5)}
    found = study_report.summarise(runs)["reward"]
    values = np.array([runs[s]["reward"] for s in runs])
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose([found["low"], found["high"]], [low, high])
    assert found["n"] == 4
    versus = study_report.paired(runs, other)["reward"]
    difference = np.array([runs[s]["reward"] - other[s]["reward"] for s in (1, 2, 3)])
    low, high = stats.t.interval(0.95, 2, loc=difference.mean(), scale=stats.sem(difference))
    np.testing.assert_allclose([versus["value"], versus["low"]], [difference.mean(), low])
    assert study_report.paired(runs, {}) == {}
    assert study_report.interval([1.0]) == {"value": 1.0, "n": 1}


def fake_runs(monkeypatch, script):
    """Every run becomes `python -c script FOLDER`, which stands for a training process."""
    command = lambda job: [sys.executable, "-c", script, str(job.folder)]
    monkeypatch.setattr(study, "_command", command)


FAKE = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
config = json.loads((folder / "config.in.json").read_text())
if config["replay"]["mode"] == "off":
    sys.exit("no such luck")
keys = ("zero_deviation", "paired_zero_deviation", "old_route_zero_deviation")
mini = {f"mini_{i}/{k}": 0.5 + 0.1 * i + 0.01 * config["seed"] for i in (1, 2) for k in keys}
rows = [{"step": s, "time": float(s), "reward": s / 10} | mini for s in (1, 2)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(r) + chr(10) for r in rows))
(folder / "summary.json").write_text("{}")
with open(folder / "count", "a") as file:
    file.write("x")
"""


def test_failures_are_reported_and_hide_nothing(monkeypatch, tmp_path):
    fake_runs(monkeypatch, FAKE)
    cfg = with_cells(
        CellConfig("off", "g", ("replay.mode=off",), seeds=2),
        CellConfig("r3", "g", ("replay.mode=r3",), seeds=2, against="off"),
        CellConfig("pr2", "g", ("replay.mode=pr2",), seeds=2, against="r3"),
        warmup=False,
        workers=2,
        cores_per_worker=0,
    )
    with pytest.raises(study.StudyError, match="2 of 6 runs failed: g off, seed 0; g off, seed 1"):
        study.run_study(cfg, str(tmp_path))
    found = json.loads((tmp_path / "study.json").read_text())
    assert (found["done"], found["total"], len(found["failed"])) == (4, 6, 2)
    cell = found["groups"]["g"]["pr2"]
    np.testing.assert_allclose(cell["mean"]["last/zero_deviation"]["value"], 0.705)
    assert cell["versus"]["reward"]["value"] == 0.0
    assert "no such luck" in (tmp_path / "cells/g/off/seed_0/log.txt").read_text()
    text = (tmp_path / "study.md").read_text()
    assert "4 of 6 runs are done" in text
    assert "| pr2 | 2 | 0.605 [" in text
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "figures" / "g_zero_deviation.svg").exists()
    # Again: what is done is not done again, what failed is tried again.
    fake_runs(monkeypatch, FAKE.replace('== "off"', '== "never"'))
    study.run_study(cfg, str(tmp_path))
    assert (tmp_path / "cells/g/pr2/seed_0/count").read_text() == "x"
    assert (tmp_path / "cells/g/off/seed_1/count").read_text() == "x"
    assert json.loads((tmp_path / "study.json").read_text())["done"] == 6


def test_another_configuration_in_the_same_folder_is_refused(monkeypatch, tmp_path):
    fake_runs(monkeypatch, FAKE)
    cfg = with_cells(CellConfig("r3", "g", ("replay.mode=r3",)), warmup=False)
    study.run_study(cfg, str(tmp_path))
    rl = dataclasses.replace(cfg.rl, clip_low=0.1)
    with pytest.raises(ConfigError, match="is of another configuration"):
        study.run_study(dataclasses.replace(cfg, rl=rl), str(tmp_path))


def test_cells_wait_for_a_warm_up_that_failed(monkeypatch, tmp_path):
    fake_runs(monkeypatch, FAKE.replace('["replay"]["mode"] == "off"', '["mode"] == "sft"'))
    cfg = with_cells(CellConfig("r3", "g"))
    with pytest.raises(study.StudyError, match="warm-up, seed 0"):
        study.run_study(cfg, str(tmp_path))
    assert not (tmp_path / "cells/g/r3/seed_0/count").exists()


def test_more_workers_than_cores_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    cfg = with_cells(CellConfig("r3", "g"), workers=3)
    with pytest.raises(ConfigError, match="3 workers of 1 cores each"):
        study.run_study(cfg, str(tmp_path))


DRIVER = """
import sys
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests/train"]
import test_study as t
t.study._command = lambda job: [sys.executable, "-c", t.SLOW, str(job.folder)]
cells = [t.CellConfig(n, "g") for n in "ab"]
cfg = t.with_cells(*cells, warmup=False, cores_per_worker=0)
try:
    t.study.run_study(cfg, sys.argv[1])
except t.study.Interrupted:
    sys.exit(75)
"""

SLOW = "import pathlib, sys, time\n(pathlib.Path(sys.argv[1]) / 'started').touch()\n" + (
    "time.sleep(1.5)\n" + FAKE
)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_was_stopped_goes_on(how, monkeypatch, tmp_path):
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), str(ROOT)])
    started = tmp_path / "cells/g/a/seed_0/started"
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    driver.send_signal(how)
    code = driver.wait()
    assert code == (75 if how == signal.SIGTERM else -signal.SIGKILL)
    fake_runs(monkeypatch, FAKE)
    cfg = with_cells(*(CellConfig(n, "g") for n in "ab"), warmup=False, cores_per_worker=0)
    study.run_study(cfg, str(tmp_path))
    for name in "ab":
        # A process that outlived its study was waited for, not run beside another.
        assert (tmp_path / f"cells/g/{name}/seed_0/count").read_text() == "x"


@pytest.mark.slow
def test_smoke(tmp_path):
    """The command of the config's header, cells and probes included."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pr2jax.main", "--config=configs/studies/replay.py:smoke"),
            *(f"--workdir={tmp_path}", "--config.study.cores_per_worker=0"),
        ],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": xla.flags(1)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "study.json").read_text())
    assert (found["done"], found["total"]) == (2, 2)
