"""The benchmark's commands, at sizes where only what they compute can be looked at."""

import dataclasses
import importlib
import json
import os
import re
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.benchmark import __main__ as cli
from pr2jax.benchmark import commands, hlo, machine, sides, table, workload
from pr2jax.benchmark.compare import Entry, check_losses, ratio, row
from pr2jax.benchmark.jobs import common
from pr2jax.benchmark.jobs.mini_step import feature_bytes
from pr2jax.benchmark.serve import Channel
from pr2jax.core.config import ConfigError
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.models.importers.families import FAMILIES
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.batch import split_micro
from pr2jax.rl.update import make_mini_step
from pr2jax.sampler.decode import init_features
from tests.conftest import reference_python
from tests.rl import tiny


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


def test_train_takes_the_real_step(local, capsys, tmp_path):
    flags = ("train", "--smoke", "--repeats=2", "--steps=2", "--dtype=float32")
    out, report = run(capsys, tmp_path, *flags)
    check_common(report, "train")
    assert [r["name"] for r in report["rows"]] == ["pr2jax float32"]
    assert report["ratios"] == []
    assert report["check"] is None
    assert "of peak" in out
    # 6 operations a parameter and token, two projections of attention scores apart.
    cfg = workload.model_config(True)
    active = cfg.vocab_size * cfg.d_model
    heads = 2 * (cfg.num_heads + cfg.num_kv_heads) * cfg.head_dim * cfg.d_model
    experts = cfg.moe.top_k * 3 * cfg.d_model * cfg.moe.expert_dim
    active += cfg.num_layers * (heads + experts + cfg.d_model * cfg.moe.num_experts)
    seen = sum(range(1, 17)) / 16  # positions that a token of a row of 16 attends to, itself too
    scores = cfg.num_layers * 2 * cfg.num_heads * cfg.head_dim * seen
    assert report["rows"][0]["flops"] == pytest.approx(6 * 2 * 16 * (active + scores))


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


# --- Sides


