"""The files of a Hugging Face directory: headers first, then tensors one at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Kept beside imported parameters, for their tokenizer and for export.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class CheckpointFormatError(ValueError):
    """A checkpoint that cannot be read or written faithfully; the message names what and where."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A tensor of a checkpoint, by its header."""

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype


class Source(Protocol):
    """A published checkpoint, told in the names and shapes of Hugging Face."""

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        ...

    def inspect(self) -> dict[str, Found]:
        """Every tensor in it, by its header alone."""
        ...

    def stream(
        self, found: Mapping[str, Found], skip: set[str]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """All tensors but those to skip."""
        ...

    def check_tied(self, found: Mapping[str, Found]) -> None:
        """Raises CheckpointFormatError where a tied head that is stored is not the embedding."""
        ...

    def write_companions(self, dst: Path) -> None:
        """Writes config.json, the tokenizer's files and the like into `dst`."""
        ...


@dataclasses.dataclass(frozen=True)
class Folder:
    """A Hugging Face directory as a Source."""

    path: Path

    def config(self) -> dict[str, Any]:
        """config.json."""
        return read_json(self.path / "config.json")

    def inspect(self) -> dict[str, Found]:
        """As the function of this name."""
        return inspect(self.path)

    def stream(
        self, found: Mapping[str, Found], skip: set[str]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """As the function of this name."""
        return stream(self.path, found, skip)

    def check_tied(self, found: Mapping[str, Found]) -> None:
        """As the function of this name."""
        check_tied(self.path, found)

    def write_companions(self, dst: Path) -> None:
        """Copies what is there of COMPANIONS."""
        copy_companions(self.path, dst)


def inspect(src: Path) -> dict[str, Found]:
    """Every tensor in the files of `src`, from their headers alone."""
    index = None
    if (src / INDEX).exists():
        index = read_json(src / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise CheckpointFormatError(f"{src / INDEX}: no weight_map")
        files = sorted(set(index.values()))
    elif (src / SINGLE).exists():
        files = [SINGLE]
    else:
        raise CheckpointFormatError(f"{src}: neither {SINGLE} nor {INDEX}")
    found: dict[str, Found] = {}
    for file in files:
        with _open(src / file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                view = tensors.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    kinds = ", ".join(DTYPES)
                    raise CheckpointFormatError(
                        f"{src / file}: {name} is {view.get_dtype()}; supported are {kinds}"
                    )
                if name in found:
                    raise CheckpointFormatError(
                        f"{src}: {name} is in {found[name].file} and in {file}"
                    )
                kind = jnp.dtype(DTYPES[view.get_dtype()])
                found[name] = Found(file, tuple(view.get_shape()), kind)
    for name, file in (index or {}).items():
        if name not in found or found[name].file != file:
            raise CheckpointFormatError(f"{src / file}: has no {name}, which {INDEX} says it has")
    return found


def stream(
    src: Path, found: Mapping[str, Found], skip: set[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors, file by file."""
    for file in sorted({f.file for f in found.values()}):
        with _open(src / file) as tensors:
            for name in [n for n, f in found.items() if f.file == file and n not in skip]:
                yield name, tensors.get_tensor(name)


def check_tied(src: Path, found: Mapping[str, Found]) -> None:
    """A tied head that is stored must be the embedding, or tying it would change the model."""
    both = []
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        with _open(src / found[name].file) as tensors:
            both.append(tensors.get_tensor(name))
    if not np.array_equal(*both):
        raise CheckpointFormatError(
            f"{src}: tie_word_embeddings is true, and lm_head.weight is not the embedding"
        )


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except FileNotFoundError:
        raise CheckpointFormatError(f"{file} is missing") from None
    except SafetensorError as error:
        raise CheckpointFormatError(f"{file}: truncated or corrupt: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; CheckpointFormatError names a file that is missing or holds none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointFormatError(f"{file} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointFormatError(f"{file}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointFormatError(f"{file}: not a JSON object")
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object for people to read."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def drop_none(hf: Mapping[str, Any]) -> dict[str, Any]:
    """JSON null is how a config.json says that a key is absent."""
    return {k: v for k, v in hf.items() if v is not None}


def require(hf: Mapping[str, Any], key: str, value: Any) -> None:
    """Raises CheckpointFormatError where `key` is there and is not `value`."""
    if hf.get(key, value) != value:
        raise CheckpointFormatError(
            f"config.json: {key}={hf[key]!r} is not supported, {value!r} is"
        )


def require_empty(dst: Path) -> None:
    """Makes the folder `dst`; CheckpointFormatError where something is in it."""
    dst.mkdir(parents=True, exist_ok=True)
    if any(dst.iterdir()):
        raise CheckpointFormatError(f"{dst} is not empty")


def copy_companions(src: Path, dst: Path) -> None:
    """Copies what `src` has of COMPANIONS and `dst` has not."""
    for name in COMPANIONS:
        if (src / name).exists() and not (dst / name).exists():
            shutil.copyfile(src / name, dst / name)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when all went well: never half of it.

    Where another process was first, its folder stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=path.name + ".", dir=path.parent))
    try:
        yield partial
        with contextlib.suppress(FileExistsError, OSError):
            os.rename(partial, path)
        if not path.is_dir():
            raise CheckpointFormatError(f"{path}: cannot be made of {partial}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
