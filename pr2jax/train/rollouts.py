"""The sampling half of an RL step: prompts in order, responses, verdicts; journalled.

Prompts come in an order that the seed alone defines (`BatchOrder`), and place i of it has the
request ids i n .. i n + n - 1. A batch takes the next prompts_per_batch places.

With dynamic sampling (DAPO, arXiv 2503.14476, Eq. 11) it takes the next prompts_per_batch places
*whose groups have a signal* (scores that are not all equal, before any shaping): rounds of further
prompts are sampled, by the same policy, until they are found. Places passed over on the way are
consumed and reported as filtered. What a round sampled beyond the last group that was needed is
dropped, not carried over (it would be off-policy by a whole batch) and not consumed: the next
batch begins with those prompts. So a batch does not depend on how its rounds were cut, no prompt
is lost, and where a batch begins is state: it is in the checkpoint and in the journal.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float

from pr2jax.core import goodput, hosts
from pr2jax.core.config import ConfigError
from pr2jax.core.fingerprints import fingerprint
from pr2jax.core.optim import OptimConfig
from pr2jax.core.state import TrainState
from pr2jax.data.packing import BatchOrder
from pr2jax.evaluation.runner import score_rollout
from pr2jax.models.predictor import RouterFeatures
from pr2jax.replay.modes import lookahead_shift, plan, selection_shift
from pr2jax.replay.routes import save_routes
from pr2jax.sampler.types import Rollout
from pr2jax.tasks.base import Problem, domain_of
from pr2jax.train.journal import (
    Entry,
    Journal,
    has_features,
    pack,
    pack_features,
    place_features,
    read_features,
    unpack,
)
from pr2jax.train.rounds import Round, failures, reward_terms, select, signals, totals
from pr2jax.train.session import Session

log = logging.getLogger("pr2jax")

JOURNAL = "journal"


@dataclasses.dataclass(frozen=True)
class Gathered:
    """A scored rollout batch and what the learner must know of how it was made.

    Attributes:
      rollout: rewards, reasons and prompt ids (indices of the training problems) filled in.
      features: router features that the sampler recorded, or None.
      keep: rows to learn from; the others only fill a batch that dynamic sampling left short.
      consumed, filtered: ids of the problems learned from, and of those passed over, in order.
      metrics: plain figures of the batch.
      seconds: wall time of making it.
      shift, lookahead: what was added to the routers' selection logits, and the part of it that
        is not the predictor's; [L, D, E] or None.
    """

    rollout: Rollout
    features: RouterFeatures | None
    keep: Bool[np.ndarray, " B"]
    consumed: list[str]
    filtered: list[str]
    metrics: dict[str, float]
    seconds: float
    shift: Float[Array, "L D E"] | None = None
    lookahead: Float[Array, "L D E"] | None = None


class RolloutSource:
    """Rollout batches in order, scored.

    Metrics of a batch, over all that was sampled: `reward` (mean score), `solved` (share of full
    scores), both also by domain (`reward/DOMAIN`) where there are several; `term/NAME` (mean of a
    reward term, before its weight), `response_length`, `stopped` (share that ended by itself),
    `verifier_failures`, `time/sample`, `time/verify`; with dynamic sampling `dynamic/refills`
    (rounds after the first), `dynamic/yield` (share of sampled groups with a signal),
    `dynamic/filtered`, `dynamic/surplus` and `dynamic/missing` (groups passed over, dropped, and
    not found); with a journal `journal/replayed` (1: nothing was sampled or graded) and
    `journal/bytes`.
    """

    def __init__(self, session: Session, problems: list[Problem], optim: OptimConfig):
        """`optim`: the policy's optimizer settings, which lookahead reads.

        Raises ConfigError where the problems do not fill a batch, or a prompt does not fit.
        """
        cfg = session.cfg
        self.session, self.problems = session, problems
        self.cfg, self.plan = cfg.rl, plan(cfg.replay)
        if len(problems) < cfg.rl.prompts_per_batch:
            raise ConfigError(
                f"rl_task: {len(problems)} training problems do not fill a batch of "
                f"rl.prompts_per_batch={cfg.rl.prompts_per_batch}"
            )
        self.prompts = [session.encode(p) for p in problems]
        session.check_verifiers(problems)
        self.domains = [domain_of(p) for p in problems]
        self.order = BatchOrder(len(problems), 1, cfg.seed)
        self.position = 0
        self.journal: Journal | None = None
        self._exact, self._warned = False, False
        self._last: tuple[int, list[str], list[str]] | None = None

        def shifts(params, opt_state):
            old = (self.plan, params, cfg.model, optim, opt_state)
            return selection_shift(*old), lookahead_shift(*old)

        self._shifts = jax.jit(shifts)

    def gather(self, state: TrainState, index: int) -> Gathered:
        """The batch of position `index`: out of the journal, else sampled with `state` and
        scored, and journalled. Where it is not the next batch, its place in the order must have
        been told by `remember` (dynamic sampling only)."""
        if index == 0 or not self.cfg.dynamic_sampling:
            self.position = index * self.cfg.prompts_per_batch
        shift, lookahead = self._shifts(state.params, state.opt_state)
        found = self._recall(state, index)
        if found is None:
            start = self.position
            found, self.position = self._make(state, index, shift)
            saves = self.session.cfg.loop.save_routes and hosts.first()
            if saves and found.rollout.routes is not None:
                self._save_routes(found, index)
            found = self._record(state, index, start, found)
        self._exact = False
        self._last = index, found.consumed, found.filtered
        return dataclasses.replace(found, shift=shift, lookahead=lookahead)

    def consumed(self, index: int) -> list[str]:
        """Ids of the problems of batch `index`, which must be the last one."""
        return self._of(index)[1]

    def filtered(self, index: int) -> list[str]:
        """Ids of those that its dynamic sampling passed over."""
        return self._of(index)[2]

    def _of(self, index: int) -> tuple[int, list[str], list[str]]:
        if self._last is None or self._last[0] != index:
            raise RuntimeError(f"batch {index} is not the last one")
        return self._last

    # -------------------------------------------------------------- sampling

    def _make(self, state: TrainState, index: int, shift: Array | None) -> tuple[Gathered, int]:
        """The batch that begins at the current position, and the position after it."""
        began, cfg = time.monotonic(), self.cfg
        n, wanted = cfg.samples_per_prompt, cfg.prompts_per_batch
        rounds = [self._round(state, index, self.position, wanted, shift)]
        signal = signals(rounds)
        if cfg.dynamic_sampling:
            while signal.sum() < wanted and len(rounds) <= cfg.max_refills:
                size = self._refill(wanted, int(signal.sum()), len(signal))
                at = self.position + len(signal)
                rounds.append(self._round(state, index, at, size, shift))
                signal = signals(rounds)
        taken = np.arange(wanted)  # groups, counted over the rounds
        used = wanted
        if cfg.dynamic_sampling:
            taken = np.flatnonzero(signal)[:wanted]
            used = taken[-1] + 1 if len(taken) == wanted else len(signal)
        short = wanted - len(taken)
        passed = np.setdiff1d(np.arange(used), taken)
        if short:
            log.warning(
                "step %d: %d of %d groups have a signal after %d refills (rl.max_refills)",
                *(index + 1, len(taken), wanted, len(rounds) - 1),
            )
        items = np.concatenate([r.items for r in rounds])
        # Shapes stay fixed: groups without a signal stand in, and are not learned from.
        groups = np.concatenate([taken, passed[len(passed) - short :]])
        rollout, features = select(rounds, groups, n)
        ids = np.repeat(items[groups], n).astype(np.int32)
        names = lambda chosen: [self.problems[i].id for i in items[chosen]]
        metrics = totals(rounds)
        if cfg.dynamic_sampling:
            metrics |= {
                "dynamic/refills": len(rounds) - 1,
                "dynamic/yield": float(signal.mean()),
                "dynamic/filtered": len(passed),
                "dynamic/surplus": len(signal) - int(used),
                "dynamic/missing": short,
            }
        found = Gathered(
            rollout=rollout.replace(prompt_ids=ids),
            features=features,
            keep=np.repeat(np.arange(wanted) < len(taken), n),
            consumed=names(taken),
            filtered=names(passed),
            metrics={k: float(v) for k, v in metrics.items()},
            seconds=time.monotonic() - began,
        )
        return found, self.position + int(used)

    def _refill(self, wanted: int, there: int, sampled: int) -> int:
        """Prompts of the next round: what the yield so far says is needed, in whole waves.

        The sampler decodes all its slots whatever is asked, so a round that leaves slots empty
        saves nothing. Recorded features lie in an array of as many rows as the round has, a
        program for each size: those rounds are all of the first one's size.
        """
        if self._features():
            return wanted
        wave = max(1, self.session.cfg.sampler.slots // self.cfg.samples_per_prompt)
        needed = -(-(wanted - there) * sampled // max(there, 1))
        return min(wanted, -(-needed // wave) * wave)

    def _features(self) -> int:
        recorded = self.session.cfg.replay.features == "recorded"
        return self.plan.features if recorded else 0

    def _round(
        self, state: TrainState, index: int, start: int, prompts: int, shift: Array | None
    ) -> Round:
        """Samples and scores the prompts of places start .. start + prompts - 1 of the order."""
        cfg, began = self.cfg, time.monotonic()
        items = np.array([self.order.at(start + i)[0] for i in range(prompts)])
        rollout, features = self.session.sampler.rollout(
            [self.prompts[i] for i in items],
            cfg.samples_per_prompt,
            cfg.sampling,
            params=state.params,
            key=self.session.key("rollout"),
            request_offset=start * cfg.samples_per_prompt,
            policy_version=index * cfg.updates,
            shift=shift,
            feature_tokens=self._features(),
        )
        sampled, pool = time.monotonic(), self.session.pool
        before = failures(pool)
        problems = [self.problems[i] for i in items]
        with goodput.during("verify"):
            scored, texts = score_rollout(
                rollout, problems, cfg.samples_per_prompt, self.session.tokenizer, pool
            )
        bonus, terms = reward_terms(cfg.rewards, scored, texts)
        return Round(
            scored.replace(bonus=bonus),
            features,
            items,
            failures(pool) - before,
            sampled - began,
            time.monotonic() - sampled,
            terms,
            [self.domains[i] for i in items] if len(set(self.domains)) > 1 else [],
        )

    def _save_routes(self, found: Gathered, index: int) -> None:
        cfg, rollout = self.session.cfg, found.rollout
        meta = {
            "step": index,
            "mode": cfg.replay.mode,
            "num_experts": cfg.model.moe.num_experts,
            "prompt_lengths": rollout.prompt_lengths.tolist(),
            "lengths": rollout.lengths.tolist(),
            "problems": [
                self.problems[i].id for i in rollout.prompt_ids[:: self.cfg.samples_per_prompt]
            ],
        }
        save_routes(self.session.workdir / "routes" / f"step_{index:06d}", rollout.routes, meta)

    # -------------------------------------------------------------- resuming

    def open_journal(self, workdir: epath.Path) -> None:
        """Journals to `workdir`/journal from here on, and looks there first. The next state that
        `gather` is given must be exactly that of its position: a checkpoint's, or the first."""
        self.journal = Journal(workdir / JOURNAL, self._run_name())
        self._exact, self._warned = True, False
        if steps := self.journal.steps():
            log.info(
                "journal: %d batches (%.1f MB) up to step %d are there",
                *(len(steps), self.journal.size() / 1e6, steps[-1] + 1),
            )

    def trim_journal(self, position: int) -> None:
        """Removes journalled batches before `position`."""
        if self.journal is not None:
            self.journal.trim(position)

    def memory(self) -> dict[str, Any]:
        """Where the next batch begins in the order of prompts."""
        return {"position": self.position}

    def remember(self, memory: dict[str, Any]) -> None:
        """Takes back what `memory` gave."""
        self.position = int(memory["position"])

    def _run_name(self) -> str:
        """Names all that batches are a function of: settings, and the problems."""
        cfg = self.session.config_json
        sections = ("seed", "compute_dtype", "init_from", "model", "tokenizer", "rl_task")
        named = {k: cfg[k] for k in (*sections, "replay", "sampler", "verifier")}
        later = ("steps", "eval_every", "max_skipped_in_row")  # a run may be given more steps
        named["rl"] = {k: v for k, v in cfg["rl"].items() if k not in later}
        named["problems"] = [p.id for p in self.problems]
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]

    def _record(self, state: TrainState, index: int, start: int, found: Gathered) -> Gathered:
        if self.journal is None:
            return found
        arrays, meta = pack(found.rollout)
        meta |= {
            "start": start,
            "end": self.position,
            "state": fingerprint(state),
            "consumed": found.consumed,
            "filtered": found.filtered,
            "metrics": found.metrics,
            "seconds": found.seconds,
        }
        arrays |= {"keep": found.keep}
        features, held = pack_features(found.features, self.session.mesh)
        part, size = jax.process_index(), 0
        with hosts.together("writing the journal"):
            if part == 0:
                size = self.journal.write(index, arrays | features, meta | {"features": held})
            elif features:
                self.journal.write(index, features, {"features": held}, part)
        known = {"journal/replayed": 0.0, "journal/bytes": float(size)}
        return dataclasses.replace(found, metrics=found.metrics | known)

    def _recall(self, state: TrainState, index: int) -> Gathered | None:
        """The journalled batch of `index`, unless it is another policy's.

        A restored state has exactly the bits that the batch was sampled with, on any device. Later
        ones have them where the learner's programs repeat to the bit, as on CPU; elsewhere the
        batch is as off-policy as they differ, which its log-probs account for.
        """
        if self.journal is None:
            return None
        entry, features = self._read(self.journal, index)
        if entry is None:
            return None
        arrays, meta = entry
        same = meta["state"] == fingerprint(state)
        if meta["start"] != self.position or (self._exact and not same):
            for step in self.journal.steps():
                if step >= index:
                    self.journal.drop(step, "was sampled by another policy")
            return None
        if not same and not self._warned:
            log.warning("journal: the parameters are not to the bit those that sampled its batches")
            self._warned = True
        if self._exact:
            log.info("journal: step %d was sampled and graded already", index + 1)
        self.position = meta["end"]
        known = {"journal/replayed": 1.0, "journal/bytes": float(self.journal.size_of(index))}
        return Gathered(
            rollout=unpack(arrays, meta),
            features=features,
            keep=arrays["keep"],
            consumed=meta["consumed"],
            filtered=meta["filtered"],
            metrics=meta["metrics"] | known,
            seconds=meta["seconds"],
        )

    def _read(self, journal: Journal, index: int) -> tuple[Entry | None, RouterFeatures | None]:
        """The entry of `index` and its features, where every host has what it needs of them."""
        mesh, features = self.session.mesh, None
        with hosts.together("reading the journal"):
            entry = journal.read(index)
            if entry is not None:
                features = read_features(journal, index, entry, mesh)
        if not all(hosts.gather(entry is not None)):
            return None, None
        if not has_features(entry):
            return entry, None
        if not all(hosts.gather(features is not None)):
            journal.drop(index, "has not all of its features")
            return None, None
        return entry, place_features(features, len(entry[0]["lengths"]), mesh)
