"""Training of SentencePiece tokenizers, lossless and repeatable, kept by what they were made of.

python -m pr2jax.data.training --path=FILES --vocab_size=4096 --output=tokenizer.model
"""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pr2jax.core.config import ConfigError
from pr2jax.core.files import user_cache
from pr2jax.data.documents import Documents, read_documents
from pr2jax.data.sources import SourceConfig

log = logging.getLogger("pr2jax")

# Text that a tokenizer is trained on; more of it changes few pieces and takes ever longer.
SAMPLE_BYTES = 16_000_000

# Byte-pair merges of text as it is: no normalization, no space put in front, none taken away, and
# bytes for characters that have no piece, so that decode(encode(text)) == text (but for U+2581,
# which SentencePiece writes for a space). One thread: the result depends on how many there are.
_OPTIONS = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "split_digits": True,
    "character_coverage": 0.9995,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": 3,
    "max_sentence_length": 1 << 30,  # a whole document is a sentence: merges may hold line ends
    "num_threads": 1,
    "minloglevel": 2,
}


def sample(sources: Sequence[Documents], limit: int = SAMPLE_BYTES) -> Iterator[str]:
    """Documents of all sources, up to `limit` bytes, in the order of their hashes: a fair sample
    of every folder and source, and the same one whatever the order of files."""
    order = sorted(
        (int(digest), s, i)
        for s, documents in enumerate(sources)
        for i, digest in enumerate(documents.digests)
    )
    left = limit
    for _, s, i in order:
        text = sources[s][i]
        size = len(text.encode("utf-8"))
        if size > left:
            # A document too long for what is left gives its beginning.
            yield text.encode("utf-8")[:left].decode("utf-8", errors="ignore")
            return
        yield text
        left -= size


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece model of `vocab_size` pieces (fewer where the texts hold no more merges).

    Raises ConfigError("vocab_size: why") where that is too few for bytes and characters.
    """
    import sentencepiece

    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=out,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            **_OPTIONS,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "no reason given"
        raise ConfigError(f"vocab_size: {vocab_size} pieces cannot be trained: {reason}") from None
    return out.getvalue()


def cache_folder() -> Path:
    """Where trained tokenizers are kept: a folder of the user's cache."""
    return user_cache("tokenizers")


def trained(sources: Sequence[Documents], vocab_size: int, folder: Path | None = None) -> Path:
    """Path of the tokenizer trained on `sources`, out of `folder` (default: the user's cache)
    where one made of the same documents by the same settings is there.

    Raises ConfigError("vocab_size: why").
    """
    import sentencepiece

    made_of = hashlib.sha256(
        repr((sentencepiece.__version__, sorted(_OPTIONS.items()), SAMPLE_BYTES)).encode()
    )
    for documents in sources:
        made_of.update(documents.digests.tobytes())
    folder = cache_folder() if folder is None else folder
    path = folder / f"sp-{vocab_size}-{made_of.hexdigest()[:16]}.model"
    if path.is_file():
        log.info("tokenizer: %s, trained before on the same documents", path)
        return path
    log.info("tokenizer: training %d pieces", vocab_size)
    model = train(sample(sources), vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: another run may train the same one at this moment.
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(model)
    os.replace(file.name, path)
    log.info("tokenizer: %s", path)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Trains a tokenizer on files and writes it to --output."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--path", required=True, help="file, folder, glob or stdlib:")
    parser.add_argument("--format", default="auto")
    parser.add_argument("--text_field", default="")
    parser.add_argument("--separator", default="")
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--output", required=True, help="the .model file to write")
    args = parser.parse_args(argv)
    try:
        cfg = SourceConfig(args.path, args.format, args.text_field, args.separator)
        model = train(sample(read_documents({"--path": cfg})), args.vocab_size)
    except ConfigError as error:
        sys.exit(f"[pr2jax] {type(error).__name__}: {error}")
    Path(args.output).write_bytes(model)
    print(f"{args.output}: {len(model)} bytes")


if __name__ == "__main__":
    main()
