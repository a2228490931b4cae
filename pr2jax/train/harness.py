"""What lm-evaluation-harness asks of a model, on this project's forward and sampler.

Nothing here imports `lm_eval`; `train/lm_eval.py` registers it there.
"""

from __future__ import annotations

import functools
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pr2jax.core.params import Tree
from pr2jax.core.sharding import batch_shards
from pr2jax.data.tokenizer import encode_prompt
from pr2jax.evaluation.suites import EvaluationConfig
from pr2jax.models import logprobs
from pr2jax.models.config import ModelConfig
from pr2jax.models.transformer import forward
from pr2jax.sampler.engine import Sampler
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from pr2jax.train.config import Config
from pr2jax.train.session import Session, open_session

log = logging.getLogger("pr2jax")

# A conversation travels through the harness, which knows texts only, as JSON between these.
_CHAT, _END = "\x00chat ", "\x00"
_BUCKET = 64
# Keys of `gen_kwargs` that are read, under all the names that the harness knows.
_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = {"until", "do_sample", "temperature", "top_p", "top_k", "min_p", "seed", *_MOST}

Window = tuple[list[int], list[int]]


@functools.partial(jax.jit, static_argnames=("cfg", "dtype", "mesh"))
def score_tokens(
    params: Tree,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    cfg: ModelConfig,
    dtype: Any = jnp.float32,
    mesh: Any = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """(log p(targets[b, t] | tokens[b, :t+1]) in fp32, whether that target is the likeliest).

    Places at `lengths` and beyond hold what they like. Logits live for cfg.logprob_chunk tokens.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    inside = (positions < lengths[:, None]).astype(jnp.int32)
    out = forward(params, tokens, positions, inside, cfg=cfg, dtype=dtype, mesh=mesh)
    size = min(cfg.logprob_chunk, targets.size)
    pad = -targets.size % size
    hidden = jnp.pad(out.hidden.reshape(targets.size, -1), ((0, pad), (0, 0)))
    wanted = jnp.pad(targets.reshape(-1), (0, pad))

    def one(args):
        scores = logprobs.logits(params, args[0], cfg)
        chosen = jnp.take_along_axis(scores, args[1][:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(scores, axis=1), jnp.argmax(scores, axis=1) == args[1]

    found = lax.map(one, (hidden.reshape(-1, size, hidden.shape[1]), wanted.reshape(-1, size)))
    logp, best = (a.reshape(-1)[: targets.size].reshape(targets.shape) for a in found)
    return logp, best


def rolling_windows(tokens: Sequence[int], first: int, size: int) -> Iterator[Window]:
    """(context, predicted) pairs in which every token is predicted once, from `size` inputs.

    The first window's context is `first` alone; the last one has as much context as fits.
    """
    for start in range(0, len(tokens), size):
        end = min(start + size, len(tokens))
        begin = max(end - size - 1, -1)  # -1 stands for `first`
        context = list(tokens[max(begin, 0) : start])
        yield ([first, *context] if begin < 0 else context), list(tokens[start:end])


class HarnessModel:
    """A checkpoint as lm-evaluation-harness sees a model.

    session: of the checkpoint. params: its parameters. max_length: longest input in tokens;
    longer contexts lose their beginning (`cut` counts them). max_gen_toks: tokens generated where
    a request does not say. batch_size: rows scored together. slots: rows decoded together.
    """

    def __init__(
        self,
        session: Session,
        params: Tree,
        *,
        max_length: int = 2048,
        max_gen_toks: int = 256,
        batch_size: int = 8,
        slots: int = 32,
    ):
        shards = 1 if session.mesh is None else batch_shards(session.mesh)
        for name, value in (("batch_size", batch_size), ("slots", slots)):
            if value < 1 or value % shards:
                raise ValueError(f"{name}: {value} rows for {shards} devices")
        if not 0 < max_gen_toks < max_length:
            raise ValueError(f"max_gen_toks: {max_gen_toks} of max_length={max_length}")
        self.session, self.params = session, params
        self.max_length, self.max_gen_toks = max_length, max_gen_toks
        self.batch_size, self.slots = batch_size, slots
        self.cut = 0
        self._sampler: Sampler | None = None

    # ------------------------------------------------------------------ tokens

    @property
    def first_id(self) -> int:
        """What stands before a text: the tokenizer's first token, else its end token."""
        bos = self.session.tokenizer.bos_id
        return self.session.tokenizer.eos_id if bos is None else bos

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as a text that `encode` knows; its control tokens are set there.

        Raises ValueError where the tokenizer has no chat template, and for an answer that is to
        be continued (add_generation_prompt=False).
        """
        if self.session.tokenizer.chat is None:
            raise ValueError("the checkpoint's tokenizer has no chat template")
        if not add_generation_prompt:
            raise ValueError("a started answer cannot be continued: drop the task's gen_prefix")
        return f"{_CHAT}{json.dumps([dict(m) for m in messages])}{_END}"

    def encode(self, text: str) -> list[int]:
        """Ids of a context: a text after the model's first token, or a conversation."""
        tokenizer = self.session.tokenizer
        if text.startswith(_CHAT):
            body, _, rest = text.removeprefix(_CHAT).partition(_END)
            return encode_prompt(tokenizer, json.loads(body)) + tokenizer.encode(rest)
        return encode_prompt(tokenizer, text) if text else [self.first_id]

    def encode_pair(self, context: str, continuation: str) -> Window:
        """(context ids, continuation ids): as the whole is tokenized, split where the context ends.

        Spaces at the context's end go to the continuation, where tokenizers want them.
        """
        if context.startswith(_CHAT) or not context:
            return self.encode(context), self.session.tokenizer.encode(continuation)
        bare = context.rstrip()
        if bare:  # else a context of spaces stays one
            context, continuation = bare, context[len(bare) :] + continuation
        whole, before = self.encode(context + continuation), self.encode(context)
        return before, whole[len(before) :]

    # ----------------------------------------------------------------- scoring

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, whether greedy decoding would give it), each.

        Raises ValueError for a continuation longer than max_length.
        """
        windows = [self.encode_pair(context, continuation) for context, continuation in pairs]
        return self.score_windows(windows)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """log p(text) in nats of each, in windows of max_length tokens (`rolling_windows`)."""
        windows, owners = [], []
        for i, text in enumerate(texts):
            ids = self.session.tokenizer.encode(text)
            for window in rolling_windows(ids, self.first_id, self.max_length):
                windows.append(window)
                owners.append(i)
        total = np.zeros(len(texts))
        for i, (value, _) in zip(owners, self.score_windows(windows), strict=True):
            total[i] += value
        return total.tolist()

    def score_windows(self, windows: Sequence[Window]) -> list[tuple[float, bool]]:
        """(log p(predicted | context), whether all of it is likeliest) of token id pairs."""
        rows = []
        for context, predicted in windows:
            if not context or len(predicted) > self.max_length:
                raise ValueError(
                    f"{len(predicted)} tokens after {len(context)}: at least one before, and at "
                    f"most max_length={self.max_length} to score"
                )
            row = [*context, *predicted]
            self.cut += len(row) > self.max_length + 1
            rows.append(row[-self.max_length - 1 :])
        out: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        for start in range(0, len(rows), self.batch_size):
            chosen = order[start : start + self.batch_size]
            logp, best = self._scores([rows[i] for i in chosen])
            for b, i in enumerate(chosen):
                span = slice(len(rows[i]) - 1 - len(windows[i][1]), len(rows[i]) - 1)
                out[i] = (float(logp[b, span].astype(np.float64).sum()), bool(best[b, span].all()))
        return out

    def _scores(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        width = _BUCKET
        while width < max(map(len, rows)) - 1:
            width *= 2
        tokens = np.zeros((self.batch_size, width + 1), np.int32)
        lengths = np.ones(self.batch_size, np.int32)
        for b, row in enumerate(rows):
            tokens[b, : len(row)], lengths[b] = row, len(row) - 1
        found = score_tokens(
            self.params,
            tokens[:, :-1],
            tokens[:, 1:],
            lengths,
            cfg=self.session.cfg.model,
            dtype=self.session.dtype,
            mesh=self.session.mesh,
        )
        return tuple(np.asarray(a) for a in jax.device_get(found))

    # -------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What follows each context, up to the first of its `until` texts.

        Greedy unless a request says do_sample (or a temperature). Raises ValueError for a key
        that is not known.
        """
        out = [""] * len(requests)
        groups: dict[SamplingParams, list[int]] = {}
        for i, (_, wanted) in enumerate(requests):
            groups.setdefault(self._sampling(wanted), []).append(i)
        for sampling, members in groups.items():
            room = self.max_length - sampling.max_tokens
            prompts = [self.encode(requests[i][0]) for i in members]
            self.cut += sum(len(p) > room for p in prompts)
            sampler = self._room_for(sampling.max_tokens)
            # Equal requests (a task's repeats) are to differ: each has a seed of its own.
            made = sampler.generate(
                [p[-room:] for p in prompts],
                sampling,
                params=self.params,
                seeds=[sampling.seed + i for i in members],
            )
            for i, [completion] in zip(members, made, strict=True):
                out[i] = _before(completion.text, sampling.stop_strings)
        return out

    def _sampling(self, wanted: Mapping[str, Any]) -> SamplingParams:
        odd = sorted(wanted.keys() - _KNOWN)
        if odd:
            raise ValueError(f"generation_kwargs: {odd[0]!r} is not among {sorted(_KNOWN)}")
        until = wanted.get("until") or ()
        until = (until,) if isinstance(until, str) else until
        temperature = float(wanted.get("temperature") or 0.0)
        sampled = wanted.get("do_sample", temperature > 0.0)
        if sampled and "temperature" not in wanted:
            temperature = 1.0
        most = next((wanted[key] for key in _MOST if wanted.get(key)), self.max_gen_toks)
        if not 0 < most < self.max_length:
            raise ValueError(f"max_gen_toks: {most} of max_length={self.max_length}")
        return SamplingParams(
            temperature=temperature if sampled and temperature > 0.0 else 1.0,
            greedy=not sampled or temperature == 0.0,
            top_p=float(wanted.get("top_p", 1.0)) if sampled else 1.0,
            top_k=max(int(wanted.get("top_k", 0)), 0) if sampled else 0,
            min_p=float(wanted.get("min_p", 0.0)) if sampled else 0.0,
            max_tokens=int(most),
            stop_strings=tuple(text for text in until if text),
            seed=int(wanted.get("seed", 0)),
        )

    def _room_for(self, tokens: int) -> Sampler:
        """A sampler for responses of so many tokens; made anew where the last one has less."""
        if self._sampler is None or self._sampler.config.max_tokens != tokens:
            config = SamplerConfig(
                slots=self.slots, max_prompt=self.max_length - tokens, max_tokens=tokens
            )
            session = self.session
            self._sampler = Sampler(
                session.cfg.model,
                config,
                tokenizer=session.tokenizer,
                dtype=session.dtype,
                mesh=session.mesh,
            )
        return self._sampler


def _before(text: str, until: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in until]
    return text[: min((e for e in ends if e >= 0), default=len(text))]


def open_model(checkpoint: str, *, dtype: str = "auto", **settings: int) -> HarnessModel:
    """A HarnessModel of what `init_from` takes; `settings` are its own.

    Raises ConfigError, CheckpointError, CheckpointFormatError, ValueError.
    """
    cfg = Config(
        mode="eval",
        compute_dtype=dtype,
        init_from=checkpoint,
        evaluation=EvaluationConfig(checkpoints=(checkpoint,), suites=("lm-evaluation-harness",)),
    )
    with tempfile.TemporaryDirectory(prefix="pr2jax_lm_eval_") as folder:
        session = open_session(cfg, folder)
        return HarnessModel(session, session.initial_params(), **settings)
