"""Probes of the routers' drift at chosen rollout batches: `probe/*` metrics, in every replay mode.

A probe replays the logged routes of the whole batch in a scoring forward, with the parameters
that its last mini-step meets (`probe/last/*`) and with those that it leaves (`probe/window/*`), and
compares router logits with those of the rollout at the response tokens (`replay/drift.py`). It
reads the state and changes nothing. The last two of every `replay.probe_every` batches are probed,
since a window is also compared with the one before it.

Names below `probe/last/` and `probe/window/`: those of `drift.window_report`, with the shifts
  used_shift   what the sampler selected by (modes that shift);
  router       h dW_r, the true move of the router's weights: the part of the drift that is theirs,
               and the most that `lookahead` could win;
  momentum     Adam's step at the rollout's start times the mini-steps made: lookahead, in any mode;
  previous     W fitted on the window before: what a predictor that had learned it would do now;
and `cosine` (of W with the W of the window before) and `momentum_cosine` (of momentum and router).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pr2jax.core import hosts
from pr2jax.core.metrics import Metrics
from pr2jax.core.optim import OptimConfig
from pr2jax.core.state import TrainState
from pr2jax.models.predictor import RouterFeatures
from pr2jax.models.transformer import router_params
from pr2jax.replay.diagnostics import selection_rule
from pr2jax.replay.drift import cosine, window_report
from pr2jax.replay.modes import ReplayPlan, lookahead_shift
from pr2jax.rl.batch import feature_places, put_batch, split_micro
from pr2jax.rl.types import LearnerBatch
from pr2jax.sampler.types import Rollout
from pr2jax.train.session import Session


class DriftProbe:
    """Opens a `Window` on batches that are to be probed."""

    def __init__(self, session: Session, score, optim: OptimConfig):
        """`score`: `make_scorer`'s; `optim`: the policy's optimizer settings."""
        self.session, self.score, self.optim = session, score, optim
        self.every = session.cfg.replay.probe_every
        # (batch, {moment: W}) of the window probed last; a resumed run has none, and then the
        # figures that compare two windows are left out of one row.
        self.previous: tuple[int, dict[str, jax.Array]] | None = None
        self.report = jax.jit(functools.partial(_report, model=session.cfg.model))
        self._ahead = jax.jit(self._momentum)

    def _momentum(self, state: TrainState):
        one = ReplayPlan("sampler", lookahead=1.0)
        cfg = self.session.cfg.model
        return lookahead_shift(one, state.params, cfg, self.optim, state.opt_state)

    def window(
        self, state: TrainState, batch: LearnerBatch, rollout: Rollout, index: int
    ) -> Window | None:
        """The window of this batch; None where it is not probed. `batch` is unsplit."""
        if not self.every or index % self.every < self.every - 2:
            return None
        ahead = self._ahead(state) if self.optim.optimizer == "adamw" else None
        return Window(self, state, batch, rollout, index, ahead)


class Window:
    """One batch from its rollout on. `measure` whenever a moment is to be looked at."""

    def __init__(self, probe: DriftProbe, state, batch, rollout, index, ahead):
        cfg = probe.session.cfg
        self.probe, self.index, self.ahead = probe, index, ahead
        routes = batch.logged if batch.routes is None else batch.routes
        batch = batch.replace(routes=routes, logged=None)
        self.rows = put_batch(split_micro(batch, cfg.rl.micro_batch), probe.session.mesh)
        self.kernels = router_params(state.params, cfg.model) + 0.0  # a copy: the state is donated
        self.features = batch.features
        if self.features is None:
            self.features = self._recorded(state.params, *self._places(batch, rollout))
        mask, positions = hosts.to_host((self.features.mask, self.features.positions))
        where = np.where(mask, positions, 0)
        self.used = np.take_along_axis(np.asarray(routes), where[None, :, :, None], axis=2)
        self.first = np.unique(rollout.group_ids, return_inverse=True)[1] % 2 == 0
        self.shift = batch.shift
        self.metrics: Metrics = {}
        self.maps: dict[str, jax.Array] = {}

    def _places(self, batch: LearnerBatch, rollout: Rollout):
        return feature_places(
            rollout.prompt_lengths,
            rollout.lengths,
            self.probe.session.cfg.replay.feature_tokens,
            tokens="response",
            seed=self.index * self.probe.session.cfg.rl.rows,
            max_length=batch.tokens.shape[1],
        )

    def _recorded(self, params, positions, mask) -> RouterFeatures:
        rows = self.probe.session.cfg.rl.micro_batch
        split = lambda x: jnp.asarray(x).reshape(-1, rows, x.shape[1])
        return self.probe.score(params, self.rows, (split(positions), split(mask))).features

    def measure(self, moment: str, params: Any, steps: int) -> None:
        """The drift from the rollout to `params`, which `steps` mini-steps made."""
        now = self._recorded(params, self.features.positions, self.features.mask)
        shifts = {"router": router_params(params, self.probe.session.cfg.model) - self.kernels}
        if self.ahead is not None:
            shifts["momentum"] = steps * self.ahead
        if self.shift is not None:
            shifts["used_shift"] = self.shift
        before = self.probe.previous
        if before is not None and before[0] == self.index - 1 and moment in before[1]:
            shifts["previous"] = before[1][moment]
        found, self.maps[moment] = self.probe.report(
            params, self.features, now.logits, self.first, self.used, shifts
        )
        self.metrics |= {f"probe/{moment}/{key}": value for key, value in found.items()}

    def close(self) -> dict[str, Any]:
        """The metrics of all moments; keeps what the next window is compared with."""
        self.probe.previous = (self.index, self.maps)
        return hosts.to_host(self.metrics)


def _report(params, features: RouterFeatures, logits_now, first, used, shifts, *, model):
    found, fitted = window_report(
        features.inputs,
        features.logits,
        logits_now,
        features.mask,
        first,
        selection_rule(params, model),
        used=used.astype(jnp.int32),
        shifts=shifts,
    )
    if "previous" in shifts:
        found["cosine"] = cosine(fitted, shifts["previous"])
    if "momentum" in shifts:
        found["momentum_cosine"] = cosine(shifts["momentum"], shifts["router"])
    return found, fitted
