"""Tokenizers: round trips, specials outside text, and errors that name the culprit."""

import json

import pytest

from pr2jax.core.config import ConfigError
from pr2jax.data.tokenizer import TokenizerConfig, build_tokenizer, encode_prompt

CORPUS = ["the cat sat on the mat", "a cat and a mat", "3 + 4 = 7, and 7 - 4 = 3"] * 20


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    import tokenizers

    path = tmp_path_factory.mktemp("hf")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(CORPUS, trainer)
    tok.enable_padding(length=32)
    tok.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    return path


@pytest.fixture(scope="module")
def sp_model(tmp_path_factory):
    import sentencepiece

    path = tmp_path_factory.mktemp("sp")
    (path / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.Train(
        f"--input={path}/corpus.txt --model_prefix={path}/m --vocab_size=60 "
        "--hard_vocab_limit=false --byte_fallback=false --minloglevel=2"
    )
    return path / "m.model"


def test_byte_round_trip_of_any_text():
    tok = build_tokenizer(TokenizerConfig())
    text = "π ≈ 3.14159, <eos> \x00 émigré 🙂"
    assert tok.encode(text) == list(text.encode())
    assert tok.decode([*tok.encode(text), tok.eos_id, tok.pad_id]) == text
    assert {tok.eos_id, tok.pad_id} == {256, 257}
    assert tok.vocab_size == 258
    assert tok.decode([0xCF]) == "\ufffd"  # half of a character, as a model may write it


def test_char_ids_follow_the_alphabet():
    tok = build_tokenizer(TokenizerConfig(kind="char", alphabet="0123456789+-= \n"))
    assert tok.vocab_size == 17
    assert tok.encode("10\n") == [3, 2, 16]
    assert tok.decode([3, tok.pad_id, 2, tok.eos_id]) == "10"
    with pytest.raises(ValueError, match="'x' is not in the alphabet"):
        tok.encode("3 x 4")


def test_hf_round_trip_and_specials(hf_dir):
    for path in (hf_dir, hf_dir / "tokenizer.json"):
        tok = build_tokenizer(TokenizerConfig(kind="hf", path=str(path)))
        ids = tok.encode("the cat and 7")
        assert tok.decode([*ids, tok.eos_id]) == "the cat and 7"
        assert len(ids) < len("the cat and 7")
        assert max(ids) < tok.vocab_size
        assert tok.pad_id == tok.eos_id
        assert tok.bos_id is None
        assert tok.eos_id not in tok.encode("a<|end|>b")  # text cannot end a sequence
        assert tok.decode(tok.encode("a<|end|>b")) == "a<|end|>b"


def test_hf_errors_name_the_file(hf_dir, tmp_path):
    with pytest.raises(ConfigError, match=str(tmp_path)):
        build_tokenizer(TokenizerConfig(kind="hf", path=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="is not a tokenizer.json"):
        build_tokenizer(TokenizerConfig(kind="hf", path=str(tmp_path)))
    with pytest.raises(ConfigError, match="'<stop>' is not in"):
        build_tokenizer(TokenizerConfig(kind="hf", path=str(hf_dir), eos="<stop>"))


def test_sentencepiece_round_trip(sp_model):
    tok = build_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(sp_model)))
    ids = tok.encode("the cat sat")
    assert tok.decode([tok.bos_id, *ids, tok.eos_id]) == "the cat sat"
    assert tok.pad_id == tok.eos_id  # this model has no pad piece
    assert not {tok.eos_id, tok.bos_id} & set(tok.encode("</s><s> a cat"))
    assert encode_prompt(tok, "a cat")[0] == tok.bos_id


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"kind": "char"}, "alphabet"),
        ({"kind": "char", "alphabet": "aba"}, "alphabet"),
        ({"kind": "byte", "alphabet": "ab"}, "alphabet"),
        ({"kind": "hf"}, "path"),
        ({"kind": "byte", "path": "x"}, "path"),
        ({"kind": "byte", "eos": "x"}, "eos"),
        ({"kind": "words"}, "kind"),
        ({"kind": "sentencepiece", "path": "/nowhere.model"}, "path"),
    ],
)
def test_bad_settings_name_their_key(fields, key):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        build_tokenizer(TokenizerConfig(**fields))


def test_empty_prompt_is_an_error():
    with pytest.raises(ValueError, match="empty prompt"):
        encode_prompt(build_tokenizer(TokenizerConfig()), "")