FAKE = """
import json, os, time
def serve(channel, params):
    def measure(message):
        if message.get("round") == params.get("fail_at"):
            raise ValueError("no luck")
        if message.get("round") == params.get("die_at"):
            print("last words", flush=True); os._exit(3)
        if message.get("round") == params.get("sleep_at"):
            time.sleep(60)
        for event in ("begins", "ends"):
            with open(params["log"], "a") as log:
                log.write(f"{params['name']} {event}\\n")
            time.sleep(0.02)
        print("not an answer")
        return {"seconds": [0.5], "pid": os.getpid()}
    channel.loop({"told": params["name"]}, measure)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(name, **params) -> (side, its first answer), as peers are started."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(sides, "PEERS", tmp_path)
    started = []

    def make(name, **params):
        side = sides.peer_side(name, sides.Path(sys.executable), "fake")
        started.append(side)
        ready = side.ask({"name": name, "log": str(tmp_path / "log"), **params})
        return side, ready

    yield make
    for side in started:
        side.close()


def test_sides_take_turns_and_live_on(fake, tmp_path):
    (a, ready), (b, _) = fake("a"), fake("b")
    assert ready["told"] == "a"
    assert ready["peak_rss_bytes"] > 1e6
    answers = sides.interleave([a, b], 3)
    events = (tmp_path / "log").read_text().split("\n")[:-1]
    turns = [events[i : i + 2] for i in range(0, len(events), 2)]
    # Never two at once, and every other round backwards.
    assert [t for t in turns if t[0].split()[0] != t[1].split()[0]] == []
    assert [t[0][0] for t in turns] == ["a", "b", "b", "a", "a", "b"]
    pids = [{answer["pid"] for answer in found} for found in answers]
    assert [len(p) for p in pids] == [1, 1]
    assert pids[0] != pids[1]
    assert [len(found) for found in answers] == [3, 3]


@pytest.mark.parametrize(
    "params, message",
    [
        ({"fail_at": 1}, "a: ValueError: no luck"),
        ({"die_at": 1}, "a: ended with status 3: .*last words"),
    ],
)
def test_a_side_that_fails_says_why(fake, params, message):
    side, _ = fake("a", **params)
    side.ask({"round": 0})
    with pytest.raises(sides.BenchmarkError, match=message):
        side.ask({"round": 1})


def test_a_side_that_hangs_is_given_up(fake):
    side, _ = fake("a", sleep_at=0)
    with pytest.raises(sides.BenchmarkError, match="no answer within 0 s"):
        side.ask({"round": 0}, limit_s=0.3)
    side._process.kill()  # else closing waits for it to end by itself


# --- Figures


def entry(name, kind, losses, dtype="float32"):
    side = type("Named", (), {"name": name})()
    ready = {"losses": losses, "compile_seconds": 1.0, "peak_rss_bytes": 5, "peak_flops": 100.0}
    return Entry(side, kind, dtype, ready | {"versions": {}})


def test_losses_must_agree():
    ours, peer = entry("ours", "ours", [2.0, 1.9]), entry("peer", "peer", [2.0005, 1.8])
    assert check_losses([ours]) is None
    assert check_losses([ours, entry("p", "peer", [3.0], "bfloat16")]) is None
    assert check_losses([ours, peer])["first_difference"] == pytest.approx(5e-4)
    for other in (2.1, float("nan")):
        with pytest.raises(sides.BenchmarkError, match="do not compute the same"):
            check_losses([ours, entry("peer", "peer", [other])])


def test_rows_and_ratios_by_hand():
    answers = [
        {"seconds": [1.0, 3.0], "parts": {"update": [0.5, 1.0]}, "peak_rss_bytes": 7},
        {"seconds": [2.0, 2.0], "parts": {"update": [0.5, 0.7]}, "peak_rss_bytes": 9},
    ]
    found = row(entry("x", "ours", []), answers, units=10, flops=40.0)
    assert found["seconds"] == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [1.0, 3.0, 2.0, 2.0]}
    assert found["per_second"] == {"median": 5.0, "min": 10 / 3, "max": 10.0}
    assert found["parts"]["update"]["median"] == 0.6
    assert (found["peak_rss_bytes"], found["share_of_peak"]) == (9, 0.2)


def test_ratios_pair_rounds():
    """A machine half as fast in one round does not change a ratio."""
    found = ratio("x", "y", [1.0, 2.0, 4.0], [3.0, 6.0, 12.0])
    assert found == {"row": "x", "to": "y"} | table.spread([3.0, 3.0, 3.0])


def test_tables_are_aligned():
    text = table.render(["", "a", "long head"], [["row", "1", "2"], ["longer row", "10", "3"]])
    assert text.splitlines() == [
        "             a  long head",
        "----------  --  ---------",
        "row          1          2",
        "longer row  10          3",
    ]
    shown = [table.number(x) for x in (None, 0, 12345.6, 0.012345, 2e-7, 999.4)]
    assert shown == ["-", "0", "12,346", "0.0123", "2.0e-07", "999"]


def test_feature_memory_is_that_of_the_arrays_and_of_the_plan():
    cfg = ModelConfig(vocab_size=7, d_model=24, num_layers=3, moe=MoEConfig(num_experts=8))
    features = init_features(cfg, 5, 6, None)
    assert feature_bytes(cfg, 5, 6) == features.logits.nbytes + features.inputs.nbytes
    # The design's figure: Qwen3-30B, T_c = 2048, 512 responses is 232 GB.
    large = ModelConfig(d_model=2048, num_layers=48, moe=MoEConfig(num_experts=128, top_k=8))
    assert feature_bytes(large, 512, 2048) == pytest.approx(232e9, rel=1e-3)


def test_quietness_is_told(monkeypatch):
    ticks = iter([(100, 1000), (160, 1100)])
    monkeypatch.setattr(machine, "_busy_ticks", lambda: next(ticks))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0, 0))
    found = machine.quietness(0)
    assert found == {"load_1min": 0.1, "busy_share": 0.6, "quiet": False}
    assert "60% of the CPU" in machine.warning(found)
    assert machine.warning(found | {"quiet": True}) == ""


# --- What r3's program holds of the predictor


def test_who_reads_the_predictor_is_seen():
    def text(fn):
        arguments = {"predictor": jnp.ones((4, 4)), "x": jnp.ones((4, 4))}
        return jax.jit(fn, donate_argnums=0).lower(arguments).compile().as_text()

    passed = text(lambda p: {"predictor": p["predictor"], "x": p["x"] @ p["x"] + 1})
    assert hlo.predictor_users(passed) == []
    assert hlo.predictor_users(text(lambda p: {"predictor": p["predictor"] * p["x"]}))
    with pytest.raises(ValueError, match="no parameter"):
        hlo.predictor_users(jax.jit(lambda x: x + 1).lower(1.0).compile().as_text())


def test_r3_does_nothing_for_the_predictor():
    """Its program has no operation of the predictor's loss, and W_p and its moments pass through
    unchanged, even where W_p is not zero and the caller says that it is active."""
    params = tiny.make_params(predictor=0.1)
    optimizer = tiny.make_optimizer(params)
    state = tiny.make_state(params, optimizer)
    routes = np.tile(np.arange(tiny.K, dtype=np.uint8), (tiny.L, tiny.ROWS, tiny.LENGTH, 1))
    features = jax.tree.map(np.asarray, init_features(tiny.MODEL, tiny.ROWS, 4, None))
    batch = tiny.blank_batch().replace(routes=routes)
    given = {"r3": None, "pr2": features}
    calls, lowered = {}, {}
    for mode, kept in given.items():
        cfg = ReplayConfig(mode=mode, feature_tokens=4)
        step = make_mini_step(tiny.MODEL, tiny.rl_config(), cfg, optimizer)
        ready = split_micro(batch.replace(features=kept), tiny.ROWS)
        lowered[mode] = step.lower(state, ready, True), ready
        calls[mode] = hlo.predictor_calls(lowered[mode][0])
    assert calls["r3"] == 0 < calls["pr2"]
    compiled = lowered["r3"][0].compile()
    assert hlo.predictor_users(compiled.as_text()) == []
    before, old = tiny.leaves(state, "predictor"), tiny.leaves(state, "moe/router/kernel")
    before, old = jax.tree.map(np.copy, (before, old))  # the state's own buffers are given away
    new, _ = compiled(state, lowered["r3"][1], True)
    after = tiny.leaves(new, "predictor")
    assert len(before) >= 3  # W_p and two moments
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    moved = tiny.leaves(new, "moe/router/kernel")
    assert any(np.any(moved[n] != old[n]) for n in old)


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
