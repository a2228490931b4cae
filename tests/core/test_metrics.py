"""Metrics: exact means whatever the split, files that survive a kill, an honest line."""

import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core.metrics import (
    MetricWriter,
    Progress,
    format_number,
    format_seconds,
    merge,
    read_jsonl,
    reduce,
    write_summary,
)


def test_merged_parts_have_the_mean_of_the_whole():
    values = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    mask = np.random.default_rng(1).random(100) < 0.3

    @jax.jit
    def part(v, m):
        count = jnp.sum(m, dtype=jnp.float32)
        return {
            "loss": (jnp.sum(v * m), count),
            "loss_max": (jnp.max(jnp.where(m, v, -jnp.inf)), jnp.float32(jnp.any(m))),
            "loss_min": (jnp.min(jnp.where(m, v, jnp.inf)), jnp.float32(jnp.any(m))),
        }

    total = {}
    for chunk in np.split(np.arange(100), [7, 8, 50]):  # uneven on purpose
        total = merge(total, part(values[chunk], mask[chunk]))
    kept = values[mask].astype(np.float64)
    expected = {"loss": kept.mean(), "loss_max": kept.max(), "loss_min": kept.min()}
    assert reduce(total) == pytest.approx(expected, rel=1e-5)


def test_extremes_ignore_parts_without_weight():
    nothing = {"x_max": (jnp.float32(5.0), jnp.float32(0.0))}
    something = {"x_max": (jnp.float32(-3.0), jnp.float32(1.0))}
    for pair in ((nothing, something), (something, nothing)):
        assert reduce(merge(*pair)) == {"x_max": -3.0}
    assert reduce(merge(nothing, nothing)) == {}


def test_keys_of_one_side_stay_and_weight_zero_has_no_mean():
    a = {"x": (jnp.float32(3.0), jnp.float32(2.0))}
    b = {"y": (jnp.float32(0.0), jnp.float32(0.0))}
    assert reduce(merge(a, b)) == {"x": 1.5}


def test_rows_round_trip(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": (jnp.float32(3.0), jnp.float32(2.0)), "lr": 0.5, "n": 7})
        writer.write(2, {"loss": float("nan"), "lr": np.float32(0.25)})
    raw = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in raw] == [1, 2]
    rows = read_jsonl(tmp_path)
    assert {k: rows[0][k] for k in ("step", "loss", "lr", "n")} == {
        "step": 1, "loss": 1.5, "lr": 0.5, "n": 7,
    }  # fmt: skip
    assert rows[1]["loss"] is None
    assert rows[1]["lr"] == 0.25
    assert rows == read_jsonl(tmp_path / "metrics.jsonl")


def test_a_killed_and_resumed_run_has_each_step_once(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in range(5):
            writer.write(step, {"x": step})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "x"')  # killed within a line
    assert [r["step"] for r in read_jsonl(path)] == [0, 1, 2, 3, 4]
    with MetricWriter(tmp_path, tensorboard=False, resume_step=3) as writer:
        writer.write(4, {"x": 40})
        writer.write(5, {"x": 50})
    assert [(r["step"], r["x"]) for r in read_jsonl(path)] == [
        (0, 0), (1, 1), (2, 2), (3, 3), (4, 40), (5, 50),
    ]  # fmt: skip
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(5, {"x": 51})  # the later of equals is the one that counts
    assert [r["x"] for r in read_jsonl(path)] == [0, 1, 2, 3, 40, 51]


def test_a_damaged_row_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match=f"{tmp_path}/metrics.jsonl:2: "):
        read_jsonl(tmp_path)


def test_tensorboard_holds_the_scalars(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"loss/a": 0.5, "bad": math.inf})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found = path.read_bytes(), []
    while data:  # TFRecord: length u64, crc u32, payload, crc u32
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + size :]
    assert found == [(3, "loss/a", 0.5)]


def test_summary_is_plain_json_and_replaced_whole(tmp_path):
    write_summary(tmp_path / "run", {"old": 1})
    path = write_summary(
        tmp_path / "run",
        {"a": np.float32(0.5), "b": jnp.arange(3), "c": (1, math.inf), "d": {"e": None, 4: True}},
    )
    assert json.loads(path.read_text()) == {
        "a": 0.5, "b": [0, 1, 2], "c": [1, None], "d": {"e": None, "4": True},
    }  # fmt: skip
    with pytest.raises(TypeError):
        write_summary(tmp_path / "run", {"bad": object()})
    assert json.loads(path.read_text())["a"] == 0.5
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_plain_progress_is_rare_and_tells_time_left():
    clock, out = Clock(), io.StringIO()
    progress = Progress("rl", 12, start=2, stream=out, plain_interval=10, clock=clock)
    clock.now += 50  # step 3 compiles
    progress.update(3, {"reward": 0.25})
    for step in range(4, 13):
        clock.now += 4
        progress.update(step, {"reward": 0.5})
    progress.close()
    assert out.getvalue().splitlines() == [
        "rl 3/12 | reward 0.25 | 50s/step | 7m30s left",
        "rl 6/12 | reward 0.5 | 4s/step | 24s left",
        "rl 9/12 | reward 0.5 | 4s/step | 12s left",
        "rl 12/12 | reward 0.5 | 4s/step",
    ]


def test_live_progress_redraws_one_line():
    clock, out = Clock(), Terminal()
    progress = Progress("x", 2, stream=out, clock=clock)
    clock.now += 1
    progress.update(1, {"loss": 123456.5})
    clock.now += 1
    progress.update(2, {"loss": 1})
    progress.close()
    lines = out.getvalue().split("\r")
    assert lines[1:] == ["x 1/2 | loss 1.235e+05 | 1s/step | 1s left", lines[2]]
    assert lines[2].rstrip() == "x 2/2 | loss 1 | 1s/step"
    assert len(lines[2].rstrip("\n")) == len(lines[1])  # covers what stood there
    assert out.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (-3, "0s")]
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.0, "3"), (12345, "12345"), (0.00012345, "0.0001234"), (None, "nan"), (True, "True")],
)
def test_format_number(value, text):
    assert format_number(value) == text
