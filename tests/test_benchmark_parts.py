"""The benchmark's parts: sides and their turns, statistics and tables, and what it reads of HLO."""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.benchmark import hlo, machine, sides, table
from pr2jax.benchmark.compare import Entry, check_losses, ratio, row
from pr2jax.benchmark.jobs.mini_step import feature_bytes
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.batch import split_micro
from pr2jax.rl.update import make_mini_step
from pr2jax.sampler.decode import init_features
from tests.rl import tiny

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
        {
            "seconds": [1.0, 3.0],
            "parts": {"update": [0.5, 1.0]},
            "peak_rss_bytes": 7,
            "peak_flops": 200.0,
        },
        {
            "seconds": [2.0, 2.0],
            "parts": {"update": [0.5, 0.7]},
            "peak_rss_bytes": 9,
            "peak_flops": 50.0,
        },
    ]
    found = row(entry("x", "ours", []), answers, units=10, flops=40.0)
    assert found["seconds"] == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [1.0, 3.0, 2.0, 2.0]}
    assert found["per_second"] == {"median": 5.0, "min": 10 / 3, "max": 10.0}
    assert found["parts"]["update"]["median"] == 0.6
    assert (found["peak_rss_bytes"], found["share_of_peak"]) == (9, 0.1)


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


@pytest.mark.slow
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
