"""Two and four processes do what one does: pre-training that grows, and GRPO + PR2."""

import json
import shutil
import signal
import socket
import time

import numpy as np
import pytest

from pr2jax.core.checkpoint import read_arrays
from pr2jax.core.metrics import read_jsonl
from tests.hosts import launch
from tests.train.test_pretrain import folder  # noqa: F401 (a fixture)

PRETRAIN = "--config=tests/hosts/configs.py:pretrain:"
GRPO = "--config=tests/hosts/configs.py:grpo"


def first_gradient(stage):
    """The gradient of the first update, clipped: Adam's first moment after it, by leaf."""
    _, arrays = read_arrays(stage / "checkpoints", 1)
    return {path: x.astype(np.float64) for path, x in arrays.items() if "/mu/" in path}


def compare(own, whole):
    """The first gradient norm-wise, and every step's loss."""
    for stage in [path.parent.relative_to(whole) for path in whole.rglob("checkpoints")]:
        if (whole / stage / "checkpoints" / "1").exists():
            found, wanted = first_gradient(own / stage), first_gradient(whole / stage)
            assert found.keys() == wanted.keys()
            assert wanted
            norm = lambda tree: np.sqrt(sum(np.sum(x * x) for x in tree.values()))
            error = norm({path: found[path] - x for path, x in wanted.items()}) / norm(wanted)
            print(f"{own.name}: gradient {error:.1e}")
            assert error <= 1e-5
        rows, truth = (read_jsonl(path / stage / "metrics.jsonl") for path in (own, whole))
        losses, exact = ([row["loss"] for row in found if "loss" in row] for found in (rows, truth))
        assert len(losses) == len(exact) > 0
        off = np.abs(np.array(losses) - exact)
        print(
            f"{own.name}: loss, first {off[0]:.1e}, worst {off.max():.1e} of {np.abs(exact).max()}"
        )
        assert off[0] <= 1e-5 * max(1.0, abs(exact[0]))
        assert off.max() <= 1e-3
        for name in ("ledger.jsonl",):
            assert (own / stage / name).read_text() == (whole / stage / name).read_text()


@pytest.fixture(scope="module")
def pretrained(folder, tmp_path_factory):  # noqa: F811
    workdir = tmp_path_factory.mktemp("pretrain") / "one"
    launch.run(1, workdir, f"{PRETRAIN}{folder}")
    return workdir


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("grpo") / "one"
    launch.run(1, workdir, GRPO)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_pretraining_with_a_growth(pretrained, folder, processes):  # noqa: F811
    own = pretrained.with_name(f"pretrain_{processes}")
    launch.run(processes, own, f"{PRETRAIN}{folder}")
    compare(own, pretrained)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (own, pretrained)]
    for key in ("start", "end"):
        found, exact = (summary[key]["loss"]["value"] for summary in summaries)
        assert found == pytest.approx(exact, abs=1e-3)
    assert [event["experts"] for event in summaries[0]["growth"]] == [[4, 8]]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_grpo_on_recorded_rollouts(learned, processes):
    own = learned.with_name(f"grpo_{processes}")
    shutil.copytree(learned / "journal", own / "journal")
    # The last ones they sample themselves, and score together; as the first, which no checkpoint
    # of the run needed any more.
    for step in (18, 19):
        (own / "journal" / f"step_{step:06d}.p0.batch").unlink()
    launch.run(processes, own, GRPO)
    compare(own, learned)
    rows = read_jsonl(own / "metrics.jsonl")
    assert [row["journal/replayed"] for row in rows] == [0.0] + [1.0] * 17 + [0.0] * 2
    assert {p.name for p in (own / "journal").glob("step_000019*")} == {
        f"step_000019.p{index}.batch" for index in range(processes)
    }


@pytest.mark.slow
def test_one_of_two_killed_ends_the_other_and_one_process_goes_on(learned):
    own = learned.with_name("lost")
    shutil.copytree(learned / "journal", own / "journal")
    processes = launch.start(2, own, GRPO)
    try:
        wait_for_rows(own / "ledger.jsonl", 6, processes)
        processes[1].kill()
        start = time.monotonic()
        assert processes[0].wait(60) == 75
        print(f"the other ended after {time.monotonic() - start:.1f} s")
    finally:
        for process in processes:
            process.kill()
    said = launch.log(own, 0).read_text()
    assert f"process 1 ({socket.gethostname()}, pid {processes[1].pid}) is gone" in said
    assert len(read_jsonl(own / "metrics.jsonl")) < 20
    launch.run(1, own, GRPO)
    compare(own, learned)


@pytest.mark.slow
def test_a_stop_told_to_one_process_stops_and_saves_all(learned):
    own = learned.with_name("stopped")
    shutil.copytree(learned / "journal", own / "journal")
    processes = launch.start(2, own, GRPO)
    try:
        wait_for_rows(own / "ledger.jsonl", 4, processes)
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(120) for process in processes] == [75, 75]
    finally:
        for process in processes:
            process.kill()
    assert "the same command resumes" in launch.log(own, 0).read_text()
    done = len((own / "ledger.jsonl").read_text().splitlines())
    assert (own / "checkpoints" / str(done)).is_dir()


def wait_for_rows(path, count, processes):
    """Returns once the file has so many lines."""
    limit = time.monotonic() + 600
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < limit
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
