"""What the sampler takes and what it returns.

Conventions, shared with the replay and rl rooms:

* Rows are left-aligned; masks come from `lengths`, never from pad ids.
* `behavior_logprobs[b, t]` is the log-probability of `tokens[b, t]` under the distribution it was
  drawn from, given the tokens before it.
* `routes[:, b, t]` are the experts that processed *input* token t. The last sampled token of a row
  (index `lengths - 1`) was never an input, so routes are valid for t < lengths - 1; other places
  hold the filler 0..K-1.
* The predictor and the diagnostics look at input positions t whose *target* t + 1 was sampled.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from flax import struct
from jaxtyping import Float, Int

from pr2jax.core.config import ConfigError
from pr2jax.core.hosts import EveryHost

# Values of `Rollout.finish`.
FINISH_LENGTH = 0
FINISH_STOP = 1


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
      temperature: divides the logits before anything else; > 0 (use `greedy` for the argmax).
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set whose probability reaches top_p; 1.0 keeps all.
      min_p: keep tokens with at least min_p times the largest probability; 0.0 keeps all.
      greedy: take the argmax; log-probabilities stay those of the distribution above.
      max_tokens: most tokens sampled for one request.
      stop_ids: token ids that end a response (the id itself is part of the response).
      stop_strings: strings whose appearance in the decoded response ends it.
      seed: folded into the key of every request.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    greedy: bool = False
    max_tokens: int = 64
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0

    @property
    def truncated(self) -> bool:
        """Whether some tokens of the vocabulary can never be drawn."""
        return self.greedy or self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        if self.temperature <= 0:
            raise ConfigError(f"temperature: must be > 0, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k: must be >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise ConfigError(f"min_p: must be in [0, 1), got {self.min_p}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens: must be >= 1, got {self.max_tokens}")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """The sampler's fixed shapes: few programs, compiled once.

    Attributes:
      slots: rows decoded together; the batch dimension of the decode program, never shrunk.
      chunk: decode steps a `while_loop` call makes before finished rows are replaced.
      max_prompt: longest prompt (tokens).
      max_tokens: most tokens sampled for one request; the cache holds max_prompt + max_tokens.
      bucket: shortest length that attention reads from the cache (and that a prompt is padded
        to); longer ones are 2, 3, 4, 6, 8, 12, ... times it, a program each. Reading is what
        decode costs on CPU beside the experts, so short sequences want a small bucket.
      prefill_rows: rows of the prefill program (rounded up to a multiple of the data shards).
      unroll_layers: unroll the layers in decode instead of scanning them.
    """

    slots: int = 32
    chunk: int = 16
    max_prompt: int = 64
    max_tokens: int = 64
    bucket: int = 64
    prefill_rows: int = 8
    unroll_layers: bool = True

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        for name in ("slots", "chunk", "max_prompt", "max_tokens", "bucket", "prefill_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be >= 1, got {getattr(self, name)}")


@struct.dataclass
class Rollout:
    """A batch of sampled sequences with all that a learner needs; host numpy throughout.

    Attributes:
      tokens: prompt and response, left-aligned.
      prompt_lengths: tokens of the prompt.
      lengths: tokens of prompt and response together.
      loss_mask: 1 on sampled tokens.
      behavior_logprobs: log-probability of tokens[t] where it was sampled, else 0.
      routes: expert ids (uint8, or uint16 beyond 256 experts); None for a dense model.
      prompt_ids: which prompt of the data set.
      group_ids: rows of one group answer the same prompt of this batch.
      policy_version: version of the policy that sampled each token; -1 on the prompt.
      finish: FINISH_LENGTH or FINISH_STOP.
      rewards: score of the response in [0, 1]; 0 until scored.
      bonus: what named reward terms add to the score (format, length); None without any.
      reasons: the verifier's reason, a row each; empty until scored.
      sampling: how the tokens were drawn.
    """

    tokens: EveryHost[Int[np.ndarray, "B T"]]
    prompt_lengths: EveryHost[Int[np.ndarray, " B"]]
    lengths: EveryHost[Int[np.ndarray, " B"]]
    loss_mask: EveryHost[Float[np.ndarray, "B T"]]
    behavior_logprobs: EveryHost[Float[np.ndarray, "B T"]]
    routes: EveryHost[Int[np.ndarray, "L B T K"]] | None
    prompt_ids: EveryHost[Int[np.ndarray, " B"]]
    group_ids: EveryHost[Int[np.ndarray, " B"]]
    policy_version: EveryHost[Int[np.ndarray, "B T"]]
    finish: EveryHost[Int[np.ndarray, " B"]]
    rewards: EveryHost[Float[np.ndarray, " B"]]
    bonus: EveryHost[Float[np.ndarray, " B"]] | None = None
    reasons: tuple[str, ...] = struct.field(pytree_node=False, default=())
    sampling: SamplingParams = struct.field(pytree_node=False, default=SamplingParams())
