"""Rounds of sampling that make up one batch: which groups have a signal, and taking some."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float

from pr2jax.core import hosts
from pr2jax.models.predictor import RouterFeatures
from pr2jax.rl.advantages import zero_variance
from pr2jax.sampler.types import FINISH_STOP, Rollout
from pr2jax.tasks.pool import VerifierPool
from pr2jax.tasks.rewards import RewardTerm, term_value


@dataclasses.dataclass
class Round:
    """What one call of the sampler gave, scored; `items` are the problems, one a group.

    terms: values of the named reward terms, a row each. domains: of the items, where figures are
    wanted by domain.
    """

    rollout: Rollout
    features: RouterFeatures | None
    items: np.ndarray
    failures: int
    sample_s: float
    verify_s: float
    terms: dict[str, Float[np.ndarray, " B"]] = dataclasses.field(default_factory=dict)
    domains: list[str] = dataclasses.field(default_factory=list)


def signals(rounds: list[Round]) -> Bool[np.ndarray, " G"]:
    """Which groups' rewards are not all equal, over the rounds."""
    found = []
    for r in rounds:
        silent = zero_variance(r.rollout.rewards, r.rollout.group_ids)
        found.append(~silent.reshape(len(r.items), -1)[:, 0])
    return np.concatenate(found)


def select(
    rounds: list[Round], groups: np.ndarray, n: int
) -> tuple[Rollout, RouterFeatures | None]:
    """The rollout (and features) of these groups, counted over the rounds; untouched where it is
    the first round as it stands."""
    first = rounds[0]
    if len(rounds) == 1 and np.array_equal(groups, np.arange(len(first.items))):
        return first.rollout, first.features
    rows = (groups[:, None] * n + np.arange(n)).reshape(-1)

    def take(axis, *parts):
        return np.take(np.concatenate([np.asarray(x) for x in parts], axis), rows, axis)

    by_rows = [r.rollout.replace(routes=None, reasons=()) for r in rounds]
    rollout = jax.tree.map(lambda *x: take(0, *x), *by_rows)
    reasons = [why for r in rounds for why in r.rollout.reasons]
    rollout = rollout.replace(
        reasons=tuple(reasons[i] for i in rows),
        group_ids=np.repeat(np.arange(len(groups), dtype=np.int32), n),
    )
    if first.rollout.routes is not None:
        rollout = rollout.replace(routes=take(1, *(r.rollout.routes for r in rounds)))
    if first.features is None:
        return rollout, None
    held = [hosts.to_host(r.features) for r in rounds]
    features = RouterFeatures(
        positions=take(0, *(f.positions for f in held)),
        mask=take(0, *(f.mask for f in held)),
        logits=take(1, *(f.logits for f in held)),
        inputs=take(1, *(f.inputs for f in held)),
    )
    return rollout, features


def reward_terms(
    terms: Mapping[str, RewardTerm], rollout: Rollout, texts: Sequence[str]
) -> tuple[Float[np.ndarray, " B"] | None, dict[str, Float[np.ndarray, " B"]]]:
    """(what the terms add to each row's score, each term by name); (None, {}) without terms."""
    lengths = (rollout.lengths - rollout.prompt_lengths).tolist()
    values = {
        name: np.array([term_value(term, *row) for row in zip(texts, lengths, strict=True)])
        for name, term in terms.items()
    }
    if not values:
        return None, {}
    total = sum(terms[name].weight * value for name, value in values.items())
    return total.astype(np.float32), values


def failures(pool: VerifierPool) -> int:
    """Responses so far that a verifier could not judge within its limits, on all hosts."""
    own = sum(pool.stats[kind] for kind in ("timeouts", "crashes", "memory", "errors"))
    return sum(hosts.gather(own))


def totals(rounds: list[Round]) -> dict[str, float]:
    """Plain figures over all that the rounds sampled; times are seconds (`RolloutSource`)."""
    each = [r.rollout for r in rounds]
    rewards = np.concatenate([r.rewards for r in each])
    return by_domain(rounds, rewards) | {
        **{
            f"term/{name}": np.concatenate([r.terms[name] for r in rounds]).mean()
            for name in rounds[0].terms
        },
        "reward": rewards.mean(),
        "solved": (rewards >= 1.0).mean(),
        "response_length": np.concatenate([r.lengths - r.prompt_lengths for r in each]).mean(),
        "stopped": (np.concatenate([r.finish for r in each]) == FINISH_STOP).mean(),
        "verifier_failures": sum(r.failures for r in rounds),
        "time/sample": sum(r.sample_s for r in rounds),
        "time/verify": sum(r.verify_s for r in rounds),
    }


def by_domain(rounds: list[Round], rewards: Float[np.ndarray, " B"]) -> dict[str, float]:
    """`reward/DOMAIN` and `solved/DOMAIN` of the domains that were sampled."""
    domains = np.array([d for r in rounds for d in r.domains])
    if not len(domains):
        return {}
    rows = np.repeat(domains, len(rewards) // len(domains))
    out = {}
    for domain in np.unique(domains):
        own = rewards[rows == domain]
        out |= {f"reward/{domain}": own.mean(), f"solved/{domain}": (own >= 1.0).mean()}
    return out
