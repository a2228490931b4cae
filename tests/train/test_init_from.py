"""What a run may start from: published folders, GGUF files, other runs; dense or made sparse."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from pr2jax.core.checkpoint import Checkpointer
from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.core.sharding import MeshConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models import logprobs
from pr2jax.models.config import num_moe_layers
from pr2jax.models.importers.hf import export_checkpoint, import_checkpoint
from pr2jax.models.transformer import forward
from pr2jax.models.upcycling import UpcycleConfig
from pr2jax.replay.modes import ReplayConfig
from pr2jax.train.config import Config
from pr2jax.train.session import open_session
from tests.models.checkpoints import LLAMA, QWEN, random_params
from tests.models.test_gguf import TOKENS, write
from tests.train import tiny

CHAR = tiny.config().tokenizer
UPCYCLE = UpcycleConfig(experts=4, top_k=2, granularity=2, every=2)
DENSE = LLAMA


@partial(jax.jit, static_argnames="cfg")
def logits(params, cfg):
    tokens = jnp.arange(16)[None]
    out = forward(params, tokens, tokens, jnp.ones_like(tokens), cfg=cfg)
    return logprobs.logits(params, out.hidden, cfg)


def saved_run(folder):
    """A dense run's checkpoint, as training leaves it; its parameters."""
    params = random_params(DENSE, 1)
    own = dataclasses.asdict(tiny.config(model=DENSE, replay=ReplayConfig(mode="off")))
    with Checkpointer(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": jax.tree.map(jnp.asarray, params)}, {"config": own})
    return params


def start(kind, folder):
    """(init_from, the tokenizer to configure, dense model, its parameters)."""
    if kind == "gguf":
        write(folder / "a.gguf", Kind.Q8_0, False)
        dense, params = import_checkpoint(folder / "a.gguf")
        return folder / "a.gguf", TokenizerConfig(), dense, params
    if kind == "run":
        return folder, CHAR, DENSE, saved_run(folder)
    params = random_params(DENSE)
    export_checkpoint(DENSE, params, folder / "hf")
    return folder / "hf", CHAR, DENSE, params


@pytest.mark.parametrize("kind", ["hf", "gguf", pytest.param("run", marks=pytest.mark.slow)])
def test_a_dense_start_is_made_sparse(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "from").mkdir()
    source, tokenizer, dense, params = start(kind, tmp_path / "from")
    options = dataclasses.replace(UPCYCLE, every=1) if kind == "gguf" else UPCYCLE
    cfg = tiny.config(init_from=str(source), tokenizer=tokenizer, upcycle=options)
    with open_session(cfg, tmp_path / "run", jax.devices()[:1]) as session:
        model = session.cfg.model
        assert (model.moe.num_experts, model.moe.top_k) == (8, 4)
        assert num_moe_layers(model) == dense.num_layers // options.every
        assert session.cfg.init_from == str(source)
        if kind == "gguf":
            assert session.tokenizer.vocab_size == len(TOKENS)
        got = logits(session.initial_params(), model)
    want = logits(params, dense)
    assert want.std() > 0.5
    assert np.abs(got - want).max() <= 2e-5


def test_a_dense_start_may_stay_dense(tmp_path):
    source, tokenizer, dense, params = start("hf", tmp_path)
    off = tiny.config(init_from=str(source), tokenizer=tokenizer, replay=ReplayConfig(mode="off"))
    with open_session(off, tmp_path / "run", jax.devices()[:1]) as session:
        assert session.cfg.model.moe is None
        got = logits(session.initial_params(), session.cfg.model)
    np.testing.assert_array_equal(got, logits(params, dense))


def test_on_a_mesh_each_device_makes_its_shards(tmp_path):
    source, tokenizer, dense, params = start("hf", tmp_path)
    cfg = tiny.config(
        init_from=str(source), tokenizer=tokenizer, upcycle=UPCYCLE, mesh=MeshConfig(fsdp=8)
    )
    with open_session(cfg, tmp_path / "run") as session:
        made = session.initial_params()
        same = jax.tree.map(lambda a, s: a.sharding == s, made, session.shardings)
        assert all(jax.tree.leaves(same))
        got = logits(jax.device_get(made), session.cfg.model)
    assert np.abs(got - logits(params, dense)).max() <= 2e-5


def test_what_does_not_fit_is_named(tmp_path):
    source, tokenizer, _, _ = start("hf", tmp_path)
    common = {"init_from": str(source), "tokenizer": tokenizer}

    def attempt(**changes):
        open_session(tiny.config(**(common | changes)), tmp_path / "run")

    with pytest.raises(ConfigError, match=r"replay\.mode: 'pr2' replays routes, and the model is"):
        attempt()
    with pytest.raises(ConfigError, match=r"upcycle\.granularity: 5 does not divide"):
        attempt(upcycle=UpcycleConfig(experts=4, granularity=5))
    export_checkpoint(QWEN, random_params(QWEN), tmp_path / "moe")
    with pytest.raises(ConfigError, match=r"upcycle\.experts: the model to upcycle has experts al"):
        attempt(init_from=str(tmp_path / "moe"), upcycle=UPCYCLE)
    with pytest.raises(ConfigError, match=r"upcycle\.experts: init_from must give the dense"):
        from_config_dict(Config, dataclasses.asdict(tiny.config(upcycle=UPCYCLE)))
    bad = dataclasses.asdict(tiny.config(upcycle=UpcycleConfig(experts=4, top_k=9), init_from="x"))
    with pytest.raises(ConfigError, match=r"upcycle\.top_k: must lie between 1 and experts=4"):
        from_config_dict(Config, bad)
