"""Pre-training: the next token of documents, over a weighted mixture of sources."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from typing import Any

import jax
import numpy as np

from pr2jax.core import goodput, hosts
from pr2jax.core.config import ConfigError
from pr2jax.core.hardware import needed_bytes, peak_flops
from pr2jax.core.optim import build_optimizer
from pr2jax.core.params import init_params
from pr2jax.core.state import TrainState, create
from pr2jax.data import training
from pr2jax.data.documents import Documents, read_documents, split
from pr2jax.data.held_out import HeldOut, held_out_rows
from pr2jax.data.packing import PackedRows
from pr2jax.data.stream import Piece, RowStream
from pr2jax.evaluation.passk import Interval, ratio_interval
from pr2jax.models.flops import training_flops
from pr2jax.train.config import Config, PretrainConfig
from pr2jax.train.session import Session
from pr2jax.train.streams import Streams
from pr2jax.train.supervised import make_packed_score, make_packed_step, place_rows

log = logging.getLogger("pr2jax")


@dataclasses.dataclass(frozen=True)
class PretrainData:
    """Documents of every source, to train on and held out, in the order of the configuration."""

    train: list[Documents]
    held_out: list[Documents]
    weights: list[float]

    def fingerprint(self) -> str:
        """Of every document and its place: what a stream's position refers to."""
        return "-".join(d.fingerprint() for d in (*self.train, *self.held_out))

    def counts(self) -> dict[str, dict[str, int]]:
        """For each source: documents to train on, held out, left out as empty; bytes."""
        return {
            t.name: {
                "train": len(t),
                "held_out": len(h),
                "empty": t.empty,
                "bytes": t.bytes,
            }
            for t, h in zip(self.train, self.held_out, strict=True)
        }


def read_data(cfg: PretrainConfig) -> PretrainData:
    """Reads every source through and holds documents out.

    Raises ConfigError("pretrain.data.NAME..."), for a malformed document with its place.
    """
    try:
        halves = [split(documents, cfg.held_out) for documents in read_documents(cfg.data)]
    except ConfigError as error:
        raise ConfigError(f"pretrain.data.{error}") from None
    data = PretrainData(
        [train for train, _ in halves],
        [held_out for _, held_out in halves],
        [source.weight for source in cfg.data.values()],
    )
    for name, count in data.counts().items():
        log.info(
            "%s (%s): %d documents, %.2f MB; %d held out, %d empty ones left out",
            name,
            cfg.data[name].path,
            count["train"] + count["held_out"],
            count["bytes"] / 1e6,
            count["held_out"],
            count["empty"],
        )
    return data


def with_trained_tokenizer(cfg: Config, data: PretrainData) -> Config:
    """`cfg` with the tokenizer trained on the training documents, where it asks for that."""
    if not cfg.tokenizer.untrained or cfg.init_from:
        return cfg
    try:
        path = training.trained(data.train, cfg.tokenizer.vocab_size)
    except ConfigError as error:
        raise ConfigError(f"tokenizer.{error}") from None
    tokenizer = dataclasses.replace(cfg.tokenizer, path=str(path), vocab_size=0)
    return dataclasses.replace(cfg, tokenizer=tokenizer)


