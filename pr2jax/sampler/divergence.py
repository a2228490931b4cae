"""How two rollouts of the same requests part: what another program shape does to sampling.

Within one (slots, read length) program a sequence is bit-identical; across programs, products of
other shapes round differently, and once two runs draw different tokens all that follows differs.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pr2jax.sampler.types import Rollout


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Rows that differ somewhere, of `rows`; `tokens` sampled in common before that.

    `rate` is the chance of a first difference at a token: diverged / (tokens + diverged).
    """

    rows: int
    diverged: int
    tokens: int

    @property
    def rate(self) -> float:
        """First divergences a token."""
        return self.diverged / max(self.tokens + self.diverged, 1)


def first_divergence(a: Rollout, b: Rollout) -> Divergence:
    """Compares two rollouts row by row. Raises ValueError unless they answer the same prompts."""
    if a.tokens.shape != b.tokens.shape or np.any(a.prompt_lengths != b.prompt_lengths):
        raise ValueError("the rollouts are not of the same requests")
    position = np.arange(a.tokens.shape[1])
    either = position < np.maximum(a.lengths, b.lengths)[:, None]
    both = position < np.minimum(a.lengths, b.lengths)[:, None]
    differ = either & ((a.tokens != b.tokens) | ~both)
    diverged = differ.any(axis=1)
    end = np.where(diverged, differ.argmax(axis=1), a.lengths)
    if np.any(end < a.prompt_lengths):
        raise ValueError("the rollouts are not of the same requests")
    common = np.sum(end - a.prompt_lengths)
    return Divergence(len(diverged), int(diverged.sum()), int(common))
