"""Whole runs whose workdir is in a store: the same as in a folder, stopped and resumed too."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pr2jax.core.metrics import read_jsonl
from pr2jax.core.store import as_path
from pr2jax.main import run
from pr2jax.replay.routes import open_routes
from pr2jax.sampler.engine import Sampler
from pr2jax.sampler.types import SamplingParams
from pr2jax.train.audit import compare_stage
from pr2jax.train.loop import Interrupted, StopRequest
from pr2jax.train.study_config import GenerateConfig
from tests.train import tiny
from tests.train.test_emo import config as growing
from tests.train.test_evaluate import config as evaluation
from tests.train.test_evaluate import saved_run as evaluation_run
from tests.train.test_pretrain import folder  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[2]
STORE = "gs://bucket/runs/one"


def _rl(steps, **changes):
    cfg = tiny.config(**changes)
    loop = dataclasses.replace(cfg.loop, tensorboard=True, save_routes=True)
    return dataclasses.replace(cfg, rl=dataclasses.replace(cfg.rl, steps=steps), loop=loop)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("here") / "run"
    run(_rl(4), str(workdir))
    return workdir


@pytest.mark.slow
def test_rl_in_a_store_stopped_and_resumed(here, store, monkeypatch):
    polls = []

    def poll(self):
        polls.append(1)
        self.requested = len(polls) == 2
        return self.requested

    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "poll", poll)
        with pytest.raises(Interrupted, match=f"saved in {STORE}/checkpoints; the same command"):
            run(_rl(4), STORE)
    assert [row["step"] for row in read_jsonl(STORE)] == [0, 1, 2]
    run(_rl(4), STORE)
    assert compare_stage(here, STORE) == []
    alike = lambda names: {n for n in names if "checkpoints/" not in n and "/events" not in n}
    files = [str(p.relative_to(here)) for p in here.rglob("*") if p.is_file()]
    assert alike(store.names("runs/one/")) == alike(files)
    assert len(store.names("runs/one/tensorboard/")) == 2  # one a start
    routes, _ = open_routes(STORE + "/routes/step_000001")
    expected, _ = open_routes(here / "routes" / "step_000001")
    np.testing.assert_array_equal(routes.read().result(), expected.read().result())
    assert not Path("gs:").exists()


@pytest.mark.slow
def test_sampling_from_it_into_it(store):
    run(_rl(1), STORE)
    sampling = SamplingParams(max_tokens=4)
    store.put("bucket", "prompts.txt", b"1 + 2 = \n3 + 4 = \n")
    given = GenerateConfig(prompts="gs://bucket/prompts.txt", samples=2, sampling=sampling)
    run(tiny.config(mode="generate", generate=given, init_from=STORE), "gs://bucket/runs/two")
    lines = (as_path("gs://bucket/runs/two") / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["1 + 2 = ", "3 + 4 = "]


@pytest.mark.slow
def test_growth_in_a_store(folder, tmp_path, store):  # noqa: F811
    run(growing(folder), str(tmp_path / "run"))
    for path in Path(folder).rglob("*"):
        if path.is_file():
            store.put("bucket", f"data/{path.relative_to(folder)}", path.read_bytes())
    run(growing(as_path("gs://bucket/data")), STORE)
    for stage in ("stage_0", "stage_1", "stage_2"):
        differs = compare_stage(tmp_path / "run" / stage, f"{STORE}/{stage}")
        assert differs == ["config in the checkpoint differs"]  # it names the data's folder
    run(growing(as_path("gs://bucket/data")), STORE)  # all is there: nothing is done again
    assert as_path(STORE + "/report.html").exists()


@pytest.mark.slow
def test_an_evaluation_in_a_store(store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cfg = evaluation("random:3", evaluation_run(as_path("gs://bucket/runs/seven")))
    run(cfg, STORE)
    names = store.names("runs/one/")
    assert {"summary.json", "report.html", "cells/random_3/sums.jsonl"} <= set(names)
    first = {n: store.buckets["bucket"]["runs/one/" + n].generation for n in names}
    shutil.rmtree(tmp_path / "pr2jax" / "workdirs")  # another machine
    monkeypatch.setattr(Sampler, "generate", None)  # all samples are there
    run(cfg, STORE)
    again = store.buckets["bucket"]["runs/one/cells/random_3/sums.jsonl"]
    assert again.generation == first["cells/random_3/sums.jsonl"]


CONFIG = """
import dataclasses
from pr2jax.core.config import to_config_dict
from tests.train import tiny

def get_config():
    cfg = tiny.config()
    return to_config_dict(dataclasses.replace(cfg, rl=dataclasses.replace(cfg.rl, steps=10)))
"""


@pytest.mark.slow
def test_killed_runs_in_a_store_end_in_the_same_bits(store, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    command = [sys.executable, "-m", "pr2jax.main", f"--config={tmp_path / 'config.py'}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    go = lambda workdir: subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        env=environment,
        start_new_session=True,
    )
    whole = go(tmp_path / "run")
    assert whole.wait() == 0
    draw = random.Random(0)
    for _ in range(3):
        one, before = go(STORE), set(store.names("runs/one/checkpoints/"))
        while one.poll() is None and set(store.names("runs/one/checkpoints/")) <= before:
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 1.5))
        os.killpg(one.pid, signal.SIGKILL)
        assert one.wait() == -signal.SIGKILL
    assert go(STORE).wait() == 0
    assert compare_stage(tmp_path / "run", STORE) == []
