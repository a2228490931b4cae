"""The benchmark's commands, at sizes where only what they compute can be looked at."""

import dataclasses
import importlib
import json
import os
import re
import sys
import threading

import numpy as np
import pytest

from pr2jax.benchmark import __main__ as cli
from pr2jax.benchmark import commands, machine, workload
from pr2jax.benchmark.jobs import common
from pr2jax.benchmark.serve import Channel
from pr2jax.core.config import ConfigError
from pr2jax.models.importers.families import FAMILIES
from tests.conftest import reference_python


class LocalSide:
    """One of our jobs in a thread of this process, over the same lines of JSON."""

    def __init__(self, name, job):
        self.name = name
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        self._in, self._out = os.fdopen(ours_in), os.fdopen(ours_out, "w")
        channel = Channel(os.fdopen(theirs_in), os.fdopen(theirs_out, "w"))
        serve = importlib.import_module(f"pr2jax.benchmark.jobs.{job}").serve

        def run():
            try:
                serve(channel, channel.next())
            except Exception as error:
                channel.reply({"error": repr(error)})

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def ask(self, message):
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()
        answer = json.loads(self._in.readline())
        assert "error" not in answer, answer
        return answer

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._out.close()
        self._thread.join(30)


@pytest.fixture
def local(monkeypatch):
    """Our sides run here: a JAX of their own to start for each would take the test's time."""
    monkeypatch.setattr(commands, "our_side", LocalSide)
    monkeypatch.setattr(common, "setup_compilation_cache", lambda _: None)
    monkeypatch.setattr(common, "reuse_freed_memory", lambda: None)
    monkeypatch.setattr(machine, "quietness", lambda: {"load_1min": 0.0, "quiet": True})


def run(capsys, tmp_path, *arguments):
    """(what was printed, the JSON) of one command line."""
    file = tmp_path / "figures.json"
    code = cli.main([*arguments, f"--json={file}"])
    told = capsys.readouterr()
    assert code == 0, told.err
    return told.out, json.loads(file.read_text())


ROW_KEYS = {
    *("name", "side", "dtype", "settings", "tries", "seconds", "per_second", "parts"),
    *("compile_seconds", "peak_rss_bytes", "prepare_peak_rss_bytes", "flops", "flops_per_second"),
    *("peak_flops", "share_of_peak", "versions"),
}


def check_common(report, command):
    assert report["command"] == command
    assert report["smoke"] is True
    assert report["machine"]["quiet"]["quiet"] is True
    for found in report.get("rows", []):
        assert set(found) == ROW_KEYS
        assert len(found["seconds"]["all"]) == report["repeats"] * report["steps"]
        assert found["flops_per_second"] == found["flops"] / found["seconds"]["median"]
        assert found["per_second"]["min"] <= found["per_second"]["median"]
        assert min(found["peak_rss_bytes"], found["compile_seconds"], found["peak_flops"]) >= 0


# --- Every command, tiny and without a peer


@pytest.mark.slow
def test_train_takes_the_real_step(local, capsys, tmp_path):
    flags = ("train", "--smoke", "--repeats=2", "--steps=2", "--dtype=float32")
    out, report = run(capsys, tmp_path, *flags, f"--profile={tmp_path / 'trace'}")
    check_common(report, "train")
    assert [r["name"] for r in report["rows"]] == ["pr2jax float32"]
    assert report["ratios"] == []
    assert report["check"] is None
    assert "of peak" in out
    assert list((tmp_path / "trace" / "pr2jax_float32").rglob("*.xplane.pb"))
    # 6 operations a parameter and token, two projections of attention scores apart.
    cfg = workload.model_config(True)
    active = cfg.vocab_size * cfg.d_model
    heads = 2 * (cfg.num_heads + cfg.num_kv_heads) * cfg.head_dim * cfg.d_model
    experts = cfg.moe.top_k * 3 * cfg.d_model * cfg.moe.expert_dim
    active += cfg.num_layers * (heads + experts + cfg.d_model * cfg.moe.num_experts)
    seen = sum(range(1, 17)) / 16  # positions that a token of a row of 16 attends to, itself too
    scores = cfg.num_layers * 2 * cfg.num_heads * cfg.head_dim * seen
    assert report["rows"][0]["flops"] == pytest.approx(6 * 2 * 16 * (active + scores))


