"""From rewards to advantages; host arithmetic in float64."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int


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


def group_advantages(
    rewards: Float[np.ndarray, " B"], group_ids: Int[np.ndarray, " B"], eps: float = 1e-6
) -> Float[np.ndarray, " B"]:
    """GRPO's z-score within a group: (r - mean) / (std + eps) (arXiv 2402.03300, Eq. 3).

    std is the sample standard deviation (n - 1), as in TRL and verl. Exactly 0 in a group whose
    rewards are all equal. Groups may have any size and order.

    Raises ValueError for a reward that is not finite.
    """
    rewards = np.asarray(rewards, np.float64)
    if not np.all(np.isfinite(rewards)):
        raise ValueError(f"reward of row {int(np.argmin(np.isfinite(rewards)))} is not finite")
    index, groups = _group_index(group_ids)
    count = np.bincount(index, minlength=groups)
    mean = np.bincount(index, rewards, groups) / count
    centred = rewards - mean[index]
    variance = np.bincount(index, centred**2, groups) / np.maximum(count - 1, 1)
    scores = centred / (np.sqrt(variance)[index] + eps)
    return np.where(zero_variance(rewards, group_ids), 0.0, scores).astype(np.float32)
