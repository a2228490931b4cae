"""Pre-training that grows: each stage restores by itself, killed runs end in the same bits."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from pr2jax.core.checkpoint import read_arrays
from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.core.sharding import MeshConfig, ShardingError
from pr2jax.emo.expansion import GrowthConfig
from pr2jax.emo.schedule import EMOConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.models.importers.hf import export_checkpoint
from pr2jax.models.upcycling import UpcycleConfig
from pr2jax.train import audit, emo
from pr2jax.train.config import Config, LoopConfig, PretrainConfig
from pr2jax.train.pipeline import run_pretrain
from pr2jax.train.session import open_session
from tests.models.checkpoints import LLAMA, OLMOE, random_params
from tests.train.test_pretrain import config as pretrain_config
from tests.train.test_pretrain import folder  # noqa: F401 (a fixture)

STEPS = 9


def config(folder, **changes) -> Config:  # noqa: F811
    cfg = pretrain_config(folder)
    model = dataclasses.replace(
        cfg.model, moe=MoEConfig(num_experts=4, top_k=2, expert_dim=8, shared_dim=8)
    )
    pretrain = dataclasses.replace(cfg.pretrain, steps=STEPS, batch=8, eval_every=0)
    stages = EMOConfig(experts=(4, 8, 12), budget="steps", steps=(4, 3, 2), rewarmup_steps=2)
    loop = LoopConfig(checkpoint_every=2, keep=2, tensorboard=False)
    cfg = dataclasses.replace(cfg, model=model, pretrain=pretrain, emo=stages, loop=loop)
    return dataclasses.replace(cfg, **changes)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):  # noqa: F811
    workdir = tmp_path_factory.mktemp("whole") / "run"
    run_pretrain(config(folder), str(workdir))
    return workdir


def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_stages_grow_and_say_what_they_did(whole):
    found = summary(whole)
    assert [s["experts"] for s in found["stages"]] == [4, 8, 12]
    assert [s["steps"] for s in found["stages"]] == [4, 3, 2]
    assert sum(s["share"] for s in found["stages"]) == pytest.approx(1.0)
    assert [(e["step"], e["kind"], e["experts"]) for e in found["growth"]] == [
        (4, "growth", [4, 8]),
        (7, "growth", [8, 12]),
    ]
    for event in found["growth"]:
        assert event["jump"] == pytest.approx(event["loss_after"] - event["loss_before"])
    for index, pool in enumerate((4, 8, 12)):
        _, arrays = read_arrays(whole / f"stage_{index}" / "checkpoints")
        assert arrays["params/segment_0/block_0/moe/experts/gate"].shape[1] == pool
    rows = emo.rows(whole, emo.phases_of(config_of(whole)))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["experts"] for row in rows] == [4] * 4 + [8] * 3 + [12] * 2
    for row in rows:
        assert 0.0 <= row["load_gini"] < 1.0
        assert 0.0 <= row["load_dead"] <= 1.0
        assert 0.0 < row["router_entropy"] <= np.log(row["experts"]) + 1e-5
    rates = [row["learning_rate"] for row in rows]
    assert rates[4] < rates[5] == pytest.approx(1e-2)  # warm again after growth
    plan = json.loads((whole / "plan.json").read_text())
    assert plan["stages"] == found["stages"]
    seconds = [s["step_seconds"] for s in found["stages"]]
    assert min(seconds) > 0
    saved = 1 - sum(
        s["share"] * t / seconds[-1] for s, t in zip(found["stages"], seconds, strict=True)
    )
    assert found["predicted_saving"] == pytest.approx(saved)
    assert found["measured_saving"] is None  # a stage of two steps tells nothing
    memory = [s["memory_bytes"] for s in found["stages"]]
    for size, stage in zip(memory, found["stages"], strict=True):
        assert size > 3 * 4 * stage["total_params"]  # parameters and two moments, fp32
    # The plan compiled every stage's step: growth and training compile it no second time.
    assert [row["compilations"] for row in rows if row["step"] in (1, 5, 8)] == [0, 0, 0]
    assert all(row["model_flops_per_second"] > 0 for row in rows)
    page = (whole / "report.html").read_text()
    assert "How it grew" in page
    assert "expert-usage Gini" in page


def config_of(workdir):
    return from_config_dict(Config, json.loads((workdir / "config.json").read_text()))


def slow(*lost):
    return pytest.param(lost, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lost",
    [
        # Killed in the second growth, or before the stage's first checkpoint; in the first growth;
        # before the end of a stage; in the last stage.
        ("stage_2",),
        slow("stage_1", "stage_2"),
        slow("stage_2", "growth_2.json", "stage_1/checkpoints/7"),
        slow("stage_2/checkpoints/9"),
    ],
    ids="+".join,
)
def test_a_killed_run_ends_in_the_same_bits(whole, folder, tmp_path, lost):  # noqa: F811
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    for name in (*lost, "summary.json", "eval_end.json"):
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    run_pretrain(config(folder), str(workdir))
    for stage in ("stage_0", "stage_1", "stage_2"):
        assert not audit.compare_stage(whole / stage, workdir / stage)
    assert summary(workdir)["end"] == summary(whole)["end"]
    timeless = lambda e: {k: v for k, v in e.items() if k != "seconds"}
    ours, theirs = summary(workdir)["growth"], summary(whole)["growth"]
    assert list(map(timeless, ours)) == list(map(timeless, theirs))


@pytest.mark.slow
def test_the_same_command_again_trains_nothing(whole, folder, tmp_path):  # noqa: F811
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    run_pretrain(config(folder), str(workdir))
    assert summary(workdir)["end"] == summary(whole)["end"]


def test_a_stage_is_a_checkpoint_like_any_other(whole, folder, tmp_path):  # noqa: F811
    cfg = config(folder, init_from=str(whole / "stage_1"), emo=EMOConfig())
    with open_session(cfg, tmp_path) as session:
        assert session.cfg.model.moe.num_experts == 8
        params = session.initial_params()
    _, saved = read_arrays(whole / "stage_1" / "checkpoints")
    gate = params["segment_0"]["block_0"]["moe"]["experts"]["gate"]
    np.testing.assert_array_equal(gate, saved["params/segment_0/block_0/moe/experts/gate"])


@pytest.mark.slow
def test_growth_goes_on_from_a_checkpoint(whole, folder, tmp_path):  # noqa: F811
    stages = EMOConfig(experts=(12, 16), budget="shares", shares=(0.5, 0.5), rewarmup_steps=1)
    pretrain = dataclasses.replace(config(folder).pretrain, steps=2)
    cfg = config(folder, init_from=str(whole / "stage_2"), emo=stages, pretrain=pretrain)
    run_pretrain(cfg, str(tmp_path))
    _, arrays = read_arrays(tmp_path / "stage_1" / "checkpoints")
    assert arrays["params/segment_0/block_0/moe/experts/gate"].shape[1] == 16


@pytest.mark.slow
def test_masked_growth_does_not_jump_until_it_is_unmasked(folder, tmp_path):  # noqa: F811
    stages = EMOConfig(
        experts=(4, 8),
        budget="steps",
        steps=(4, 5),
        growth=GrowthConfig(init="masked_copy", optimizer="keep"),
        rewarmup_steps=1,
        unmask_steps=2,
    )
    run_pretrain(config(folder, emo=stages), str(tmp_path))
    growth, unmasking = summary(tmp_path)["growth"]
    assert growth["kind"] == "growth"
    assert growth["experts"] == [4, 4]
    assert growth["masked"] == 4
    assert abs(growth["jump"]) <= 1e-6 * growth["loss_before"]
    assert unmasking["kind"] == "unmasking"
    assert unmasking["experts"] == [4, 8]
    assert unmasking["step"] == 6
    assert unmasking["jump"] != 0.0


@pytest.mark.slow
def test_on_a_mesh(whole, folder, tmp_path):  # noqa: F811
    """Growth with a pool spread over devices; the losses are those of whole pools."""
    cfg = config(folder, mesh=MeshConfig(data=2, expert=4))
    run_pretrain(cfg, str(tmp_path))
    phases = emo.phases_of(cfg)
    ours, alone = (emo.rows(path, phases) for path in (tmp_path, whole))
    losses = [[row["loss"] for row in rows] for rows in (ours, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_what_is_refused_before_anything_runs(folder, tmp_path):  # noqa: F811
    short = dataclasses.replace(config(folder).pretrain, steps=5)
    with pytest.raises(ConfigError, match=r"emo\.steps: .* add up to 9; the run has 5"):
        run_pretrain(config(folder, pretrain=short), str(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"emo\.experts: mode 'rl' grows nothing"):
        config(folder, mode="rl").validate()
    uneven = EMOConfig(experts=(4, 6, 12), budget="steps", steps=(4, 3, 2))
    cfg = config(folder, emo=uneven, mesh=MeshConfig(data=2, expert=4))
    with pytest.raises(ShardingError, match="6 is not divided by"):
        run_pretrain(cfg, str(tmp_path / "b"))
    assert not list((tmp_path / "b").glob("stage_*"))


def test_model_config_is_that_of_the_first_stage():
    cfg = Config(
        mode="pretrain",
        model=ModelConfig(vocab_size=32, moe=MoEConfig(num_experts=16)),
        emo=EMOConfig(experts=(4, 8)),
        pretrain=PretrainConfig(),
    )
    with pytest.raises(ConfigError, match="begin with 4, and the model has 16"):
        emo.phases_of(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["olmoe", "upcycled"])
def test_a_pool_from_elsewhere_grows(kind, folder, tmp_path):  # noqa: F811
    source = OLMOE if kind == "olmoe" else LLAMA
    export_checkpoint(source, random_params(source), tmp_path / "hf")
    pools = (8, 16) if kind == "olmoe" else (4, 8)
    stages = EMOConfig(
        experts=pools,
        budget="steps",
        steps=(3, 6),
        rewarmup_steps=2,
        growth=GrowthConfig(init="masked_copy"),
        unmask_steps=3,
    )
    changes = {"init_from": str(tmp_path / "hf"), "emo": stages}
    if kind == "upcycled":
        changes["upcycle"] = UpcycleConfig(experts=4, top_k=2)
    run_pretrain(config(folder, **changes), str(tmp_path / "run"))
    found = summary(tmp_path / "run")
    growth, unmasking = found["growth"]
    assert growth["experts"] == [pools[0], pools[0]]
    assert unmasking["experts"] == list(pools)
    # Nothing changes while newborns are masked; what their taking part does is told.
    assert abs(growth["jump"]) <= 1e-6
    assert unmasking["jump"] == unmasking["loss_after"] - unmasking["loss_before"]
    _, arrays = read_arrays(tmp_path / "run" / "stage_2" / "checkpoints")
    assert arrays["params/segment_0/block_0/moe/experts/gate"].shape[1] == pools[1]
    moe = found["config"]["model"]["moe"]
    assert moe["top_k"] == (3 if kind == "olmoe" else 2)
    assert found["end"]["loss"]["value"] < found["start"]["loss"]["value"]
