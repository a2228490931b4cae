"""What curation decides by: settings, the text that is compared, its tokens, the difficulty rule.

The rules are those of Guru (arXiv 2506.14965, section 3): lower-cased questions, containment
either way, the earlier set wins; pass rates of a weak and a strong model over 16 samples. The
released pipeline does not look for evaluation items among its rows: `contamination` does.
"""

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, UInt64

from pr2jax.core.config import ConfigError
from pr2jax.data.chat import render_messages
from pr2jax.tasks.base import normalise

Difficulty = Literal["none", "columns", "models"]

GURU_COLUMNS = ("qwen2.5_7b_pass_rate", "qwen3_30b_pass_rate")
OWN_COLUMNS = ("weak_pass_rate", "strong_pass_rate")

# Scripts that put no space between words: each character is a token of its own.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_BASE = 0x9E3779B97F4A7C15  # odd: multiplying by it loses nothing modulo 2^64


@dataclasses.dataclass(frozen=True)
class CurateConfig:
    """Curation of rows of the Guru schema: which stay, and why the others do not.

    Attributes:
      inputs: .parquet and .jsonl files; of two rows that are the same, the one that comes first
        stays, so the set that matters most comes first.
      max_bad_share: share of malformed rows in a file above which reading stops.
      boilerplate: regular expressions; what they match (case ignored) is no part of a question
        when questions are compared. The rows are written as they are.
      contain: whether a question inside another, or around it, is a repeat (Guru's rule).
      contain_min_chars: questions shorter than this are only compared whole ("3 + 4 =" is inside
        "13 + 4 ="; Guru has no such limit: 1).
      near: Jaccard similarity of shingles from which a question is a repeat (0: off).
      near_shingle: tokens (words, and punctuation marks) of a shingle.
      near_numbers: whether two questions with other numbers in them are other problems.
      near_permutations: MinHash values of a question.
      near_recall: share of pairs of similarity `near` that the bands must find, in expectation.
      near_bucket: a question is compared with so many that share a band, the latest ones; pairs
        left out are counted.
      against: evaluation sets: files like the inputs, or names of packaged or generated tasks
        ("packaged/human_eval"). A row that shares text with an item of theirs goes.
      ngram: consecutive words that are such a share.
      short_words: an item of fewer than `ngram` words must stand in a row as a whole; one of
        fewer than this must be the whole row.
      common_items: word sequences in more items of one set than this are its wording, not leaks
        (tasks/contamination.py).
      common_rows: word sequences in more rows than this are wording, too.
      leak_share: share of an item's word sequences that must be in a row, besides at least one.
      difficulty: "columns" reads pass rates that the rows bring, "models" measures them.
      weak, strong: the models, as `init_from`; either may be left out.
      weak_column, strong_column: names of the pass rates (empty: Guru's for "columns", else
        weak_pass_rate and strong_pass_rate).
      samples: answers a problem and model (sampled as eval.sampling says).
      too_easy: the weak model's pass rate from which a problem goes.
      too_hard: the strong model's pass rate up to which a problem goes.
      shard_rows: rows of one piece of work, and of one file written.
      batch: problems sampled at a time.
    """

    inputs: tuple[str, ...] = ()
    max_bad_share: float = 0.01
    boilerplate: tuple[str, ...] = ()
    contain: bool = True
    contain_min_chars: int = 16
    near: float = 0.8
    near_shingle: int = 3
    near_numbers: bool = True
    near_permutations: int = 128
    near_recall: float = 0.99
    near_bucket: int = 200
    against: tuple[str, ...] = ()
    ngram: int = 13
    short_words: int = 8
    common_items: int = 10
    common_rows: int = 100
    leak_share: float = 0.0
    difficulty: Difficulty = "none"
    weak: str = ""
    strong: str = ""
    weak_column: str = ""
    strong_column: str = ""
    samples: int = 16
    too_easy: float = 0.9
    too_hard: float = 1e-5
    shard_rows: int = 20_000
    batch: int = 64

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        for path in self.inputs:
            if not path.endswith((".parquet", ".jsonl")):
                raise ConfigError(f"inputs: {path!r} is neither .parquet nor .jsonl")
        for key in ("inputs", "against"):
            repeated = {name for name in getattr(self, key) if getattr(self, key).count(name) > 1}
            if repeated:
                raise ConfigError(f"{key}: {sorted(repeated)[0]!r} is given twice")
        for pattern in self.boilerplate:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"boilerplate: {pattern!r} is no expression ({error})") from None
        for key in ("max_bad_share", "near", "leak_share", "too_easy", "too_hard"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ConfigError(f"{key}: {getattr(self, key)} is not in [0, 1]")
        if not 0.0 < self.near_recall < 1.0:
            raise ConfigError(f"near_recall: must lie between 0 and 1, got {self.near_recall}")
        for key in (
            *("contain_min_chars", "near_shingle", "near_permutations", "near_bucket", "ngram"),
            *("short_words", "common_items", "common_rows", "samples", "shard_rows", "batch"),
        ):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: must be at least 1, got {getattr(self, key)}")
        if self.short_words > self.ngram:
            raise ConfigError(f"short_words: {self.short_words} is more than ngram={self.ngram}")
        models = bool(self.weak or self.strong)
        if models != (self.difficulty == "models"):
            raise ConfigError(
                "difficulty: 'models' needs weak or strong, and nothing else does "
                f"(difficulty={self.difficulty!r}, weak={self.weak!r}, strong={self.strong!r})"
            )
        if self.columns()[0] == self.columns()[1]:
            raise ConfigError(f"strong_column: {self.columns()[1]!r} is the weak model's too")

    def columns(self) -> tuple[str, str]:
        """Names of the two pass rates, the weak model's first."""
        weak, strong = OWN_COLUMNS if self.difficulty == "models" else GURU_COLUMNS
        return self.weak_column or weak, self.strong_column or strong


def question_of(row: dict[str, Any]) -> str:
    """The question of a Guru row: the prompt without its system messages, or `raw_prompt` where
    the prompt is empty, as for base models.

    Raises ValueError where the prompt is neither a text nor messages with one.
    """
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    raw = row.get("raw_prompt")
    if not prompt and isinstance(raw, str) and raw.strip():
        return raw
    if not isinstance(prompt, list) or not prompt:
        raise ValueError("prompt is neither a text nor a list of messages")
    asked = [m for m in prompt if not (isinstance(m, dict) and m.get("role") == "system")]
    return render_messages(asked or prompt)


class Comparable:
    """Makes the text that is compared: lower case, single spaces, without boilerplate."""

    def __init__(self, boilerplate: Iterable[str] = ()):
        self._patterns = [re.compile(p, re.IGNORECASE) for p in boilerplate]

    def __call__(self, question: str) -> str:
        """`question` as it is compared; all of it where nothing else would be left."""
        # A lone surrogate (JSON can spell one) has no UTF-8 form.
        whole = question.encode("utf-8", "replace").decode("utf-8")
        whole = unicodedata.normalize("NFC", whole)
        text = whole
        for pattern in self._patterns:
            text = pattern.sub(" ", text)
        return normalise(text) or normalise(whole)


def digest(text: bytes) -> bytes:
    """128 bits of a text: two of 10^6 different texts agree with probability 10^-27."""
    return hashlib.blake2b(text, digest_size=16).digest()


def tokens(text: str) -> list[str]:
    """Words, and punctuation marks one by one; letters of unspaced scripts one by one."""
    return _TOKEN.findall(text)


def words(text: str) -> list[str]:
    """`tokens` without the punctuation."""
    return [token for token in _TOKEN.findall(text) if is_word(token)]


def is_word(token: str) -> bool:
    """Whether a token is a word rather than a punctuation mark."""
    return token[0].isalnum() or token[0] == "_" or len(token) > 1


class TokenCodes:
    """32-bit codes of tokens, the same in every process; the lowest bit says "word".

    Two of 10^5 words that share a code are likely: what is found by codes is to be confirmed.
    """

    def __init__(self, limit: int = 1 << 18):
        self._codes, self._limit = _Codes(), limit

    def __call__(self, tokens: list[str]) -> UInt64[np.ndarray, " N"]:
        """The codes of `tokens`."""
        if len(self._codes) > self._limit:  # forgotten, not wrong: a code is made anew
            self._codes.clear()
        return np.fromiter(map(self._codes.__getitem__, tokens), np.uint64, len(tokens))


class _Codes(dict[str, int]):
    def __missing__(self, token: str) -> int:
        digest = hashlib.blake2b(token.encode(), digest_size=4).digest()
        code = self[token] = int.from_bytes(digest, "little") & ~1 | is_word(token)
        return code


def words_only(codes: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " W"]:
    """The codes that are words."""
    return codes[(codes & np.uint64(1)).astype(bool)]


def grams(codes: UInt64[np.ndarray, " N"], size: int) -> UInt64[np.ndarray, " G"]:
    """Codes of all runs of `size` tokens, G = max(N - size + 1, 0): a polynomial modulo 2^64."""
    count = len(codes) - size + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    base, total = np.uint64(_BASE), np.zeros(count, np.uint64)
    for i in range(size):
        total = total * base + codes[i : i + count]
    # High bits depend on all of the sum, low ones on the low ones only.
    return total ^ (total >> np.uint64(32))


def shingles(codes: UInt64[np.ndarray, " N"], size: int) -> UInt64[np.ndarray, " S"]:
    """Codes of all runs of `size` tokens; a shorter text is one run."""
    return grams(codes, max(min(size, len(codes)), 1))


def numbers_key(text: str) -> int:
    """64-bit code of the numbers in a text, whatever their order."""
    found = " ".join(sorted(_NUMBER.findall(text)))
    return int.from_bytes(hashlib.blake2b(found.encode(), digest_size=8).digest(), "little")


def too_easy(rates: Float[np.ndarray, "N 2"], cfg: CurateConfig) -> Bool[np.ndarray, " N"]:
    """Whether the weak model's pass rate (column 0) is too high; NaN (not known) is not."""
    with np.errstate(invalid="ignore"):
        return rates[:, 0] >= cfg.too_easy


def too_hard(rates: Float[np.ndarray, "N 2"], cfg: CurateConfig) -> Bool[np.ndarray, " N"]:
    """Whether the strong model's pass rate (column 1) is too low; NaN (not known) is not."""
    with np.errstate(invalid="ignore"):
        return rates[:, 1] <= cfg.too_hard
