"""Pre-training learns, measures what it says, and resumes as if it had never stopped."""

import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core.config import ConfigError
from pr2jax.core.metrics import read_jsonl
from pr2jax.core.optim import OptimConfig
from pr2jax.data.sources import SourceConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.models.logprobs import logits
from pr2jax.models.transformer import forward
from pr2jax.train.config import Config, LoopConfig, PretrainConfig
from pr2jax.train.loop import Interrupted, run
from pr2jax.train.pretrain import PretrainTrainer, read_data, with_trained_tokenizer
from pr2jax.train.session import open_session
from pr2jax.train.streams import Streams

LETTERS = "abcdefghijkl"
STEPS = 60


def periodic(count, seed):
    """Texts that go round the alphabet, from anywhere, in steps of 1 or (the second source) 5."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        start, size = int(rng.integers(12)), int(rng.integers(20, 90))
        texts.append("".join(LETTERS[(start + t * (1 + 4 * (seed % 2))) % 12] for t in range(size)))
    return texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    for name, seed in (("up", 2), ("leap", 1)):
        (path / f"{name}.txt").write_text("\n".join(periodic(60, seed)))
    return path


def config(folder, **changes):
    sources = {
        name: SourceConfig(str(folder / f"{name}.txt"), separator="\n", weight=weight)
        for name, weight in (("up", 2.0), ("leap", 1.0))
    }
    pretrain = PretrainConfig(
        data=sources,
        held_out=0.1,
        steps=STEPS,
        batch=6,
        row_length=32,
        eval_every=20,
        eval_rows=40,
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=5, b2=0.98),
    )
    cfg = Config(
        mode="pretrain",
        compute_dtype="float32",
        model=ModelConfig(
            vocab_size=0,
            d_model=32,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            moe=MoEConfig(num_experts=4, top_k=2, expert_dim=16),
        ),
        tokenizer=TokenizerConfig(kind="char", alphabet=LETTERS),
        pretrain=pretrain,
        loop=LoopConfig(checkpoint_every=20, tensorboard=False),
    )
    return dataclasses.replace(cfg, **changes)


@pytest.fixture(scope="module")
def session(folder, tmp_path_factory):
    with open_session(config(folder), tmp_path_factory.mktemp("w"), jax.devices()[:1]) as session:
        yield session


@functools.cache
def _trainer(session):
    return PretrainTrainer(session, read_data(session.cfg.pretrain))


def train(session, workdir, stop_at=None, steps=STEPS):
    """(outcome, what each step consumed); the compiled programs are shared by the module."""
    trainer, ledger = copy.copy(_trainer(session)), {}
    trainer.steps, inner = steps, trainer.step
    trainer.stream.restart()

    def step(state, index):
        if index + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        state, metrics = inner(state, index)
        ledger[index] = trainer.consumed(index)
        return state, metrics

    trainer.step = step
    try:
        outcome = run(
            trainer,
            trainer.initial_state(session.initial_params()),
            workdir=workdir,
            options=session.cfg.loop,
            config=session.config_json,
            best_metric="eval/loss",
            best_mode="min",
        )
    except Interrupted:
        return None, ledger
    return outcome, ledger


@pytest.fixture(scope="module")
def whole(session, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    outcome, ledger = train(session, workdir)
    return outcome, ledger, workdir


def test_loss_falls_far_below_the_unigram_entropy(session, whole, folder):
    _, _, workdir = whole
    texts = [t for name in ("up", "leap") for t in (folder / f"{name}.txt").read_text().split("\n")]
    counts = np.array([sum(t.count(c) for t in texts) for c in LETTERS] + [len(texts)], float)
    share = counts / counts.sum()
    unigram = -(share * np.log(share)).sum()
    rows = {row["step"]: row for row in read_jsonl(workdir)}
    assert sorted(s for s in rows if "eval/loss" in rows[s]) == [0, 20, 40, 60]
    assert rows[0]["eval/loss"] == pytest.approx(math.log(14), abs=0.1)
    assert rows[60]["loss"] < 0.5 * unigram
    assert rows[60]["eval/loss"] < 0.5 * unigram
    for row in (rows[1], rows[60]):
        assert row["tokens"] == 6 * 32
        assert row["tokens_per_second"] > 0
        assert row["share/up"] + row["share/leap"] == pytest.approx(1.0)
        assert row["load_max"] >= 1.0
    assert np.mean([rows[i]["share/up"] for i in range(1, 61)]) == pytest.approx(2 / 3, abs=0.01)


def test_figures_against_each_document_by_itself(session, whole):
    """Nats a token and bits a byte in float64, from the logits of whole documents."""
    params, trainer = whole[0].state.params, _trainer(session)
    hidden = lambda p, t: (
        forward(
            p,
            t,
            jnp.broadcast_to(jnp.arange(t.shape[1]), t.shape),
            jnp.ones_like(t),
            cfg=session.cfg.model,
        ).hidden
    )
    alone = jax.jit(lambda p, t: logits(p, hidden(p, t), session.cfg.model))
    figures = trainer.full(params)
    total = {"nats": 0.0, "tokens": 0, "bytes": 0}
    for part, documents in zip(trainer.held_out, trainer.data.held_out, strict=True):
        nats = tokens = size = 0
        assert part.documents == len(documents)  # eval_rows hold all of these
        for i in range(len(documents)):
            ids = np.array([*session.tokenizer.encode(documents[i]), session.tokenizer.eos_id])
            # Rows of 32: a later piece sees the one token before it, as a row holds no more.
            for start in range(0, len(ids) - 1, 31):
                piece = ids[start : start + 32]
                padded = np.zeros((1, 32), np.int32)
                padded[0, : len(piece)] = piece
                out = np.asarray(alone(params, padded), np.float64)[0]
                logp = out - np.log(np.exp(out).sum(-1, keepdims=True))
                nats -= logp[np.arange(len(piece) - 1), piece[1:]].sum()
            tokens += len(ids) - 1
            size += len(documents[i]) - 1  # the first letter is predicted from nothing
        assert figures[f"{part.name}/loss"].mean == pytest.approx(nats / tokens, rel=1e-5)
        total["nats"] += nats
        total["tokens"] += tokens
        total["bytes"] += size
    assert figures["loss"].mean == pytest.approx(total["nats"] / total["tokens"], rel=1e-5)
    bits = total["nats"] / math.log(2) / total["bytes"]
    assert figures["bits_per_byte"].mean == pytest.approx(bits, rel=1e-5)
    assert figures["loss"].low <= figures["loss"].mean <= figures["loss"].high


@pytest.mark.parametrize("stop_at", [7, 41])
def test_resumed_equals_never_stopped(session, whole, stop_at, tmp_path):
    outcome, ledger, workdir = whole
    none, first = train(session, tmp_path, stop_at)
    assert none is None
    assert sorted(first) == list(range(stop_at))
    resumed, rest = train(session, tmp_path)
    assert sorted(rest) == list(range(stop_at, STEPS))
    assert first | rest == ledger
    jax.tree.map(np.testing.assert_array_equal, resumed.state, outcome.state)
    a, b = read_jsonl(workdir), read_jsonl(tmp_path)
    for key in ("step", "loss", "grad_norm", "eval/loss", "eval/up/bits_per_byte"):
        assert [row.get(key) for row in a] == [row.get(key) for row in b]


def test_no_token_is_skipped_and_none_comes_twice(session, whole):
    """The ledger, read as text: pieces of a document meet end to end, each once an epoch."""
    _, ledger, workdir = whole
    written = (workdir / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["items"] for line in written] == [ledger[i] for i in range(STEPS)]
    spans = {}
    for index in range(STEPS):
        for item in ledger[index]:
            where, _, span = item.partition(":")
            spans.setdefault(where, []).append([int(n) for n in span.split("-")])
    data = _trainer(session).data
    finished = 0
    for where, found in spans.items():
        name, _, document = where.split("/")
        assert found[0][0] == 0
        assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
        text = data.train[["up", "leap"].index(name)][int(document)]
        finished += found[-1][1] == len(text) + 1
    assert finished >= len(spans) - 2  # all but what the last rows of either source cut
    for name, documents in zip(("up", "leap"), data.train, strict=True):
        first = {w for w in spans if w.startswith(f"{name}/0/")}
        assert len(first) == len(documents)


def test_held_out_documents_are_not_trained_on(session):
    data = _trainer(session).data
    for train_part, held in zip(data.train, data.held_out, strict=True):
        texts = {train_part[i] for i in range(len(train_part))}
        assert not texts & {held[i] for i in range(len(held))}
        assert len(held)


def test_a_batch_is_of_its_parts_whoever_reads_them(session):
    trainer = copy.copy(_trainer(session))
    make, batch = trainer._part, session.cfg.pretrain.batch
    whole = Streams(make, batch, range(batch), 3)
    halves = [Streams(make, batch, range(i, i + batch // 2), 3) for i in (0, batch // 2)]
    assert [list(half.streams) for half in halves] == [[0, 1], [1, 2]]
    for _ in range(3):
        (rows, pieces), (upper, _), (lower, _) = next(whole), *map(next, halves)
        for field, x, y in zip(rows, upper, lower, strict=True):
            np.testing.assert_array_equal(field, np.concatenate([x, y]))
        assert len(pieces) == batch
    # A run that was read in three parts goes on so, wherever it began.
    state = json.loads(json.dumps(whole.state()))
    other = Streams(make, batch, range(batch), 1)
    assert not np.array_equal(next(other)[0].tokens, rows.tokens)
    other.restore(state)
    assert (other.parts, other.position) == (3, 3)
    for _ in range(2):
        (x, pieces), (y, again) = next(whole), next(other)
        np.testing.assert_array_equal(x.tokens, y.tokens)
        assert pieces == again


def test_other_documents_or_parts_are_refused(session, folder, tmp_path):
    trainer = copy.copy(_trainer(session))
    memory = trainer.memory()
    with pytest.raises(ConfigError, match="documents are not those"):
        trainer.remember(memory | {"documents": "others"})
    with pytest.raises(ConfigError, match=r"pretrain.batch: 6 rows are not divided by 4 parts"):
        trainer.remember(memory | {"streams": memory["streams"] * 4})
    with pytest.raises(ConfigError, match="parts: 4 does not divide batch=6"):
        dataclasses.replace(session.cfg.pretrain, parts=4).validate()
    shutil.copytree(folder, tmp_path / "texts")
    (tmp_path / "texts" / "up.txt").write_text("a\nb\nabc")
    changed = read_data(config(tmp_path / "texts").pretrain)
    assert changed.fingerprint() != trainer.data.fingerprint()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"a": SourceConfig()}}, r"^pretrain.data.a.path: which files\?"),
        ({"data": {"a": SourceConfig("/nowhere")}}, "^pretrain.data.a.path: no file at /nowhere"),
        (
            {"data": {"a": SourceConfig("BAD/up.jsonl")}},
            r"^pretrain.data.a: .*up.jsonl:1: not JSON",
        ),
        ({"data": {"a": SourceConfig("BAD/one.txt")}}, r"^pretrain.data.a: 1 document\(s\) leave"),
    ],
)
def test_bad_data_is_one_error(changes, said, tmp_path):
    (tmp_path / "up.jsonl").write_text("{")
    (tmp_path / "one.txt").write_text("one document")
    data = {
        name: dataclasses.replace(s, path=s.path.replace("BAD", str(tmp_path)))
        for name, s in changes["data"].items()
    }
    with pytest.raises(ConfigError, match=said):
        read_data(PretrainConfig(data=data))


def test_tokenizer_is_trained_where_asked_for(session, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = _trainer(session).data
    cfg = config(folder, tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=300))
    made = with_trained_tokenizer(cfg, data).tokenizer
    assert made.path.startswith(str(tmp_path))
    assert with_trained_tokenizer(config(folder), data) == config(folder)
    few = dataclasses.replace(cfg, tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=9))
    with pytest.raises(ConfigError, match="^tokenizer.vocab_size: 9 pieces"):
        with_trained_tokenizer(few, data)


@pytest.mark.slow
def test_a_mesh_gives_the_same_step(session, folder, tmp_path):
    from pr2jax.core.sharding import MeshConfig

    cfg = config(folder, mesh=MeshConfig(data=2))
    with open_session(cfg, tmp_path, jax.devices()[:2]) as other:
        trainer, whole = PretrainTrainer(other, _trainer(session).data), _trainer(session)
        whole.stream.restart()
        a, b = (
            t.initial_state(s.initial_params()) for t, s in ((trainer, other), (whole, session))
        )
        before = trainer.full(a.params), whole.full(b.params)
        for key in before[0]:
            assert before[0][key].mean == pytest.approx(before[1][key].mean, rel=1e-5)
        (_, x), (_, y) = trainer.step(a, 0), whole.step(b, 0)
        for key in ("loss", "grad_norm", "tokens", "load_balance"):
            assert float(x[key][0]) == pytest.approx(float(y[key][0]), rel=1e-4)