@pytest.mark.slow
def test_decode_makes_every_token(local, capsys, tmp_path):
    flags = ("decode", "--smoke", "--repeats=1", "--dtype=float32", "--new=4")
    _, report = run(capsys, tmp_path, *flags)
    check_common(report, "decode")
    assert [r["name"] for r in report["rows"]] == ["pr2jax float32", "pr2jax float32 pr2"]
    found = report["rows"][0]
    assert found["per_second"]["median"] == pytest.approx(4 * 4 / found["seconds"]["median"])


@pytest.mark.slow
def test_grpo_tells_generating_from_updating(local, capsys, tmp_path):
    _, report = run(capsys, tmp_path, "grpo", "--smoke", "--repeats=1", "--dtype=float32")
    check_common(report, "grpo")
    assert [r["name"] for r in report["rows"]] == ["pr2jax float32 r3", "pr2jax float32 pr2"]
    for found in report["rows"]:
        parts = found["parts"]
        whole = parts["generate"]["median"] + parts["update"]["median"]
        assert 0 < whole <= found["seconds"]["median"]


@pytest.mark.slow
def test_pr2_costs_what_the_formula_says_and_r3_nothing(local, capsys, tmp_path):
    out, report = run(capsys, tmp_path, "pr2", "--smoke", "--repeats=1", "--dtype=float32")
    check_common(report, "pr2")
    check = report["check"]
    # L rows T_c (2 D + 4 E) of the smoke model: 2 layers, 2 x 2 rows, T_c 4, D 32, E 4.
    assert check["features"]["bytes"] == 2 * 4 * 4 * (2 * 32 + 4 * 4)
    assert check["r3_free_of_predictor"] is True
    assert check["predictor_work"]["r3"] == {"calls": 0, "instructions": 0}
    assert min(check["predictor_work"]["pr2"].values()) > 0
    assert set(check["cost"]) == {"mini_step", "step"}
    assert "no predictor work" in out


@pytest.mark.slow
def test_divergence_of_a_program_with_itself_is_none(local, capsys, tmp_path):
    flags = ("divergence", "--smoke", "--repeats=1", "--dtype=float32", "--rows=2", "--new=3")
    out, report = run(capsys, tmp_path, *flags)
    same = next(r for r in report["programs"] if r["program"] == "same program")
    assert same == {"program": "same program", "dtype": "float32", "rows": 2, "diverged": 0} | {
        "tokens": 2 * 3,
        "rate": 0.0,
    }
    assert len(report["programs"]) == 6
    assert "same program" in out


@pytest.mark.slow
def test_experts_tells_where_the_time_goes(local, capsys, tmp_path):
    flags = ("experts", "--smoke", "--repeats=2", "--dtype=float32")
    out, report = run(capsys, tmp_path, *flags)
    check_common(report, "experts")
    assert [r["name"] for r in report["rows"]] == ["2 experts", "4 experts"]
    two, four = report["pools"]
    router = lambda experts: 2 * (32 + 1) * experts  # two layers' columns and biases
    assert two["active"] - router(2) == four["active"] - router(4)
    assert four["parameters"] > two["parameters"]
    assert sum(report["check"]["grown"].values()) == pytest.approx(1.0)
    assert report["ratios"][0]["median"] == 1.0
    assert "1.72x" in out


def test_peaks_in_a_process_of_its_own(capsys, tmp_path):
    flags = ("peaks", "--smoke", "--repeats=1", "--dtype=float32")
    out, report = run(capsys, tmp_path, *flags)
    assert {r["shape"] for r in report["rates"]} == {"square", "weight_gradient", "experts"}
    assert all(r["flops_per_second"] > 0 and r["library"] == "jax" for r in report["rates"])
    assert report["memory"][0]["bytes_per_second"] > 0
    assert "square 16x16x16" in out


