"""Plans: by hand from the published law and from one's own, and what a run makes of a plan."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pr2jax.core.config import ConfigError, from_config_dict, to_config_dict
from pr2jax.train import plan
from pr2jax.train.config import Config
from pr2jax.train.study_config import PlanConfig
from tests import xla

ROOT = Path(__file__).resolve().parents[2]


def ask(micro_batch=64, **asked):
    cfg = Config(mode="plan", plan=PlanConfig(**asked))
    return plan.make(
        dataclasses.replace(cfg, rl=dataclasses.replace(cfg.rl, micro_batch=micro_batch))
    )


def test_the_published_law_by_hand():
    found = ask(compute=1e6, regime="easy")
    exact = 2 ** (2.73 + 6.09 / (1 + math.exp(-4.75 * (6 - 5.84))))
    assert found["n_exact"] == pytest.approx(exact)
    assert found["n"] == 2 * round(exact / 2) == 118  # 32 x n rows in micro-batches of 64
    assert (found["prompts"], found["steps"]) == (32, 10**6 // (118 * 32))
    assert found["rollouts"] == 118 * 32 * found["steps"] <= 10**6
    assert found["learning_rate"] == pytest.approx(1e-6 * math.sqrt(118 * 32 / 1024))
    assert found["source"].startswith("published")
    assert found["recipe"].endswith("on")


def test_hard_problems_tokens_and_more_prompts():
    found = ask(compute=4e9, unit="tokens", tokens_per_rollout=2000, regime="hard")
    assert found["compute"]["rollouts"] == 2e6
    assert found["prompts"] == 64  # more on hard sets: the law over all B_p
    assert found["n"] == 129  # the saturation of hard, joint
    assert any("n* has saturated (at 129)" in note for note in found["warnings"])
    assert found["recipe"].endswith("off")
    other = ask(compute=2e6, regime="extremely_hard", prompts=32)
    assert "no law is published for extremely_hard" in str(other["warnings"])
    assert other["law"]["amplitude"] == 4.47


@pytest.mark.parametrize(
    ("n", "prompts", "micro", "want"),
    [
        (100.0, 32, 64, 100),
        (101.4, 32, 64, 102),
        (13.0, 16, 64, 12),  # multiples of 4
        (9.7, 16, 64, 8),  # 12 / 9.7 > 9.7 / 8
        (9.9, 16, 64, 12),
        (0.3, 16, 64, 4),
        (1.1, 64, 64, 2),  # never a group of one
        (7.0, 24, 64, 8),  # 24 n = 64 k
    ],
)
def test_batches_are_cut_without_a_rest(n, prompts, micro, want):
    assert plan.fit_batch(n, prompts, micro) == want
    assert want * prompts % micro == 0


def own_law(tmp_path, **change):
    law = {
        "law": {"amplitude": 3.0, "slope": 4.0, "centre": 5.0, "base": 2.0},
        "compute_range": [4096.0, 262144.0],
        "n_range": [4, 64],
        "prompts": 16,
        "regime": "easy",
        "recipe": {"learning_rate": 2e-4, "rows": 64},
        "tokens_per_rollout": 8.0,
        "growth_interval": [1.5, 4.0],
    }
    (tmp_path / "law.json").write_text(json.dumps(law | change))
    return str(tmp_path)


def test_a_law_of_ones_own(tmp_path):
    found = ask(compute=8e5, unit="tokens", fit=own_law(tmp_path), micro_batch=32)
    assert found["compute"]["rollouts"] == 1e5  # the sweep measured 8 tokens a rollout
    assert found["n_exact"] == pytest.approx(2**3.5)
    assert (found["n"], found["prompts"]) == (12, 16)
    assert found["learning_rate"] == pytest.approx(2e-4 * math.sqrt(12 * 16 / 64))
    assert found["source"].startswith("own sweep")
    assert [note for note in found["warnings"] if "micro" in note] == [
        "n 11.3 -> 12: 16 x n rows must be whole micro-batches of rl.micro_batch=32"
    ]
    far = ask(compute=1e6, fit=own_law(tmp_path), regime="hard", prompts=64)
    assert "extrapolated: fitted on 4,096 to 262,144 rollouts" in far["warnings"]
    assert "the law is of easy problems, not of hard ones" in far["warnings"]
    assert "the law was fitted at B_p = 16, not 64" in far["warnings"]
    unsure = ask(compute=1e5, fit=own_law(tmp_path, growth_interval=[0.9, 3.0], n_range=[16, 64]))
    assert any("not settled: by a factor of 0.90 to 3.00" in note for note in unsure["warnings"])
    assert "n = 11.3 lies outside the n that were run" in unsure["warnings"]
    one = ask(compute=1e5, fit=own_law(tmp_path, growth_interval=None))
    assert "the sweep had one seed: whether n* grows is not known" in one["warnings"]
    flat = {"amplitude": 0.0, "slope": 1.0, "centre": 5.0, "base": 3.0}
    still = ask(compute=1e5, fit=own_law(tmp_path, law=flat, recipe=None))
    assert still["n"] == 8
    assert (
        "n* did not grow over the sweep's range, so it is the same at every C" in still["warnings"]
    )
    assert any("learning rate is not known" in note for note in still["warnings"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"compute": 100.0}, "plan.compute: 100 rollouts are less than one batch of 32 x"),
        ({"unit": "tokens"}, "plan.tokens_per_rollout: must be given .* published"),
        ({"fit": "nowhere.json"}, "plan.fit: nowhere.json cannot be read"),
    ],
)
def test_what_cannot_be_planned_is_told(asked, said):
    with pytest.raises(ConfigError, match=said):
        ask(**asked)


def test_a_file_that_is_no_law(tmp_path):
    for change in ({"law": {"amplitude": "much"}}, {"compute_range": [1]}, {"recipe": {"rows": 1}}):
        with pytest.raises(ConfigError, match="plan.fit: .*law.json is no law of a sweep"):
            ask(fit=own_law(tmp_path, **change))
    with pytest.raises(ConfigError, match="plan.compute: must be above 0"):
        from_config_dict(Config, {"mode": "plan", "plan": {"compute": 0.0}})
    with pytest.raises(ConfigError, match="tokens_per_rollout: only unit 'tokens'"):
        from_config_dict(Config, {"mode": "plan", "plan": {"tokens_per_rollout": 5.0}})


# ------------------------------------------------------------------ in a run


def job(tmp_path, plan_values=None, given=(), mode="rl", rl_task=(), **rl):
    """A run's configuration, with a plan of 10^5 rollouts: 16 x 12 rows."""
    found = ask(compute=1e5, fit=own_law(tmp_path)) | (plan_values or {})
    (tmp_path / "plan.json").write_text(json.dumps(found))
    values = {"mode": mode, "rl_plan": str(tmp_path), "rl": rl, "rl_task": dict(rl_task)}
    return plan.configure(values, dict(given))


