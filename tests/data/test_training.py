"""Trained tokenizers: lossless, the same for the same documents, kept, no controls in text."""

import numpy as np
import pytest

from pr2jax.core.config import ConfigError
from pr2jax.data import training
from pr2jax.data.documents import Documents, read_documents
from pr2jax.data.sources import SourceConfig
from pr2jax.data.tokenizer import TokenizerConfig, build_tokenizer, save_tokenizer, saved_tokenizer

TEXTS = [
    f"def f_{i}(x):\n    if x > {i}:\n        return x - {i}\n\n\treturn None  # é\r\n"
    for i in range(40)
]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03}.py").write_bytes(text.encode())
    return read_documents({"code": SourceConfig(str(folder))})


@pytest.fixture(scope="module")
def model(documents, tmp_path_factory):
    return training.trained(documents, 330, tmp_path_factory.mktemp("cache"))


def load(path):
    return build_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(path)))


def test_lossless_and_special(model):
    tok = load(model)
    assert tok.vocab_size == 330
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (1, 2, 3)
    for text in [
        *TEXTS,
        "",
        " ",
        "\n\n  a\t\r\n\x00 ",
        "🙂 no such piece </s><s><pad><unk> <0x41>",
    ]:
        ids = tok.encode(text)
        assert not {0, 1, 2, 3} & set(ids)
        assert tok.decode([tok.bos_id, *ids, tok.eos_id, tok.pad_id]) == text
    assert len(tok.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_the_same_documents_give_the_same_tokenizer(documents, model, tmp_path):
    assert training.train(training.sample(documents), 330) == model.read_bytes()
    made = training.trained(documents, 330, tmp_path)
    assert made.name == model.name
    made.write_bytes(b"kept")
    assert training.trained(documents, 330, tmp_path).read_bytes() == b"kept"
    assert training.trained(documents, 331, tmp_path) != made
    fewer = [documents[0].subset(np.arange(30))]
    assert training.trained(fewer, 330, tmp_path) != made
    assert len(list(tmp_path.iterdir())) == 3


def test_the_sample_is_bounded_and_does_not_follow_the_order_of_files(documents):
    whole = list(training.sample(documents))
    assert sorted(whole) == sorted(TEXTS)
    assert whole != TEXTS
    part = list(training.sample(documents, 1000))
    assert sum(len(t.encode()) for t in part) in (999, 1000)
    assert part[:-1] == whole[: len(part) - 1]
    assert whole[len(part) - 1].startswith(part[-1])


def test_too_few_pieces_is_an_error(documents):
    with pytest.raises(ConfigError, match="^vocab_size: 20 pieces cannot be trained: "):
        training.train(training.sample(documents), 20)


def test_it_travels_and_says_when_it_is_missing(model, tmp_path):
    cfg = TokenizerConfig(kind="sentencepiece", path=str(model))
    save_tokenizer(cfg, tmp_path / "run")
    kept = saved_tokenizer(cfg, tmp_path / "run")
    assert kept.path == str(tmp_path / "run" / "tokenizer.model")
    assert load(kept.path).encode(TEXTS[0]) == load(model).encode(TEXTS[0])
    with pytest.raises(ConfigError, match="^path: the tokenizer is not trained yet"):
        build_tokenizer(TokenizerConfig(kind="sentencepiece", vocab_size=300))
    for fields in ({"kind": "byte", "vocab_size": 9}, {**vars(cfg), "vocab_size": 9}):
        with pytest.raises(ConfigError, match="^vocab_size: only for"):
            TokenizerConfig(**fields).validate()


def test_command(documents, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("||".join(TEXTS))
    arguments = [f"--path={tmp_path}/a.txt", "--separator=||", "--vocab_size=330"]
    training.main([*arguments, f"--output={tmp_path}/t.model"])
    assert (
        load(tmp_path / "t.model").decode(load(tmp_path / "t.model").encode(TEXTS[1])) == TEXTS[1]
    )
    with pytest.raises(SystemExit, match="path: no file at /nowhere"):
        training.main(["--path=/nowhere", "--output=x"])


def test_documents_in_memory_need_no_files():
    texts = type("Texts", (list,), {"where": lambda self, i: str(i)})(TEXTS)
    own = Documents("m", texts, np.arange(40), np.arange(40, dtype=np.uint64), 0, 0)
    assert list(training.sample([own])) == TEXTS
