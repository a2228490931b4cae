"""The in-process sampler: fixed slots, each distinct prompt prefilled once, chunked decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from pr2jax.core.config import ConfigError
from pr2jax.core.rng import named, root
from pr2jax.core.sharding import BATCH_AXES, batch_shards
from pr2jax.data.tokenizer import encode_prompt
from pr2jax.models.config import ModelConfig, num_moe_layers
from pr2jax.models.predictor import RouterFeatures
from pr2jax.sampler.decode import Slots
from pr2jax.sampler.programs import Programs
from pr2jax.sampler.schedule import Request, Run
from pr2jax.sampler.types import FINISH_STOP, Rollout, SamplerConfig, SamplingParams


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled response: `tokens` with their log-probs; `finish` is "stop" or "length".

    `text` leaves out the stop id that ended it; a stop string stays in.
    """

    text: str | None
    tokens: list[int]
    logprobs: list[float]
    finish: str


class Sampler:
    """Samples from a policy with the learner's own forward.

    The decode batch has `config.slots` rows whatever the request; its cache is allocated once
    and updated in place. Requests are ordered by their prompt's length bucket; each distinct
    prompt is prefilled once, `prefill_rows` at a time, and fans out on the device. Between chunks
    of `config.chunk` steps only (length, active, stopped) travel to the host, and waiting
    requests take the places of finished ones.

    Within one compiled program (same slots, same read length) a sequence does not depend, to
    the bit, on its slot or its companions. Across programs rounding differs: over 16,384 tokens
    of a random 4-layer policy, 64 slots instead of 128 changed no sequence of 256 in fp32, and
    in bf16 14 of them diverged somewhere.

    Attributes:
      stats: running counts: `prefills` (calls), `prefill_rows` (distinct prompts prefilled),
        `fan_outs`, `decode_chunks`, `decode_steps`, `requests`, `tokens` (sampled), `programs`
        (compiled so far).
    """

    def __init__(
        self,
        model_cfg: ModelConfig,
        config: SamplerConfig,
        *,
        tokenizer=None,
        params=None,
        dtype=jnp.float32,
        mesh: Mesh | None = None,
    ):
        """Raises ConfigError for a bad `config`, or slots that the mesh does not divide."""
        config.validate()
        if mesh is not None and config.slots % batch_shards(mesh):
            raise ConfigError(
                f"slots: {config.slots} rows are not divided by the mesh's "
                f"{' x '.join(BATCH_AXES)} = {batch_shards(mesh)} devices"
            )
        self.model_cfg, self.config = model_cfg, config
        self.tokenizer, self.params = tokenizer, params
        self.programs = Programs(model_cfg, config, dtype, mesh)
        self.stats = self.programs.stats
        self._state: Slots | None = None

    def rollout(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: SamplingParams,
        *,
        params=None,
        key: Key[Array, ""],
        request_offset: int = 0,
        policy_version: int = 0,
        shift: Float[Array, "L D E"] | None = None,
        feature_tokens: int = 0,
    ) -> tuple[Rollout, RouterFeatures | None]:
        """Samples `n` responses to each prompt.

        Args:
          prompts: token ids; equal prompts share one prefill.
          n: responses a prompt.
          sampling: how to draw; without stop ids, the tokenizer's end-of-sequence id stops.
          params: the policy (default: the constructor's).
          key: a key of `core.rng.root`. Row i is request `request_offset + i`, and its token at
            position t is drawn with named(key, sampling.seed, request, t).
          policy_version: recorded for each sampled token.
          shift: added to the routers' selection logits (PR2, lookahead), prompt included.
          feature_tokens: T_c, most positions a response whose router features are kept (0: none);
            a reservoir seeded by the request id (`predictor.reservoir_slot`) over the decode
            inputs, counted from the prompt's end. A stop string is found between chunks only, so
            a response that one ended may keep fewer.

        Returns:
          rows group-major (prompt 0's n responses first), T = max_prompt + max_tokens of the
          config; and the features, on the device, C = min(feature_tokens, sampling.max_tokens).

        Raises:
          ValueError: no prompts, n < 1, an empty or too long prompt, a token or stop id outside
            the vocabulary, more tokens than the sampler has room for, stop strings without a
            tokenizer, features of a dense model, a key of another kind.
        """
        base = np.asarray(jax.random.key_data(named(key, sampling.seed)))
        if base.shape != (2,):
            raise ValueError("key: must be a threefry key, as core.rng.root makes them")
        return self._sample(
            prompts,
            n,
            sampling,
            params=params,
            base_keys=[base] * len(prompts),
            ids=range(request_offset, request_offset + len(prompts) * n),
            policy_version=policy_version,
            shift=shift,
            feature_tokens=feature_tokens,
        )

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingParams | None = None,
        n: int = 1,
        params=None,
        seeds: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """`n` completions of each prompt (text, or token ids).

        `seeds` gives each prompt a seed of its own, with which its completions repeat in any
        batch; else `sampling.seed` serves all. Raises ValueError as `rollout` does, and for text
        without a tokenizer.
        """
        sampling = (
            SamplingParams(max_tokens=self.config.max_tokens) if sampling is None else sampling
        )
        if any(isinstance(p, str) for p in prompts):
            if self.tokenizer is None:
                raise ValueError("prompts: text needs a sampler with a tokenizer; pass token ids")
            prompts = [
                encode_prompt(self.tokenizer, p) if isinstance(p, str) else p for p in prompts
            ]
        if seeds is not None and len(seeds) != len(prompts):
            raise ValueError(f"seeds: {len(seeds)} for {len(prompts)} prompts")
        rows = len(prompts) * n
        each = [sampling.seed] * len(prompts) if seeds is None else seeds
        made = {s: np.asarray(jax.random.key_data(named(root(0), s))) for s in set(each)}
        rollout, _ = self._sample(
            prompts,
            n,
            sampling,
            params=params,
            base_keys=[made[s] for s in each],
            ids=range(rows) if seeds is None else [i % n for i in range(rows)],
        )
        done = [self._completion(rollout, i) for i in range(rows)]
        return [done[i : i + n] for i in range(0, rows, n)]

    def _completion(self, rollout: Rollout, row: int) -> Completion:
        span = slice(rollout.prompt_lengths[row], rollout.lengths[row])
        tokens = rollout.tokens[row, span].tolist()
        text = None
        if self.tokenizer is not None:
            ended = rollout.finish[row] == FINISH_STOP and tokens[-1] in rollout.sampling.stop_ids
            text = self.tokenizer.decode(tokens[:-1] if ended else tokens)
        return Completion(
            text=text,
            tokens=tokens,
            logprobs=rollout.behavior_logprobs[row, span].tolist(),
            finish="stop" if rollout.finish[row] == FINISH_STOP else "length",
        )

    def _check(self, prompts, n: int, sampling: SamplingParams, feature_tokens: int) -> None:
        sampling.validate()
        vocab = self.model_cfg.vocab_size
        if sampling.max_tokens > self.config.max_tokens:
            raise ConfigError(
                f"max_tokens: {sampling.max_tokens} tokens asked, the sampler has room for "
                f"max_tokens={self.config.max_tokens}"
            )
        for stop in sampling.stop_ids:
            if not 0 <= stop < vocab:
                raise ConfigError(f"stop_ids: {stop} is not in the vocabulary of {vocab}")
        if sampling.stop_strings and self.tokenizer is None:
            raise ConfigError("stop_strings: need a sampler with a tokenizer")
        if "" in sampling.stop_strings:
            raise ConfigError("stop_strings: an empty string stops everything")
        if not len(prompts):
            raise ValueError("prompts: none given")
        if n < 1:
            raise ValueError(f"n: need at least 1 response a prompt, got {n}")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompts[{i}] is empty")
            if len(prompt) > self.config.max_prompt:
                raise ValueError(
                    f"prompts[{i}] has {len(prompt)} tokens; the sampler has room for "
                    f"max_prompt={self.config.max_prompt}"
                )
            bad = next((t for t in prompt if not 0 <= t < vocab), None)
            if bad is not None:
                raise ValueError(f"prompts[{i}]: token {bad} is not in the vocabulary of {vocab}")
        if feature_tokens and not num_moe_layers(self.model_cfg):
            raise ValueError("feature_tokens: a dense model has no router features")

    def _sample(
        self,
        prompts,
        n: int,
        sampling: SamplingParams,
        *,
        params,
        base_keys: list[np.ndarray],
        ids: Sequence[int],
        policy_version: int = 0,
        shift=None,
        feature_tokens: int = 0,
    ) -> tuple[Rollout, RouterFeatures | None]:
        if not sampling.stop_ids and self.tokenizer is not None:
            sampling = dataclasses.replace(sampling, stop_ids=(int(self.tokenizer.eos_id),))
        self._check(prompts, n, sampling, feature_tokens)
        params = self.params if params is None else params
        if params is None:
            raise ValueError("params: give them to the sampler or to the call")
        prompts = [tuple(int(t) for t in p) for p in prompts]
        distinct = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
        requests = [
            Request(row, ids[row], distinct[prompts[row // n]], base_keys[row // n])
            for row in range(len(prompts) * n)
        ]
        params = self.programs.prepare(params)
        run = Run(self.programs, params, sampling, list(distinct), requests, shift)
        # The state is donated: should a program be interrupted, the next call starts a new one.
        state, self._state = self._state, None
        self._state, features = run.run(state, feature_tokens, self.tokenizer)
        self.stats["requests"] += len(requests)
        self.stats["tokens"] += int(np.sum(run.lengths - run.prompt_lengths))
        position = np.arange(self.programs.capacity)
        sampled = (position >= run.prompt_lengths[:, None]) & (position < run.lengths[:, None])
        group = np.repeat(np.arange(len(prompts), dtype=np.int32), n)
        rollout = Rollout(
            tokens=run.tokens,
            prompt_lengths=run.prompt_lengths,
            lengths=run.lengths,
            loss_mask=sampled.astype(np.float32),
            behavior_logprobs=np.where(sampled, run.logprobs, np.float32(0)),
            routes=run.routes,
            prompt_ids=group,
            group_ids=group.copy(),
            policy_version=np.where(sampled, np.int32(policy_version), np.int32(-1)),
            finish=run.ends,
            rewards=np.zeros(len(requests), np.float32),
            sampling=sampling,
        )
        return rollout, features
