"""What `init_from` names, and what is in it: a run's checkpoints, or a published model."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from pr2jax.core.checkpoint import CheckpointError, read_checkpoint
from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.core.store import as_path
from pr2jax.data.tokenizer import TokenizerConfig, saved_tokenizer
from pr2jax.models.config import ModelConfig
from pr2jax.models.importers import hf
from pr2jax.models.upcycling import upcycled_config
from pr2jax.train.config import Config
from pr2jax.train.loop import CHECKPOINTS

TOKENIZER = "tokenizer"  # a run's folder of its tokenizer's files


def checkpoint_folder(path: str | os.PathLike) -> str:
    """The folder of checkpoints meant by `path`: a workdir, its last stage's, or the folder."""
    for candidate in (as_path(path) / CHECKPOINTS, as_path(path) / "rl" / CHECKPOINTS):
        if candidate.is_dir():
            return str(candidate)
    return str(path)


def is_imported(path: str) -> bool:
    """Whether `path` is a Hugging Face or imported folder rather than a run's."""
    return checkpoint_folder(path) == str(path) and hf.is_published(path)


def saved_config(folder: str) -> tuple[ModelConfig, TokenizerConfig]:
    """What a run's checkpoint is of. Raises CheckpointError where it does not say."""
    _, extra, _ = read_checkpoint(folder)
    if "config" not in extra:
        raise CheckpointError(f"{folder}: no configuration is saved in it")
    saved = extra["config"]
    return (
        from_config_dict(ModelConfig, saved["model"], "model"),
        from_config_dict(TokenizerConfig, saved["tokenizer"], "tokenizer"),
    )


def _travelled(tokenizer: TokenizerConfig, folder: str) -> TokenizerConfig:
    """`tokenizer` reading the copy that the run whose checkpoints are in `folder` kept."""
    for workdir in as_path(folder).parents[:2]:  # a stage's checkpoints lie one deeper
        own = saved_tokenizer(tokenizer, workdir / TOKENIZER)
        if own != tokenizer:
            return own
    return tokenizer


def model_of(source: str) -> ModelConfig:
    """The model saved in a folder. Raises CheckpointError, CheckpointFormatError."""
    if is_imported(source):
        return hf.read_model_config(source)
    return saved_config(checkpoint_folder(source))[0]


def like_checkpoint(cfg: Config) -> Config:
    """`cfg` with the model (and tokenizer, where it is known) of `init_from`, upcycled if told so.

    What says how to compute rather than what (kernels, rematerialisation, chunks), and whether
    there is a predictor, stays as configured. Raises CheckpointError, CheckpointFormatError, and
    ConfigError where that model does not fit the rest.
    """
    source, tokenizer = hf.resolve(cfg.init_from), cfg.tokenizer
    model = model_of(source)
    if not is_imported(source):
        folder = checkpoint_folder(source)
        tokenizer = _travelled(saved_config(folder)[1], folder)
    elif (tokenizer == TokenizerConfig() or tokenizer.untrained) and (
        Path(source) / "tokenizer.json"
    ).is_file():
        tokenizer = TokenizerConfig(kind="hf", path=source)
    if cfg.upcycle.experts:
        try:
            model = upcycled_config(model, cfg.upcycle)
        except ConfigError as error:
            raise ConfigError(f"upcycle.{error}") from None
    how = ("attention_impl", "remat", "scan_layers", "logprob_chunk")
    kept = {name: getattr(cfg.model, name) for name in how}
    if model.moe is not None and cfg.model.moe is not None:
        how = ("impl", "block_size", "predictor")
        own = {name: getattr(cfg.model.moe, name) for name in how}
        kept["moe"] = dataclasses.replace(model.moe, **own)
    found = dataclasses.replace(cfg, model=dataclasses.replace(model, **kept), tokenizer=tokenizer)
    found.validate()  # the rest was, with the model that is configured
    return found
