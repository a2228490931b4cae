"""From rewards to advantages; host arithmetic in float64."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

Estimator = Literal["grpo", "dr_grpo", "rloo", "batch"]


def _group_index(group_ids: Int[np.ndarray, " B"]) -> tuple[np.ndarray, int]:
    unique, index = np.unique(group_ids, return_inverse=True)
    return index.reshape(-1), len(unique)


def zero_variance(
    rewards: Float[np.ndarray, " B"], group_ids: Int[np.ndarray, " B"]
) -> Bool[np.ndarray, " B"]:
    """Rows of groups whose rewards are all equal: they carry no signal (DAPO, arXiv 2503.14476).

    By comparison, not by a standard deviation, which rounding keeps from being zero.
    """
    index, groups = _group_index(group_ids)
    low, high = np.full(groups, np.inf), np.full(groups, -np.inf)
    np.minimum.at(low, index, rewards)
    np.maximum.at(high, index, rewards)
    return (low == high)[index]


def overlong_penalty(
    response_lengths: Int[np.ndarray, " B"], max_tokens: int, buffer: int
) -> Float[np.ndarray, " B"]:
    """DAPO's soft penalty on length, in [-1, 0] (arXiv 2503.14476, Eq. 13); 0 for buffer 0.

    0 up to max_tokens - buffer tokens of response, then linear, -1 at max_tokens.
    """
    over = np.asarray(response_lengths, np.float64) - (max_tokens - buffer)
    return -np.clip(over / max(buffer, 1), 0.0, 1.0) * (buffer > 0)


def group_advantages(
    rewards: Float[np.ndarray, " B"],
    group_ids: Int[np.ndarray, " B"],
    estimator: Estimator = "grpo",
    eps: float = 1e-6,
) -> Float[np.ndarray, " B"]:
    """Rewards against the baseline of their group (the responses to one prompt).

    * grpo: (r - mean) / (std + eps), both of the group (arXiv 2402.03300, Eq. 3).
    * dr_grpo: r - mean (arXiv 2503.20783, Eq. 3): a group counts by its spread.
    * rloo: r - mean of the others, n / (n - 1) times dr_grpo's (arXiv 2402.14740, Eq. 8).
    * batch: (r - mean of the group) / (std + eps) with the standard deviation of all the batch's
      rewards, as Lite PPO has it (arXiv 2508.08221, Sec. 4). REINFORCE++-baseline instead divides
      by that of the centred rewards (arXiv 2501.03262).

    Every std is a sample standard deviation (n - 1), as in TRL and verl. Exactly 0 in a group
    whose rewards are all equal. Groups may have any size and order.

    Raises ValueError for a reward that is not finite, or an unknown estimator.
    """
    rewards = np.asarray(rewards, np.float64)
    if not np.all(np.isfinite(rewards)):
        raise ValueError(f"reward of row {int(np.argmin(np.isfinite(rewards)))} is not finite")
    index, groups = _group_index(group_ids)
    count = np.bincount(index, minlength=groups)
    mean = np.bincount(index, rewards, groups) / count
    centred = rewards - mean[index]
    others = np.maximum(count - 1, 1)
    if estimator == "grpo":
        variance = np.bincount(index, centred**2, groups) / others
        scores = centred / (np.sqrt(variance)[index] + eps)
    elif estimator == "dr_grpo":
        scores = centred
    elif estimator == "rloo":
        scores = centred * (count / others)[index]
    elif estimator == "batch":
        scores = centred / (np.std(rewards, ddof=min(1, len(rewards) - 1)) + eps)
    else:
        raise ValueError(f"estimator {estimator!r} is not grpo, dr_grpo, rloo or batch")
    return np.where(zero_variance(rewards, group_ids), 0.0, scores).astype(np.float32)