def test_a_run_takes_its_plan(tmp_path):
    cfg = job(tmp_path, given={"rl.samples_per_prompt": 12, "rl.kl_coef": 0.1})
    assert (cfg.rl.samples_per_prompt, cfg.rl.prompts_per_batch) == (12, 16)
    assert cfg.rl.steps == 10**5 // (12 * 16)
    assert (cfg.rl.mini_steps, cfg.rl.epochs) == (1, 1)
    assert cfg.rl.optim.learning_rate == pytest.approx(2e-4 * math.sqrt(12 * 16 / 64))
    assert (cfg.rl.optim.schedule, cfg.rl.optim.warmup_steps) == ("constant", 10)
    # A run's config.json, run again; and what a config file gives.
    assert plan.configure(dataclasses.asdict(cfg), {}) == cfg
    locked = to_config_dict(dataclasses.replace(Config(), rl_plan=str(tmp_path)))
    assert plan.configure(locked, {}).rl.rows == 192
    assert locked.rl.prompts_per_batch == 32  # not its own
    assert plan.configure(to_config_dict(Config()), {}) == Config()


def test_a_run_rounds_to_its_own_batches_and_keeps_the_budget(tmp_path):
    cfg = job(tmp_path, micro_batch=128)  # which the config's own 32 x 8 / 4 rows would not fill
    assert cfg.rl.samples_per_prompt == 16  # 16 n = 128 k
    assert cfg.rl.steps * cfg.rl.rows <= 10**5 < (cfg.rl.steps + 3) * cfg.rl.rows
    assert cfg.rl.optim.learning_rate == pytest.approx(2e-4 * math.sqrt(256 / 64))


def test_conflicts_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"rl.samples_per_prompt: 8 is given, and rl_plan=.* 12"):
        job(tmp_path, given={"rl.samples_per_prompt": 8})
    with pytest.raises(ConfigError, match="rl.dynamic_sampling: draws rollouts that rl_plan"):
        job(tmp_path, dynamic_sampling=True)
    with pytest.raises(ConfigError, match="rl_plan: mode 'sft' has no RL"):
        job(tmp_path, mode="sft")
    with pytest.raises(ConfigError, match=r"rl_task.size: 8 problems .* \(as rl_plan="):
        job(tmp_path, rl_task={"size": 8})
    for bad in ({"n": 0}, {"steps": "many"}, {"learning_rate": None}, {"prompts": 2.5}):
        with pytest.raises(ConfigError, match=f"rl_plan: .*plan.json: {next(iter(bad))} is"):
            job(tmp_path, bad)
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(ConfigError, match="rl_plan: .* holds no JSON object"):
        plan.configure({"rl_plan": str(tmp_path)}, {})


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pr2jax.main", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": xla.flags(1)},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
def test_the_command_of_the_header(tmp_path):
    flags = ("--config=configs/plan.py", f"--workdir={tmp_path}", "--config.plan.compute=1e6")
    done = command(*flags)
    assert done.returncode == 0, done.stderr
    assert "n, samples a prompt" in done.stdout
    assert "published (IsoCompute, 7B model, easy, B_p=32)" in done.stdout
    assert json.loads((tmp_path / "plan.json").read_text())["n"] == 118
    clash = command(
        "--config=configs/grpo.py:smoke",
        f"--workdir={tmp_path / 'run'}",
        f"--config.rl_plan={tmp_path}",
        "--config.rl.prompts_per_batch=8",
    )
    assert clash.returncode == 2
    assert "rl.prompts_per_batch: 8 is given, and rl_plan=" in clash.stderr


@pytest.mark.slow
def test_a_grpo_run_with_a_plan(tmp_path):
    """The smoke run of configs/grpo.py, planned: 16 x 4 rows, three updates."""
    law = own_law(tmp_path, law={"amplitude": 0.0, "slope": 1.0, "centre": 2.0, "base": 2.0})
    flags = (f"--config.plan.fit={law}", "--config.plan.compute=200", "--config.rl.micro_batch=16")
    done = command("--config=configs/plan.py", f"--workdir={tmp_path}", *flags)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    done = command(
        "--config=configs/grpo.py:smoke", f"--workdir={run}", f"--config.rl_plan={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((run / "config.json").read_text())
    assert config["rl_plan"] == str(tmp_path)
    rl = config["rl"]
    assert (rl["samples_per_prompt"], rl["prompts_per_batch"], rl["steps"]) == (4, 16, 3)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3
