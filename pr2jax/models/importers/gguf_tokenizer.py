"""The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pr2jax.models.importers.files import CheckpointFormatError

# token_type of GGUF: normal tokens, and those of text that the model treats as one symbol.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# By llama.cpp's name. Its expressions are those of GPT-2's byte-level splitting, digits apart
# first in "smollm".
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTES,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES],
    },
}


def tokenizer_files(get: Callable[..., Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json) of a byte-level BPE; `get(key, *default)` reads.

    Raises CheckpointFormatError naming the file and the key that is unsupported or missing.
    """

    def known(key: str, value: Any, supported: Any) -> None:
        if value not in supported:
            names = ", ".join(map(repr, supported))
            raise CheckpointFormatError(f"{name}: {key}={value!r} is not supported; {names} are")

    known("tokenizer.ggml.model", get("tokenizer.ggml.model"), ("gpt2",))
    pre = get("tokenizer.ggml.pre", "gpt-2")
    known("tokenizer.ggml.pre", pre, PRE_TOKENIZERS)
    known(
        "tokenizer.ggml.add_space_prefix", get("tokenizer.ggml.add_space_prefix", False), (False,)
    )
    tokens = get("tokenizer.ggml.tokens")
    kinds = get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    for kind in sorted(set(kinds)):
        known("tokenizer.ggml.token_type", kind, (NORMAL, CONTROL, USER_DEFINED))
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointFormatError(f"{name}: tokenizer.ggml.tokens: one stands there twice")
    added = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == CONTROL,
        }
        for i, kind in enumerate(kinds)
        if kind != NORMAL
    ]
    special = {
        role: tokens[token]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (token := get(f"tokenizer.ggml.{key}_token_id", None)) is not None
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": _BYTES | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [merge.split(" ") for merge in get("tokenizer.ggml.merges")],
        },
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(get("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": token for role, token in special.items()},
    }
    length = get(f"{get('general.architecture')}.context_length", None)
    if length:
        config["model_max_length"] = length
    template = get("tokenizer.chat_template", None)
    if template:
        config["chat_template"] = template
    return tokenizer, config
