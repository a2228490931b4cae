"""Tokenizers: bytes, characters of a stated alphabet, Hugging Face and SentencePiece files.

All have one small interface (`Tokenizer`). Special tokens are ids outside text: `encode` never
produces them (a text that spells "<eos>" stays text) and `decode` leaves them out. `pad_id`
fills rows only; masks come from lengths, so it may equal `eos_id`.
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from pr2jax.core.config import ConfigError
from pr2jax.core.fetch import fetched
from pr2jax.core.store import Staged, as_path, is_store
from pr2jax.data.chat import ChatTemplate, SpelledControls, check_messages


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer.

    kind: "byte" (256 bytes of UTF-8), "char" (one id a character of `alphabet`), "hf" (a
        tokenizer.json, or the directory holding it), "sentencepiece" (a .model file, or one that
        pre-training makes of its documents).
    path: file or directory, for "hf" and "sentencepiece".
    vocab_size: pieces of a "sentencepiece" tokenizer that is to be trained (then without path).
    alphabet: the characters, for "char", in id order.
    eos: the end token's text, for "hf" where tokenizer_config.json does not name it.
    chat_template: a jinja2 file in the place of the chat template that an "hf" folder holds.
    """

    kind: Literal["byte", "char", "hf", "sentencepiece"] = "byte"
    path: str = ""
    alphabet: str = ""
    eos: str = ""
    chat_template: str = ""
    vocab_size: int = 0

    @property
    def untrained(self) -> bool:
        """Whether it is still to be made of the training documents."""
        return self.kind == "sentencepiece" and not self.path

    def validate(self) -> None:
        """Raises ConfigError naming the key that is missing or does nothing for this kind."""
        if self.kind not in ("byte", "char", "hf", "sentencepiece"):
            raise ConfigError(f"kind: {self.kind!r} is not byte, char, hf or sentencepiece")
        if self.kind == "char" and not self.alphabet:
            raise ConfigError("alphabet: kind 'char' needs its characters")
        if self.kind != "char" and self.alphabet:
            raise ConfigError(f"alphabet: only for kind 'char', not {self.kind!r}")
        if len(set(self.alphabet)) != len(self.alphabet):
            twice = sorted({c for c in self.alphabet if self.alphabet.count(c) > 1})
            raise ConfigError(f"alphabet: {''.join(twice)!r} stands there more than once")
        if self.kind == "hf" and not self.path:
            raise ConfigError(f"path: kind {self.kind!r} needs a file")
        if self.untrained and self.vocab_size < 1:
            raise ConfigError(
                "path: kind 'sentencepiece' needs a file, or the vocab_size to train one of"
            )
        if self.vocab_size and not self.untrained:
            raise ConfigError(
                "vocab_size: only for a 'sentencepiece' tokenizer that is to be trained"
            )
        if self.kind in ("byte", "char") and self.path:
            raise ConfigError(f"path: kind {self.kind!r} reads no file")
        if self.eos and self.kind != "hf":
            raise ConfigError(f"eos: only for kind 'hf', not {self.kind!r}")
        if self.chat_template and self.kind != "hf":
            raise ConfigError(f"chat_template: only for kind 'hf', not {self.kind!r}")


class Tokenizer(Protocol):
    """Text to ids and back. `bos_id` is None where the model wants no first token, `chat` where
    there is no chat template."""

    chat: ChatTemplate | None
    vocab_size: int
    eos_id: int
    pad_id: int
    bos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without specials. Raises ValueError where it cannot be written."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, specials left out."""
        ...


class ByteTokenizer:
    """Ids 0..255 are UTF-8 bytes; 256 is <pad>, 257 is <eos>."""

    vocab_size, pad_id, eos_id, bos_id, chat = 258, 256, 257, None, None

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode("utf-8", errors="replace")


