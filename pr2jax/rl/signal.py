"""What a scored rollout teaches: advantages, the rows and tokens to learn from, and their counts.

The verifier's score decides which groups carry a signal; what is added to it for format and length
only shapes the advantages.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from pr2jax.rl.advantages import group_advantages, overlong_penalty, zero_variance
from pr2jax.rl.types import RLConfig
from pr2jax.sampler.types import FINISH_LENGTH, Rollout


@dataclasses.dataclass(frozen=True)
class Signal:
    """Of the rows of a rollout.

    Attributes:
      advantages: one a row.
      keep: rows to learn from, whole groups.
      loss_mask: 1 on the tokens that enter the loss.
      metrics: of usable rows: `kept_groups`, share whose group has scores that differ; with
        overlong_buffer `overlong`, share of responses that reach into it, and
        `overlong_penalty`, mean of what is added to the score; with mask_truncated `truncated`,
        share of responses that are left out.
    """

    advantages: Float[np.ndarray, " B"]
    keep: Bool[np.ndarray, " B"]
    loss_mask: Float[np.ndarray, "B T"]
    metrics: dict[str, float]


def learning_signal(
    rollout: Rollout, cfg: RLConfig, usable: Bool[np.ndarray, " B"] | None = None
) -> Signal:
    """The signal of a scored rollout; groups that are not `usable` only fill its shape.

    A group that is masked as a whole is left out, so every mini-batch has tokens to learn from.
    """
    ids, rewards = rollout.group_ids, np.asarray(rollout.rewards, np.float64)
    given = np.ones(len(ids), bool) if usable is None else usable
    share = lambda x: float(x[given].mean()) if given.any() else 0.0
    silent = zero_variance(rewards, ids)
    keep = given & (~silent | (not cfg.filter_zero_variance))
    mask, metrics = rollout.loss_mask, {"kept_groups": share(~silent)}
    if rollout.bonus is not None:
        rewards = rewards + np.asarray(rollout.bonus, np.float64)
    if cfg.overlong_buffer:
        lengths = rollout.lengths - rollout.prompt_lengths
        penalty = overlong_penalty(lengths, cfg.sampling.max_tokens, cfg.overlong_buffer)
        penalty = cfg.overlong_penalty * penalty
        rewards = rewards + penalty
        metrics |= {"overlong": share(penalty < 0), "overlong_penalty": share(penalty)}
    if cfg.mask_truncated:
        cut = rollout.finish == FINISH_LENGTH
        mask = mask * ~cut[:, None]
        keep = keep & np.isin(ids, ids[~cut])
        metrics["truncated"] = share(cut)
    advantages = np.zeros(len(ids), np.float32)
    if given.any():
        advantages[given] = group_advantages(rewards[given], ids[given], cfg.advantage)
    return Signal(advantages, keep, mask.astype(np.float32), metrics)