class PretrainTrainer:
    """Pre-training as the loop sees it. The stream's position is its memory; batch `index` is a
    function of documents, seed and the number of parts that the documents are dealt into."""

    def __init__(self, session: Session, data: PretrainData, name: str = "pretrain"):
        cfg = session.cfg.pretrain
        self.name, self.steps, self.eval_every = name, cfg.steps, cfg.eval_every
        self.max_skipped_in_row = cfg.max_skipped_in_row
        self.console = ("loss", "eval/loss", "tokens_per_second", "learning_rate")
        self.session, self.data = session, data
        self.scored_rows = cfg.batch // cfg.accumulate  # what the devices hold at a time
        own = hosts.own_rows(session.mesh, cfg.batch)
        try:
            self.stream = Streams(self._part, cfg.batch, own, cfg.parts or jax.process_count())
            self.held_out = self._held_out()
        except ValueError as error:
            told = str(error)
            key = "pretrain." if told.startswith("batch:") else "pretrain.data."
            raise ConfigError(f"{key}{told}") from None
        self.optimizer = build_optimizer(cfg.optim, session.specs)
        model, dtype, mesh = session.cfg.model, session.dtype, session.mesh
        self._step = make_packed_step(
            model, cfg, self.optimizer, dtype=dtype, mesh=mesh, accumulate=cfg.accumulate
        )
        self._score = make_packed_score(model, dtype=dtype, mesh=mesh)
        self._pieces: list[list[Piece]] | None = None
        context = (cfg.row_length + 1) / 2
        self._flops, _ = training_flops(model, cfg.batch * cfg.row_length, context)
        self._peak = peak_flops() * jax.device_count()

    def _part(self, part: int, parts: int, rows: int) -> RowStream:
        cfg = self.session.cfg.pretrain
        return RowStream(
            self.data.train,
            self.data.weights,
            self.session.tokenizer,
            row_length=cfg.row_length,
            batch=rows,
            seed=self.session.cfg.seed,
            shard=(part, parts),
        )

    def counts(self) -> dict[str, dict[str, int]]:
        """Documents, bytes, and what the held-out figures are over, by source."""
        scored = {
            part.name: {
                "scored_documents": part.documents,
                "scored_bytes": part.bytes,
                "scored_tokens": int(part.rows.loss_mask.sum()),
            }
            for part in self.held_out
        }
        return {name: count | scored[name] for name, count in self.data.counts().items()}

    def _held_out(self) -> list[HeldOut]:
        cfg, shares = self.session.cfg.pretrain, np.array(self.data.weights)
        limits = np.maximum(np.ceil(cfg.eval_rows * shares / shares.sum()), 1).astype(int).tolist()
        make = functools.partial(
            held_out_rows, tokenizer=self.session.tokenizer, row_length=cfg.row_length
        )
        pairs = zip(self.data.held_out, limits, strict=True)
        return [make(documents, limit=limit) for documents, limit in pairs]

    def initial_state(self, params) -> TrainState:
        """A state around `params` at step 0."""
        return create(params, self.optimizer)

    def measure(self, steps: int) -> dict[str, float | int]:
        """What a step of random parameters on random tokens takes: `step_seconds` (median of
        `steps` after one that compiles) and `memory_bytes` a device, by the compiler."""
        session, cfg = self.session, self.session.cfg
        rows, length = len(self.stream.rows), cfg.pretrain.row_length
        shape = (rows, length)
        values = {
            "tokens": np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape),
            "positions": np.broadcast_to(np.arange(length), shape),
            "segment_ids": np.ones(shape),
            "loss_mask": np.ones(shape),
        }
        # Of the very types of real rows: the run's first step is to find this program.
        types = {name: field.dtype for name, field in self.held_out[0].rows._asdict().items()}
        fields = {name: values[name].astype(kind) for name, kind in types.items()}
        batch = self._place(PackedRows(**fields))
        params = init_params(session.specs, session.key("measure"), session.shardings)
        state = jax.block_until_ready(self.initial_state(params))
        del params
        memory = needed_bytes(self._step.lower(state, batch).compile())
        seconds = []
        for _ in range(steps + 1):
            start = time.monotonic()
            state, _ = jax.block_until_ready(self._step(state, batch))
            seconds.append(time.monotonic() - start)
        return {"step_seconds": float(np.median(seconds[1:])), "memory_bytes": memory}

    def step(self, state: TrainState, index: int) -> tuple[TrainState, dict[str, Any]]:
        """One optimizer step, on the stream's next batch."""
        if index == 0 and self.stream.position:
            self.stream.restart()
        if index != self.stream.position:
            raise RuntimeError(f"step {index}, but the stream stands at {self.stream.position}")
        start = time.monotonic()
        with goodput.during("data"):
            own, self._pieces = next(self.stream)
        waited = time.monotonic() - start
        state, metrics = self._step(state, self._place(own))
        # The stream reads ahead in threads of its own: waiting here keeps no data waiting.
        jax.block_until_ready(state.step)
        seconds = time.monotonic() - start
        cfg = self.session.cfg.pretrain
        rows, pieces = cfg.batch, self._pieces
        metrics |= {
            "tokens_per_second": (cfg.batch * cfg.row_length, seconds),
            "time/data": (waited, 1.0),
            "model_flops_per_second": (self._flops, seconds),
            "documents_per_row": (sum(len(row) for row in pieces), rows),
            "cut_per_row": (sum(piece.start > 0 for row in pieces for piece in row), rows),
        }
        if self._peak:
            metrics["mfu"] = (self._flops / self._peak, seconds)
        if len(self.data.train) > 1:
            for documents in self.data.train:
                own = sum(row[0].source == documents.name for row in pieces)
                metrics[f"share/{documents.name}"] = (own, rows)
        return state, metrics

    def _place(self, rows: hosts.OwnHost[PackedRows]) -> hosts.Global[PackedRows]:
        """This host's rows of a training batch, on the devices."""
        total, first = self.session.cfg.pretrain.batch, self.stream.rows.start
        return place_rows(rows, self.session.mesh, total, first)

    def consumed(self, index: int) -> list[str]:
        """What step `index`, the last one, learned from: "SOURCE/EPOCH/DOCUMENT:
        START-STOP" in tokens, a segment each. Documents count within the training ones."""
        if self._pieces is None or self.stream.position != index + 1:
            raise RuntimeError(f"step {index} is not the last one")
        return [str(piece) for row in self._pieces for piece in row]

    def evaluate(self, state: TrainState, index: int) -> dict[str, float]:
        """Held-out "eval/loss" (nats a token), "eval/bits_per_byte"; by source if several."""
        found = {f"eval/{key}": value.mean for key, value in self.full(state.params).items()}
        shown = ", ".join(f"{key[5:]} {value:.4f}" for key, value in found.items())
        log.info("step %d, held out: %s", index, shown)
        return found

    def full(self, params) -> dict[str, Interval]:
        """Held-out figures with bootstrap intervals over rows: loss (nats a token, end tokens
        among them), bits_per_byte; with several sources also SOURCE/loss and so on."""
        nats, counts, sizes, figures = [], [], [], {}
        for part in self.held_out:
            scores = [self._score_rows(params, part.rows, i) for i in self._starts(part.rows)]
            pairs = zip(*scores, strict=True)
            own_nats, own_counts = (np.concatenate(x)[: len(part.rows.tokens)] for x in pairs)
            # Bytes go to rows by their targets: exact in sum, which is what the figure is.
            own_sizes = own_counts * (part.bytes / own_counts.sum())
            if len(self.held_out) > 1:
                figures |= _figures(f"{part.name}/", own_nats, own_counts, own_sizes)
            nats.append(own_nats)
            counts.append(own_counts)
            sizes.append(own_sizes)
        return _figures("", *(np.concatenate(x) for x in (nats, counts, sizes))) | figures

    def _starts(self, rows: PackedRows) -> range:
        return range(0, len(rows.tokens), self.scored_rows)

    def _score_rows(self, params, rows: PackedRows, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(nats, targets) of `scored_rows` rows from `start`; those after the last count 0."""
        size, mesh = self.scored_rows, self.session.mesh
        own = hosts.own_rows(mesh, size)
        part = PackedRows(*(field[start + own.start : start + own.stop] for field in rows))
        missing = len(own) - len(part.tokens)
        part = PackedRows(*(np.pad(field, ((0, missing), (0, 0))) for field in part))
        return jax.device_get(self._score(params, place_rows(part, mesh, size, own.start)))

    def memory(self) -> dict[str, Any]:
        """Where each part's stream stands, and in which documents."""
        return {"streams": self.stream.state(), "documents": self.data.fingerprint()}

    def remember(self, memory: dict[str, Any]) -> None:
        """Raises ConfigError where the documents are not those of the run."""
        if memory["documents"] != self.data.fingerprint():
            raise ConfigError(
                "pretrain.data: the documents are not those that the checkpoint was trained on; "
                "a run in a new workdir with --config.init_from goes on from its parameters"
            )
        try:
            self.stream.restore(memory["streams"])
        except ConfigError as error:
            raise ConfigError(f"pretrain.{error}") from None


def _figures(prefix: str, nats, counts, sizes) -> dict[str, Interval]:
    return {
        f"{prefix}loss": ratio_interval(nats, counts),
        f"{prefix}bits_per_byte": ratio_interval(nats / math.log(2.0), sizes),
    }