class CharTokenizer:
    """Id 0 is <pad>, 1 is <eos>, then the alphabet in its order from id 2."""

    pad_id, eos_id, bos_id, chat = 0, 1, None, None

    def __init__(self, alphabet: str):
        self._ids = {c: i + 2 for i, c in enumerate(alphabet)}
        self._chars = {i: c for c, i in self._ids.items()}
        self.vocab_size = len(alphabet) + 2

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[c] for c in text]
        except KeyError as error:
            raise ValueError(
                f"character {error.args[0]!r} is not in the alphabet of this tokenizer "
                f"(text: {text[:60]!r})"
            ) from None

    def decode(self, ids: list[int]) -> str:
        return "".join(self._chars.get(int(i), "") for i in ids)


class HFTokenizer:
    """A `tokenizer.json` read by the `tokenizers` library (no `transformers`)."""

    def __init__(self, path: str, eos: str = "", chat_template: str = ""):
        import tokenizers

        file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        if not os.path.isfile(file):
            raise ConfigError(f"path: no tokenizer.json at {file}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(file)
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"path: {file} is not a tokenizer.json ({error})") from None
        # A tokenizer.json may carry padding or truncation settings of its training script.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Text from a problem or a model must not turn into a control token.
        self._tokenizer.encode_special_tokens = True
        beside = os.path.join(os.path.dirname(file), "tokenizer_config.json")
        names: dict[str, Any] = {}
        if os.path.isfile(beside):
            with open(beside, encoding="utf-8") as f:
                names = json.load(f)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        eos_id = self._special(eos or names.get("eos_token"))
        if eos_id is None:
            wanted = eos or names.get("eos_token")
            why = f"token {wanted!r} is not in {file}" if wanted else f"{beside} names none"
            raise ConfigError(f"eos: no end token: {why}")
        self.eos_id = eos_id
        pad_id = self._special(names.get("pad_token"))
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.bos_id = self._special(names.get("bos_token")) if names.get("add_bos_token") else None
        self.chat = _chat_template(os.path.dirname(file), names, chat_template)

    def _special(self, token: Any) -> int | None:
        text = _text(token)
        return self._tokenizer.token_to_id(text) if text else None

    @functools.cached_property
    def _controlling(self):
        """The same tokenizer, reading control tokens: for the text of templates alone."""
        made = self._tokenizer.from_str(self._tokenizer.to_str())
        made.encode_special_tokens = False
        return made

    @functools.cached_property
    def _controls(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation by the chat template, its control tokens recognised; a message
        that spells one stays text. Raises ValueError without a template, or for bad messages."""
        if self.chat is None:
            raise ValueError("the tokenizer has no chat template")
        check_messages(messages)
        spelled = SpelledControls(list(self._controls), messages)
        render = functools.partial(self.chat.render, add_generation_prompt=add_generation_prompt)
        if not spelled.any:
            return self._controlling.encode(render(messages), add_special_tokens=False).ids
        ids = []
        for control, text in spelled.split(
            render([{**m, "content": spelled.guard(m["content"])} for m in messages])
        ):
            ids += [self._controls[text]] if control else self.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def _text(token: Any) -> str | None:
    """A token of tokenizer_config.json, which may be a text or an object around it."""
    return token.get("content") if isinstance(token, dict) else token


def _chat_template(folder: str, names: dict[str, Any], own: str) -> ChatTemplate | None:
    """`own`, else chat_template.jinja, else that of tokenizer_config.json, as `transformers`
    orders them. Raises ConfigError."""
    beside = os.path.join(folder, "chat_template.jinja")
    where = own or (beside if os.path.isfile(beside) else "")
    source = names.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    try:
        if where:
            with open(where, encoding="utf-8") as file:
                source = file.read()
        if not source:
            return None
        specials = {k: _text(v) for k, v in names.items() if k.endswith("_token") and _text(v)}
        return ChatTemplate(
            source, specials, where or os.path.join(folder, "tokenizer_config.json")
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template: {error}") from None


class SentencePieceTokenizer:
    """A SentencePiece `.model` file. Without a pad piece, <pad> is <eos>."""

    chat = None

    def __init__(self, path: str):
        import sentencepiece

        if not os.path.isfile(path):
            raise ConfigError(f"path: no SentencePiece model at {path}")
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.Load(path)
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"path: {path} is not a SentencePiece model ({error})") from None
        self.vocab_size = self._sp.get_piece_size()
        self.eos_id = self._sp.eos_id()
        if self.eos_id < 0:
            raise ConfigError(f"path: {path} has no end piece")
        self.pad_id = self._sp.pad_id() if self._sp.pad_id() >= 0 else self.eos_id
        self.bos_id = self._sp.bos_id() if self._sp.bos_id() >= 0 else None
        self._controls = {i for i in range(self.vocab_size) if self._sp.is_control(i)}

    def encode(self, text: str) -> list[int]:
        return self._sp.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._sp.decode([int(i) for i in ids if int(i) not in self._controls])


def build_tokenizer(cfg: TokenizerConfig) -> Tokenizer:
    """The tokenizer `cfg` describes. Raises ConfigError naming the key at fault."""
    cfg.validate()
    if cfg.untrained:
        raise ConfigError("path: the tokenizer is not trained yet; mode 'pretrain' does that")
    if cfg.kind == "byte":
        return ByteTokenizer()
    if cfg.kind == "char":
        return CharTokenizer(cfg.alphabet)
    cfg = _fetched(cfg)
    if cfg.kind == "hf":
        return HFTokenizer(cfg.path, cfg.eos, cfg.chat_template)
    return SentencePieceTokenizer(cfg.path)


_TRAVELS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def _fetched(cfg: TokenizerConfig) -> TokenizerConfig:
    """`cfg` reading copies on this machine of what lies in a store."""
    path = cfg.path
    if is_store(path) and cfg.kind == "hf":  # a tokenizer's files alone: a model may lie there, too
        file = path if path.endswith(".json") else f"{path}/tokenizer.json"
        beside = as_path(file).parent
        for name in _TRAVELS:
            if (beside / name).exists():
                fetched(beside / name)
        path = fetched(file)
    template = cfg.chat_template and fetched(cfg.chat_template)
    return dataclasses.replace(cfg, path=path and fetched(path), chat_template=template)


def save_tokenizer(cfg: TokenizerConfig, folder: str | os.PathLike) -> None:
    """Copies the files that `cfg` reads to `folder`, so that a run keeps its tokenizer."""
    if not cfg.path:
        return
    cfg = _fetched(cfg)
    beside = cfg.path if os.path.isdir(cfg.path) else os.path.dirname(cfg.path)
    files = {name: os.path.join(beside, name) for name in _TRAVELS} if cfg.kind == "hf" else {}
    if not os.path.isdir(cfg.path):
        files["tokenizer.json" if cfg.kind == "hf" else "tokenizer.model"] = cfg.path
    if cfg.chat_template:
        files["chat_template.jinja"] = cfg.chat_template
    with Staged(folder) as staged:
        for name, source in files.items():
            target = staged.path / name
            if os.path.isfile(source) and os.path.abspath(source) != os.path.abspath(target):
                shutil.copyfile(source, target)


def saved_tokenizer(cfg: TokenizerConfig, folder: str | os.PathLike) -> TokenizerConfig:
    """`cfg` reading the copy that `save_tokenizer` left in `folder`; `cfg` where there is none."""
    own = folder if cfg.kind == "hf" else os.path.join(folder, "tokenizer.model")
    there = os.path.join(folder, "tokenizer.json") if cfg.kind == "hf" else own
    if not cfg.path or not as_path(there).is_file():
        return cfg
    # Its chat template was copied with it, to where it is found by itself.
    return dataclasses.replace(cfg, path=os.fspath(own), chat_template="")


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[dict[str, str]]) -> list[int]:
    """Ids of a prompt. Text: the first token where the model wants one, then the text. Messages:
    what the tokenizer's chat template makes of them, up to where the assistant speaks.

    Raises ValueError on an empty result (a model needs one token to predict from), and for
    messages where the tokenizer has no chat template.
    """
    if not isinstance(prompt, str):
        if tokenizer.chat is None:
            raise ValueError("prompt_template is 'chat', but the tokenizer has no chat template")
        return tokenizer.encode_chat(prompt)
    ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
    if not ids:
        raise ValueError("an empty prompt gives no tokens")
    return ids