# --- The command line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--repeats=0"], "repeats: must be at least 1"),
        (["train", "--length=0"], "length: must be at least 1"),
        (["train", "--length=1"], "length, samples: must be at least 2"),
        (["decode", "--steps=0"], "steps: must be at least 1"),
        (["train", "--peer_python=/x"], "peer_python: means something only with --peer"),
        (["train", "--set=model.layers=2"], "model.layers: unknown key"),
        (["train", "--set=model.moe.x.y=2"], "model.moe.x.y: unknown key 'x'"),
        (["train", "--set=model.num_layers=two"], "model.num_layers: expected int"),
        (["train", "--set=optim.lr=1"], "want model.KEY=VALUE or sampler.KEY=VALUE"),
        (["decode", "--set=sampler.chunk=0"], "chunk: must be >= 1"),
        (["train", "--peer=transformers"], "set PR2JAX_REFERENCE_PYTHON, or --peer_python"),
        (
            ["train", "--peer=transformers", "--peer_python=/no/such"],
            "--peer_python: /no/such is not an interpreter",
        ),
    ],
)
def test_a_bad_command_line_is_one_line(capsys, monkeypatch, arguments, message):
    monkeypatch.delenv("PR2JAX_REFERENCE_PYTHON", raising=False)
    monkeypatch.setattr(machine, "quietness", lambda: {"quiet": True})
    assert cli.main(arguments) == cli.EXIT_BAD
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["train", "--batchs=1"], ["grpo", "--peer=transformers"]]
)
def test_argparse_refuses_what_it_does_not_know(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_peer_without_its_packages_is_named(capsys, monkeypatch, tmp_path):
    """This environment has no torch."""
    monkeypatch.setattr(machine, "quietness", lambda: {"quiet": True})
    flags = [f"--peer_python={sys.executable}", f"--cache={tmp_path}"]
    assert cli.main(["train", "--smoke", "--peer=transformers", *flags]) == cli.EXIT_BAD
    assert "No module named 'torch'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_overrides_reach_the_model_and_the_sampler():
    found = workload.parse_overrides(["model.moe.block_size=16", 'model.remat="full"'])
    cfg = workload.model_config(False, found | {"sampler.chunk": 3})
    assert (cfg.moe.block_size, cfg.remat, cfg.moe.num_experts) == (16, "full", 16)
    sampler = workload.sampler_config(workload.FULL, 32, 128, {"sampler.chunk": 3})
    assert (sampler.chunk, sampler.slots, sampler.max_tokens) == (3, 32, 128)
    with pytest.raises(ConfigError, match=r"model\.remat"):
        workload.model_config(False, {"model.remat": "half"})


@pytest.mark.parametrize("smoke", [False, True])
def test_both_sides_mean_the_same_model(smoke):
    """Ours, and what the importer makes of the configuration that the peer gets."""
    there = FAMILIES["qwen3_moe"].read_config(
        workload.model_json(smoke) | {"rope_theta": 10000.0, "hidden_act": "silu"}
    )
    ours = workload.model_config(smoke)
    how = {"scan_layers": ours.scan_layers}
    assert dataclasses.replace(there, **how) == ours


# --- Beside a peer


@pytest.mark.slow
def test_train_agrees_with_transformers(capsys, tmp_path):
    """One checkpoint, one batch: the same loss before the first step and after it."""
    python, why = reference_python()
    if python is None:
        pytest.skip(f"reference environment missing: {why}")
    flags = ("--smoke", "--repeats=1", "--dtype=float32", f"--cache={tmp_path}")
    peer = ("--peer=transformers", f"--peer_python={python}")
    _, report = run(capsys, tmp_path, "train", *flags, *peer)
    check = report["check"]
    np.testing.assert_allclose(check["losses"], check["peer_losses"], atol=1e-4)
    assert check["losses"][1] < check["losses"][0]
    assert [r["side"] for r in report["rows"]] == ["ours", "peer"]
    assert set(report["rows"][1]["tries"]) == {
        "('grouped_mm', 'float32')",
        "('eager', 'float32')",
    }
    assert report["ratios"][0]["to"] == "transformers float32"
    made = [p.name for p in tmp_path.iterdir() if p.is_dir()]
    assert len(made) == 1
    assert re.fullmatch(r"qwen3_moe-[0-9a-f]{12}", made[0])


@pytest.mark.slow
def test_decode_beside_transformers(capsys, tmp_path):
    """It makes as many tokens, with every cache that is tried."""
    python, why = reference_python()
    if python is None:
        pytest.skip(f"reference environment missing: {why}")
    flags = ("--smoke", "--repeats=1", "--dtype=float32", f"--cache={tmp_path}")
    peer = ("--peer=transformers", f"--peer_python={python}")
    _, report = run(capsys, tmp_path, "decode", *flags, *peer)
    assert len(report["rows"][-1]["tries"]) == 4
    assert {r["to"] for r in report["ratios"]} == {"transformers float32"}
