"""Figures of growth by hand; a law's report out of runs that a known law made; the plan."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from pr2jax.core.config import ConfigError
from pr2jax.scaling.laws import JointMoELaw
from pr2jax.train import growth_report, law_report
from pr2jax.train.config import CellConfig, StudyConfig
from pr2jax.train.study import Job, plan_jobs, run_study
from tests.train.test_study import load as load_study


def load(name, arg=""):
    return load_study(arg, name)


# --- Growth: a run of 40 steps that grows at step 20, written by hand

TOKENS = 8 * 16


def losses(before, after):
    """Falls to `before`, jumps by 1 at growth, and is at `after` from 10 steps later on."""
    first = [5.0] * 10 + [before] * 10
    return first, [before + 1.0] * 10 + [after] * 10


def write_run(folder, loss, pools, end, seconds=(1.0, 2.0)):
    config = {
        "model": {"moe": {"num_experts": pools[-1]}},
        "pretrain": {"batch": 8, "row_length": 16},
    }
    stages = loss if len(pools) > 1 else [[*loss[0], *loss[1]]]
    step = 0
    for i, values in enumerate(stages):
        place = folder / f"stage_{i}" if len(pools) > 1 else folder
        place.mkdir(parents=True)
        rows = [{"step": 0, "eval/loss": 9.0}] if i == 0 else []
        for j, value in enumerate(values):
            step += 1
            took = 50.0 if j == 0 else seconds[i]  # the first step compiles
            row = {"step": step, "loss": value, "tokens_per_second": TOKENS / took}
            rows.append(row | {"load_gini": 0.1 * (i + 1), "load_dead": 0.0})
        rows[-1]["eval/loss"] = end
        (place / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    summary = {"config": config, "end": {"loss": {"value": end}, "text/loss": {"value": 0.0}}}
    if len(pools) > 1:
        summary |= {
            "stages": [{"experts": p, "masked": 0} for p in pools],
            "predicted_saving": 0.25,
            "growth": [{"phase": 1, "step": 20, "jump": 0.5, "recovery_steps": 15}],
        }
    (folder / "summary.json").write_text(json.dumps(summary))
    return config


def cell(name, against=""):
    return CellConfig(name, "g", against=against, seeds=2)


@pytest.fixture
def study(tmp_path):
    """EMO 16 -> 32 and fixed 32, 16: two seeds each. EMO ends at 3.2, 32 at 3.0, 16 at 4.0."""
    cells = (cell("EMO", "fixed 32"), cell("fixed 32"), cell("fixed 16", "fixed 32"))
    pools = {"EMO": [16, 32], "fixed 32": [32], "fixed 16": [16]}
    ends = {"EMO": 3.2, "fixed 32": 3.0, "fixed 16": 4.0}
    jobs = []
    for one in cells:
        for seed in range(2):
            folder = tmp_path / one.name / f"seed_{seed}"
            times = (1.0, 2.0) if one.name == "EMO" else (2.0,) if "32" in one.name else (1.0,)
            loss = losses(4.0, 3.0)
            config = write_run(folder, loss, pools[one.name], ends[one.name] + seed, times)
            jobs.append(Job(one, seed, folder, config))
    cfg = dataclasses.replace(
        load("emo", "smoke"), study=StudyConfig(kind="growth", cells=cells, warmup=False)
    )
    return cfg, tmp_path, jobs


def test_figures_of_growth(study):
    cfg, _, jobs = study
    cells = growth_report.collect(cfg, jobs)["groups"]["g"]
    emo = cells["EMO"]
    run = emo["runs"]["0"]
    assert run["loss"] == 3.2
    assert run["step_seconds/16"] == 1.0
    assert run["step_seconds/32"] == 2.0
    assert run["seconds"] == 20 * 1.0 + 20 * 2.0
    assert run["gini"] == pytest.approx(0.2)
    assert run["growth_1/jump"] == 0.5
    assert run["growth_1/spike"] == pytest.approx(1.0)  # means of ten: from 4 up to 5
    assert run["growth_1/recovery_steps"] == 15
    # The fixed pools: 40 steps of 2 s and of 1 s.
    ends = {0: (3.2, 3.0, 4.0), 1: (4.2, 4.0, 5.0)}
    excess = np.mean([a / b - 1 for a, b, _ in ends.values()])
    assert emo["relative"]["excess"]["value"] == pytest.approx(excess)
    assert emo["relative"]["gap_recovered"]["value"] == pytest.approx(0.8)
    assert emo["relative"]["saving"]["value"] == pytest.approx(1 - 60 / 80)
    assert emo["versus"]["loss"]["value"] == pytest.approx(0.2)
    assert cells["fixed 16"]["relative"] == {}
    last = emo["curve"][-1]
    assert last["tokens"] == 40 * TOKENS
    assert last["seconds"] == 60.0
    assert last["loss"] == pytest.approx(3.7)


@pytest.mark.slow
def test_the_report_of_growth(study):
    cfg, root, jobs = study
    growth_report.write(cfg, root, jobs, ["fixed 4, seed 2"])
    text = (root / "study.md").read_text()
    assert "| EMO | 16 → 32 | 2 |" in text
    assert "Failed: fixed 4, seed 2" in text
    assert "+0.8000 [+0.8000, +0.8000] | +0.250 [+0.250, +0.250] | +0.250" in text
    assert {p.name for p in (root / "figures").iterdir()} == {
        f"g_{name}.svg" for name in ("tokens", "tokens_late", "seconds", "gini")
    }
    assert "held-out loss" in (root / "report.html").read_text()


def test_the_study_of_growth_holds_what_was_planned(tmp_path):
    jobs = plan_jobs(load("emo"), tmp_path)
    seeds = {}
    for job in jobs:
        seeds.setdefault((job.cell.priority, job.cell.name), []).append(job.seed)
    assert len(seeds) == 12
    assert all(own == [0, 1, 2] for own in seeds.values())
    emo = next(job.config for job in jobs if job.cell.name == "EMO")
    again = next(job.config for job in jobs if job.cell.name == "fixed 32, re-warmed")
    assert emo["mode"] == again["mode"] == "pretrain"
    assert emo["emo"]["experts"] == [4, 8, 16, 32]
    assert len(again["pretrain"]["optim"]["rewarmup_at"]) == 3
    assert again["pretrain"]["optim"]["rewarmup_steps"] == emo["emo"]["rewarmup_steps"]


# --- The law: its report finds a law again


def test_the_law_of_a_table(tmp_path):
    law, rng = JointMoELaw(), np.random.default_rng(0)
    rows = []
    for n in (1e7, 4e7, 2e8, 1e9):
        for d in (1e9, 5e9, 3e10):
            for experts in (8, 16, 64, 128):
                loss = float(law.loss(n, d, experts / 8)) * np.exp(0.002 * rng.standard_normal())
                rows.append([n, d, experts, 8, loss])
    path = tmp_path / "mine.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["active_params", "tokens", "experts", "top_k", "loss"], *rows])
    cfg = load("moe_law", "csv")
    cfg = dataclasses.replace(
        cfg, study=dataclasses.replace(cfg.study, runs_csv=str(path), resamples=8)
    )
    run_study(cfg, str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    assert found["runs"] == {"fitted": 38, "held_out": 10}
    assert found["mean_error"]["held_out"] < 0.01
    fitted = JointMoELaw(**json.loads((tmp_path / "out" / "law.json").read_text()))
    held = sorted(rows, key=lambda r: r[0] * r[1])[-10:]
    errors = [fitted.loss(n, d, e / k) / loss - 1 for n, d, e, k, loss in held]
    assert np.mean(np.abs(errors)) == pytest.approx(found["mean_error"]["held_out"])
    text = (tmp_path / "out" / "study.md").read_text()
    assert f"--config.emo.law.a={fitted.a:.6g}" in text
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()


def test_a_bad_table_is_told(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("active_params,tokens,experts,top_k,loss\n1,2,3,4,x\n")
    cfg = load("moe_law", "csv")
    cfg = dataclasses.replace(cfg, study=dataclasses.replace(cfg.study, runs_csv=str(path)))
    with pytest.raises(ConfigError, match=r"study.runs_csv: .*bad.csv: line 2, column loss: 'x'"):
        run_study(cfg, str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="runs_csv: only kinds 'law' and 'budget'"):
        StudyConfig(runs_csv="x.csv").validate()
    with pytest.raises(ConfigError, match="warmup: only kinds 'replay' and 'budget' have one"):
        StudyConfig(kind="law").validate()


def test_the_sweep_has_its_runs_and_waits_for_enough(tmp_path):
    cfg = load("moe_law")
    jobs = plan_jobs(cfg, tmp_path)
    assert len(jobs) == 36
    sizes = {
        (j.config["model"]["d_model"], j.config["model"]["moe"]["num_experts"],
         j.config["pretrain"]["steps"])
        for j in jobs
    }  # fmt: skip
    assert len(sizes) == 36
    assert all(
        j.config["pretrain"]["optim"]["total_steps"] == j.config["pretrain"]["steps"] for j in jobs
    )
    law_report.write(cfg, tmp_path, jobs, [])
    assert (tmp_path / "runs.csv").read_text().startswith("run,active_params,tokens")
    assert not (tmp_path / "law.json").exists()


def test_a_run_as_a_point_of_the_law():
    cfg = load("emo", "smoke")
    moe = dataclasses.replace(cfg.model.moe, num_experts=8)
    model = dataclasses.replace(cfg.model, vocab_size=512, moe=moe)
    config = {"pretrain": dataclasses.asdict(cfg.pretrain)}
    summary = {"config": {"model": dataclasses.asdict(model)}, "end": {"loss": {"value": 5.0}}}
    # Active parameters without embeddings: four of eight experts, and the shared one.
    attention, expert, norms, router = 4 * 32 * 32, 3 * 32 * 16, 2 * 32 + 2 * 16, (32 + 1) * 8
    active = 2 * (attention + 5 * expert + norms + router) + 32
    assert law_report.run_row(config, summary) == [active, 6 * 2 * 64, 8, 4, 5.0]
