"""The budget study: its runs in order, its problems, and its report out of known runs."""

import csv
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.sampler.types import Rollout
from pr2jax.scaling.sampling_law import RewardCurve
from pr2jax.tasks.base import Problem, Task, TaskConfig, Verdict
from pr2jax.train import budget_report, budget_runs, plan, regimes, study
from pr2jax.train.config import Config
from pr2jax.train.study_config import REGIMES, PlanConfig, RegimeConfig
from tests import xla

ROOT = Path(__file__).resolve().parents[2]


def load(arg=""):
    path = ROOT / "configs/studies/isocompute.py"
    spec = importlib.util.spec_from_file_location("isocompute", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(Config, module.get_config(arg))


def test_the_sweep_is_the_studys_recipe(tmp_path):
    cfg = load()
    jobs = study.plan_jobs(cfg, tmp_path)
    assert [job.name for job in jobs[:2]] == ["warm-up, seed 0", "choosing problems, seed 0"]
    assert [job.stage for job in jobs] == [0, 1] + [2] * (len(jobs) - 2)
    assert jobs[0].config["mode"] == "sft"
    base = str(tmp_path / "warmup" / "seed_0")
    assert (jobs[1].config["mode"], jobs[1].config["init_from"]) == ("difficulty", base)
    assert jobs[1].config["regime"] == {"samples": 16, "low": 0.3, "high": 0.6}
    rates = set()
    for job in jobs[2:]:
        rl, config = job.config["rl"], job.config
        rows = rl["samples_per_prompt"] * rl["prompts_per_batch"]
        assert rows * rl["steps"] == 32768  # every run has the same C
        assert rows * rl["eval_every"] == 2048  # and is validated at the same ones
        assert (config["mode"], config["init_from"]) == ("rl", base)  # one base for all seeds
        assert config["rl_problems"] == str(tmp_path / "problems" / "problems.jsonl")
        assert (rl["mini_steps"], rl["epochs"], rl["scoring_pass"]) == (1, 1, "always")
        assert rl["tis_cap"] > 0
        assert rl["kl_coef"] > 0
        assert rl["entropy_coef"] > 0
        for sampling in (rl["sampling"], config["eval"]["sampling"]):
            assert (sampling["temperature"], sampling["top_p"]) == (0.6, 1.0)
        assert (rl["optim"]["schedule"], rl["optim"]["warmup_steps"]) == ("constant", 10)
        rates.add(round(rl["optim"]["learning_rate"] / rows**0.5, 9))
    assert len(rates) == 1  # as the square root of the batch
    found = {(j.config["rl"]["samples_per_prompt"], j.seed) for j in jobs[2:]}
    assert found == {(n, s) for n in (4, 8, 16, 32, 64) for s in range(3)}
    hard = study.plan_jobs(load("hard"), tmp_path)[2].config
    assert (hard["rl"]["kl_coef"], hard["rl"]["entropy_coef"]) == (0.0, 0.0)
    assert load("hard").regime == REGIMES["hard"]
    values = dataclasses.asdict(cfg)
    with pytest.raises(ConfigError, match=r"eval.ks: must hold eval.quick_samples=4"):
        from_config_dict(Config, values | {"eval": values["eval"] | {"ks": (1, 2)}})


# ---------------------------------------------------------------- problems


def problems(*ids):
    return [Problem(i, f"{i}?", i, "math__x", meta={"question": f"what is {i}?"}) for i in ids]


def test_only_the_named_problems_are_left(tmp_path):
    task = Task(TaskConfig(), problems("a", "b", "c"), problems("h", "i"), lambda p, r: None)
    path = tmp_path / "problems.jsonl"
    path.write_text('{"id": "c", "avg@16": 0.5}\n\n{"id": "a"}\n{"id": "h"}\n')
    found = regimes.only(task, str(path))
    assert [p.id for p in found.train] == ["a", "c"]  # in the task's order
    assert [p.id for p in found.held_out] == ["h"]
    assert regimes.only(task, "") is task
    for text, said in (
        ('{"id": "z"}', "1 of 1 ids in .* are not of .*'z'"),
        ('{"id": "h"}', "leaves nothing to train on"),
        ('{"id": "a"}\n{"name": "b"}', "problems.jsonl:2: no JSON object with an id"),
        ("[1]", "problems.jsonl:1: no JSON object"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"rl_problems: .*{said}"):
            regimes.only(task, str(path))
    with pytest.raises(ConfigError, match="rl_problems: .*nowhere.* cannot be read"):
        regimes.only(task, str(tmp_path / "nowhere.jsonl"))


class FakeSession:
    """Just what choosing problems reads."""

    def __init__(self, cfg, workdir):
        self.cfg, self.workdir = cfg, workdir
        self.config_json = json.loads(json.dumps(dataclasses.asdict(cfg)))

    def wall_seconds(self):
        return 1.0


def test_the_regime_takes_what_lies_in_it(tmp_path):
    cfg = Config(mode="difficulty", regime=RegimeConfig(4, 0.25, 0.5))
    cfg = dataclasses.replace(cfg, rl=dataclasses.replace(cfg.rl, prompts_per_batch=2))
    session = FakeSession(cfg, tmp_path)
    pool, splits = problems("h", "a", "b", "c", "d"), ["held_out", *["train"] * 4]
    right = np.array([1, 0, 1, 2, 3])  # of four answers
    scores = (np.arange(4) < right[:, None]).astype(float)
    average = scores.mean(axis=1)
    chosen = (average >= 0.25) & (average <= 0.5)
    regimes._write_chosen(session, pool, splits, average, chosen)
    regimes._summarise(session, splits, scores, chosen)
    rows = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert [(r["id"], r["split"], r["avg@4"]) for r in rows] == [
        ("h", "held_out", 0.25),
        ("b", "train", 0.25),
        ("c", "train", 0.5),
    ]
    assert rows[1]["reward_model"] == {"ground_truth": "b"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["chosen"] == {"train": 2, "held_out": 1}
    assert summary["average"]["value"] == pytest.approx(7 / 20)
    assert summary["solved_once"] == 0.8
    session.cfg = dataclasses.replace(cfg, rl=dataclasses.replace(cfg.rl, prompts_per_batch=3))
    with pytest.raises(ConfigError, match=r"regime: 2 of 4 train problems have 0.25 <= avg@4"):
        regimes._summarise(session, splits, scores, chosen)


class FakeSampler:
    """Answers "0" or "1" by a hash of the request's number: what is drawn is keyed by it."""

    def __init__(self, stop_after=None):
        self.calls, self.stop_after = 0, stop_after

    def rollout(self, prompts, n, sampling, *, params, key, request_offset):
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        rows = len(prompts) * n
        bits = (np.arange(request_offset, request_offset + rows) * 2654435761 >> 7) & 1
        tokens = np.stack([np.full(rows, 9), bits], axis=1)
        ones, zeros = np.ones(rows, np.int32), np.zeros(rows, np.int32)
        rollout = Rollout(
            tokens=tokens,
            prompt_lengths=ones,
            lengths=2 * ones,
            loss_mask=np.ones((rows, 2), np.float32),
            behavior_logprobs=np.zeros((rows, 2), np.float32),
            routes=None,
            prompt_ids=zeros,
            group_ids=zeros,
            policy_version=np.zeros((rows, 2), np.int32),
            finish=zeros,
            rewards=np.zeros(rows, np.float32),
        )
        return rollout, None


class FakeTokenizer:
    eos_id = 1

    def decode(self, ids):
        return "".join(map(str, ids))


class FakePool:
    def score_batch(self, items):
        return [Verdict(float(text == "1")) for _, text in items]


def test_scores_that_were_interrupted_go_on_the_same(tmp_path):
    cfg = Config(mode="difficulty", regime=RegimeConfig(4))
    cfg = dataclasses.replace(cfg, sampler=dataclasses.replace(cfg.sampler, slots=2))
    pool = problems(*"abcdefg")  # two a call: 4 waves of 2 slots for 4 answers each
    splits = ["held_out"] * 2 + ["train"] * 5

    def session(folder, sampler):
        folder.mkdir(exist_ok=True)
        made = FakeSession(cfg, folder)
        made.sampler, made.pool, made.tokenizer = sampler, FakePool(), FakeTokenizer()
        made.encode, made.initial_params = lambda problem: [9], lambda: None
        made.key = lambda *names: None
        return made

    whole = regimes._measure(session(tmp_path / "whole", FakeSampler()), pool, splits)
    bits = (np.arange(28) * 2654435761 >> 7) & 1
    np.testing.assert_array_equal(whole, bits.reshape(7, 4))
    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        regimes._measure(session(folder, FakeSampler(stop_after=2)), pool, splits)
    path = folder / "scores.jsonl"
    path.write_text(path.read_text() + '{"id": "e", "spl')  # killed while it wrote
    sampler = FakeSampler()
    again = regimes._measure(session(folder, sampler), pool, splits)
    np.testing.assert_array_equal(again, whole)
    assert sampler.calls == 2  # e and f, g
    done = session(folder, FakeSampler(stop_after=0))
    np.testing.assert_array_equal(regimes._measure(done, pool, splits), whole)
    with pytest.raises(ConfigError, match="holds scores of other problems"):
        regimes._measure(done, problems(*"xbcdefg"), splits)
    done.cfg = dataclasses.replace(cfg, regime=RegimeConfig(8))
    with pytest.raises(ConfigError, match="holds scores of another configuration"):
        regimes._measure(done, pool, splits)


# ------------------------------------------------------------------ report

TRUE = {n: RewardCurve(0.4, 0.6 + 0.02 * i, 3000.0 * 1.5**i, 1.2) for i, n in enumerate((4, 8, 16))}


def metrics(n, prompts, seed, evaluations=16):
    """What a run of 32,768 rollouts writes: avg@4 on a known curve, seeds .01 apart."""
    rows = [{"step": 0, "time": 0.0, "eval/avg@4": 0.4, "eval/best@4": 0.8, "eval/worst@4": 0.1}]
    each = 32768 // evaluations // (n * prompts)
    for k in range(1, evaluations + 1):
        score = float(TRUE[n].reward(2048.0 * k)) + 0.01 * (seed - 0.5)
        more = {"response_length": 6.0, "reward": 0.5}
        more |= {"eval/avg@4": score, "eval/best@4": score + 0.2, "eval/worst@4": score - 0.2}
        rows.append({"step": each * k, "time": float(k)} | more)
    return rows


@pytest.fixture
def swept(tmp_path):
    """The study with three n, two seeds, all runs done but one."""
    cfg = load()
    cells = [c for c in cfg.study.cells if c.name in ("n 4", "n 8", "n 16") and c.group == "B_p 8"]
    cells = tuple(dataclasses.replace(cell, seeds=2) for cell in cells)
    cfg = dataclasses.replace(cfg, study=dataclasses.replace(cfg.study, cells=cells, resamples=8))
    jobs = study.plan_jobs(cfg, tmp_path)
    for job in jobs:
        job.folder.mkdir(parents=True)
        if job.cell is None:
            continue
        n = job.config["rl"]["samples_per_prompt"]
        rows = metrics(n, job.config["rl"]["prompts_per_batch"], job.seed)
        (job.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        samples = [{"scores": [1.0, 0.0, 0.0, 1.0]}, {"scores": [1.0] * 4}]
        (job.folder / "eval_end.json").write_text(json.dumps({"samples": samples}))
        (job.folder / "summary.json").write_text("{}")
    chosen = {"regime": {"samples": 16, "low": 0.3, "high": 0.6}, "average": {"value": 0.2}}
    chosen |= {"pool": {"train": 30, "held_out": 20}, "chosen": {"train": 9, "held_out": 5}}
    (tmp_path / "problems" / "summary.json").write_text(json.dumps(chosen))
    return cfg, tmp_path, jobs


def test_the_report_of_a_sweep(swept):
    cfg, root, jobs = swept
    budget_report.write(cfg, root, jobs, ["n 64, seed 0"])
    with open(root / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 17
    one = next(r for r in rows if (r["n"], r["seed"], r["compute"]) == ("8", "1", "32768"))
    score = float(TRUE[8].reward(32768.0)) + 0.005
    assert float(one["score"]) == pytest.approx(score, abs=1e-5)
    assert float(one["best"]) == pytest.approx(score + 0.2, abs=1e-5)
    assert float(one["tokens"]) == 6.0
    found = json.loads((root / "study.json").read_text())
    assert (found["done"], found["total"], found["failed"]) == (6, 6, ["n 64, seed 0"])
    part = found["by_prompts"]["8"]
    assert part["budgets"] == [4096, 8192, 16384, 32768]
    # The mean of the last quarter of a budget: at C = 8,192 the evaluation there alone.
    mean = part["avg"]["16"][1]
    assert (mean["value"], mean["n"]) == (pytest.approx(float(TRUE[16].reward(8192.0))), 2)
    # The envelope of the known curves goes from n = 4 to n = 16.
    low, high = part["compute_range"]
    assert (round(low), round(high)) == (4096, 32768)
    law = json.loads((root / "law.json").read_text())
    assert law["prompts"] == 8
    assert law["n_range"] == [4, 16]
    assert law["regime"] == "easy"
    assert law["tokens_per_rollout"] == 6.0
    assert law["growth"] > 1.5
    assert law["recipe"]["learning_rate"] == pytest.approx(
        4e-4 * (law["recipe"]["rows"] / 1024) ** 0.5, rel=1e-5
    )
    text = (root / "study.md").read_text()
    assert "n* grows over the measured range" in text
    assert "9 of 30 to train on, 5 of 20 to validate" in text
    assert "Failed: n 64, seed 0" in text
    assert "<svg" in (root / "report.html").read_text()
    names = {path.name for path in (root / "figures").iterdir()}
    assert names == {
        f"b8_{name}.svg"
        for name in ("curves", "envelope", "n_star", "best_at_4", "worst_at_4", "pass_rates")
    }


def test_a_plan_of_that_law_and_the_table_fitted_again(swept, tmp_path_factory):
    cfg, root, jobs = swept
    budget_report.write(cfg, root, jobs, [])
    asked = PlanConfig(compute=16384, fit=str(root))
    base = Config(mode="plan", plan=asked)
    found = plan.make(dataclasses.replace(base, rl=dataclasses.replace(base.rl, micro_batch=8)))
    assert found["prompts"] == 8
    assert 4 <= found["n"] <= 16
    assert found["learning_rate"] == pytest.approx(4e-4 * (8 * found["n"] / 1024) ** 0.5, rel=1e-5)
    again = tmp_path_factory.mktemp("again")
    values = dataclasses.replace(load("csv").study, runs_csv=str(root / "runs.csv"), resamples=8)
    budget_report.write(dataclasses.replace(load("csv"), study=values), again, [], [])
    laws = [json.loads((folder / "law.json").read_text()) for folder in (root, again)]
    assert laws[1]["recipe"] is None
    for key, value in laws[0]["law"].items():
        assert laws[1]["law"][key] == pytest.approx(value, rel=1e-3)


def test_what_cannot_be_fitted_is_said_and_leaves_no_law(swept):
    cfg, root, jobs = swept
    budget_report.write(cfg, root, jobs, [])
    assert (root / "law.json").exists()
    for job in jobs[2:]:
        rows = [row | {"eval/avg@4": 0.4} for row in metrics(4, 8, 0)]
        (job.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    budget_report.write(cfg, root, jobs, [])
    assert not (root / "law.json").exists()
    assert "No law: runs: the validation score does not rise" in (root / "study.md").read_text()
    rows = [{k: v for k, v in row.items() if "best" not in k} for row in metrics(4, 8, 0)]
    with pytest.raises(ConfigError, match=r"eval.ks: must hold eval.quick_samples=4"):
        budget_runs.course(jobs[2].config, rows)


@pytest.mark.slow
def test_smoke(tmp_path):
    """The command of the config's header; three n of four steps are too few for a law."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pr2jax.main", "--config=configs/studies/isocompute.py:smoke"),
            *(f"--workdir={tmp_path}", "--config.study.cores_per_worker=0"),
        ],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": xla.flags(1)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "study.json").read_text())
    assert (found["done"], found["total"]) == (3, 3)
    with open(tmp_path / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted({int(r["n"]) for r in rows}) == [2, 4, 8]
    assert {int(r["compute"]) for r in rows if r["n"] == "8"} == {0, 32, 64, 96, 128}
    assert all(0 <= float(r["worst"]) <= float(r["score"]) <= float(r["best"]) for r in rows)
    chosen = json.loads((tmp_path / "problems" / "summary.json").read_text())["chosen"]
    assert chosen == {"train": 32, "held_out": 16}
