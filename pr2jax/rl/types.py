"""What an RL run is told, and what its learner is given."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from pr2jax.core.config import ConfigError
from pr2jax.core.optim import OptimConfig, ParamGroup
from pr2jax.models.config import ModelConfig, num_moe_layers
from pr2jax.models.predictor import RouterFeatures
from pr2jax.rl.advantages import Estimator
from pr2jax.rl.losses import Aggregation, KLEstimator, Level
from pr2jax.sampler.types import SamplingParams
from pr2jax.tasks.rewards import RewardTerm

# The optimizer group of W_p: its own learning rate and clip norm, no weight decay, and a gate.
PREDICTOR_GROUP = "predictor"


def predictor_group(lr_multiplier: float = 10.0, **settings) -> ParamGroup:
    """W_p's optimizer group, for `optim.groups["predictor"]`: alpha = `lr_multiplier`.

    Its epsilon is above the policy's: while the router stands still its gradient is rounding
    noise of 1e-7, which Adam at 1e-8 would turn into whole steps.
    """
    settings = {"clip_norm": 1.0, "weight_decay": 0.0, "eps": 1e-6} | settings
    return ParamGroup(pattern=r"moe/predictor/", lr_multiplier=lr_multiplier, **settings)


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """The GRPO family; as it stands GRPO (arXiv 2402.03300) with DAPO's asymmetric clip and
    token mean (arXiv 2503.14476). What the choices are is written in `rl.advantages` and
    `rl.losses`.

    A rollout batch is prompts_per_batch x samples_per_prompt rows, cut into mini_steps disjoint
    mini-batches of whole groups, one optimizer step each ("off-N"), each accumulated over
    micro-batches of micro_batch rows. Further epochs take the same mini-batches in the same
    order, so that each is seen again after equally many steps; the predictor stands still only
    in the very first mini-step. Their metrics go on counting: mini_I, I = 1 .. updates.

    Attributes:
      steps: rollout batches.
      epochs: times that a rollout batch is learned from.
      advantage: grpo (z-score in the group), dr_grpo (centred), rloo (leave one out), batch
        (centred in the group, scaled by the batch).
      overlong_buffer: the last tokens before sampling.max_tokens, over which a penalty is added
        to the score, from 0 down to -overlong_penalty (0: none).
      overlong_penalty: its size at max_tokens.
      mask_truncated: leave responses that were cut off at max_tokens out of the loss; their
        scores stay in the baseline.
      ratio: importance ratio of a token, or its sequence's geometric mean (GSPO).
      surrogate: ppo (clipped ratio) or cispo (clipped ratio as a constant weight of log-probs).
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
      dual_clip: the ratio's bound where the advantage is negative, above 1 (0: none).
      tis_cap: policy terms are weighted by min(old / behavior, tis_cap) (0: not); needs
        scoring_pass=always.
      tis_level: that ratio of a token, or of its whole sequence.
      aggregation: mean over the mini-batch's tokens, or over sequences of their token means, or
        fixed: the sum of tokens over (sequences x sampling.max_tokens).
      kl_coef: weight of the KL to the reference policy (0: no reference is kept).
      kl_estimator: how it is estimated from a token; by itself k1 has no gradient in expectation.
      kl_importance: weight that by the token's ratio, so that k1 and k3 have the gradient of
        the KL that they estimate, off-policy too.
      entropy_coef: weight of the entropy bonus.
      load_balance_coef, z_coef: weights of the router's auxiliary losses (mean over layers).
      bias_update_rate: step of the selection bias after a mini-step; needs such a router.
      filter_zero_variance: leave out groups whose rewards are all equal.
      dynamic_sampling: sample further prompts until prompts_per_batch groups have rewards that
        are not all equal (DAPO, arXiv 2503.14476, Eq. 11); needs filter_zero_variance.
      max_refills: rounds of further prompts, each of prompts_per_batch at most; a batch that is
        not full by then is learned from as it is.
      scoring_pass: whether old log-probs come from a pass of the learner, or from the sampler;
        `auto` scores once the measured mismatch exceeds mismatch_limit.
      mismatch_limit: mean |log-prob| difference of sampler and learner, nats.
      max_skipped_in_row: non-finite steps in a row that stop the run.
      length_bucket: rows are padded to a multiple of this many tokens.
      eval_every: rollout batches between held-out evaluations (0: only at the end).
      rewards: terms by name that are added to the verifier's score, weight times term, where
        advantages are taken (tasks/rewards.py): the form of a response, its length.
      sampling: how rollouts are drawn; the learner takes its log-probs at the same temperature.
      optim: policy optimizer; modes with a predictor need a group named "predictor".
    """

    steps: int = 100
    prompts_per_batch: int = 32
    samples_per_prompt: int = 8
    mini_steps: int = 4
    micro_batch: int = 64
    epochs: int = 1
    advantage: Estimator = "grpo"
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    mask_truncated: bool = False
    ratio: Level = "token"
    surrogate: Literal["ppo", "cispo"] = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 0.0
    tis_cap: float = 0.0
    tis_level: Level = "token"
    aggregation: Aggregation = "token_mean"
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_importance: bool = False
    entropy_coef: float = 0.0
    load_balance_coef: float = 0.0
    z_coef: float = 0.0
    bias_update_rate: float = 0.0
    filter_zero_variance: bool = True
    dynamic_sampling: bool = False
    max_refills: int = 8
    scoring_pass: Literal["auto", "always", "never"] = "auto"
    mismatch_limit: float = 0.02
    max_skipped_in_row: int = 5
    length_bucket: int = 32
    eval_every: int = 20
    rewards: dict[str, RewardTerm] = dataclasses.field(default_factory=dict)
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    optim: OptimConfig = dataclasses.field(
        default_factory=lambda: OptimConfig(
            learning_rate=1e-4, warmup_steps=10, groups={PREDICTOR_GROUP: predictor_group()}
        )
    )

    @property
    def rows(self) -> int:
        """Rows of a rollout batch."""
        return self.prompts_per_batch * self.samples_per_prompt

    @property
    def mini_rows(self) -> int:
        """Rows of a mini-batch."""
        return self.rows // self.mini_steps

    @property
    def updates(self) -> int:
        """Optimizer steps of a rollout batch, all epochs; fewer where groups are left out."""
        return self.mini_steps * self.epochs

    @property
    def num_micro(self) -> int:
        """Micro-batches of a full mini-batch."""
        return self.mini_rows // self.micro_batch

    def describe(self) -> str:
        """How the batch sizes multiply, in one line."""
        return (
            f"{self.prompts_per_batch} prompts x {self.samples_per_prompt} samples = {self.rows} "
            f"rows a batch = {self.mini_steps} mini-steps x {self.mini_rows} rows, each of "
            f"{self.num_micro} micro-batches x {self.micro_batch} rows"
            + (f"; {self.epochs} epochs" if self.epochs > 1 else "")
        )

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        positive = ("steps", "prompts_per_batch", "mini_steps", "micro_batch", "length_bucket")
        for name in (*positive, "max_skipped_in_row", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be >= 1, got {getattr(self, name)}")
        if self.samples_per_prompt < 2:
            raise ConfigError(
                f"samples_per_prompt: a group of {self.samples_per_prompt} has no baseline"
            )
        if self.prompts_per_batch % self.mini_steps:
            raise ConfigError(
                f"mini_steps: {self.mini_steps} does not divide prompts_per_batch="
                f"{self.prompts_per_batch} (a mini-batch is of whole groups)"
            )
        if self.mini_rows % self.micro_batch:
            raise ConfigError(
                f"micro_batch: {self.micro_batch} does not divide the {self.mini_rows} rows of a "
                f"mini-batch ({self.prompts_per_batch} x {self.samples_per_prompt} / "
                f"{self.mini_steps})"
            )
        nonnegative = ("kl_coef", "load_balance_coef", "z_coef", "bias_update_rate", "eval_every")
        nonnegative += ("overlong_buffer", "overlong_penalty", "dual_clip", "tis_cap")
        for name in (*nonnegative, "clip_high", "mismatch_limit"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: must be >= 0, got {getattr(self, name)}")
        if self.max_refills < 1:
            raise ConfigError(f"max_refills: must be >= 1, got {self.max_refills}")
        if self.dynamic_sampling and not self.filter_zero_variance:
            raise ConfigError(
                "dynamic_sampling: replaces groups without a signal, so filter_zero_variance=False "
                "contradicts it"
            )
        if not 0 <= self.clip_low <= 1:
            raise ConfigError(f"clip_low: must be in [0, 1], got {self.clip_low}")
        if self.sampling.truncated:
            raise ConfigError(
                "sampling: RL needs the log-probs of the distribution sampled from, so leave "
                "top_k, top_p, min_p and greedy off"
            )
        self._validate_family()

    def _validate_family(self) -> None:
        """Choices that contradict each other, or that nothing would read."""
        if self.overlong_buffer > self.sampling.max_tokens:
            raise ConfigError(
                f"overlong_buffer: {self.overlong_buffer} tokens are more than "
                f"sampling.max_tokens={self.sampling.max_tokens}"
            )
        if self.dual_clip and self.dual_clip <= 1:
            raise ConfigError(f"dual_clip: must be above 1 (or 0: none), got {self.dual_clip}")
        if self.dual_clip and self.surrogate == "cispo":
            raise ConfigError("dual_clip: surrogate=cispo already bounds every ratio")
        if self.tis_cap and self.scoring_pass != "always":
            raise ConfigError(
                "tis_cap: corrects the sampler's log-probs by the learner's own, so it needs "
                f"scoring_pass=always, not {self.scoring_pass}"
            )
        default = {f.name: f.default for f in dataclasses.fields(self)}
        for name, reader in (
            ("overlong_penalty", "overlong_buffer"),
            ("tis_level", "tis_cap"),
            ("kl_estimator", "kl_coef"),
            ("kl_importance", "kl_coef"),
        ):
            if getattr(self, name) != default[name] and not getattr(self, reader):
                raise ConfigError(f"{name}: {getattr(self, name)} has no effect with {reader}=0")


def policy_optim(optim: OptimConfig, model: ModelConfig) -> OptimConfig:
    """`optim` for this model: without the predictor's group where it has no predictor.

    A dense model and `predictor=False` so train by the default settings, in the modes that need
    no predictor; any other group that matches no parameter is still an error.
    """
    if num_moe_layers(model) and model.moe.predictor:
        return optim
    groups = {name: group for name, group in optim.groups.items() if name != PREDICTOR_GROUP}
    return dataclasses.replace(optim, groups=groups)


@struct.dataclass
class LearnerBatch:
    """Rows the learner trains on; [B, ...], or [n, b, ...] once split into micro-batches.

    Per-token fields are indexed by the *token* they belong to; `to_inputs` moves them to the
    input position that predicts it.

    Attributes:
      tokens: left-aligned rows.
      lengths: real tokens of each row; 0 for a row that only fills a micro-batch.
      loss_mask: 1 on sampled tokens.
      old_logprobs: log-probs under theta_old, by the sampler or by a scoring pass.
      behavior_logprobs: log-probs by the sampler.
      ref_logprobs: log-probs under the reference policy, or None.
      advantages: one a row.
      routes: recorded experts [L, B, T, K] (micro-split: [n, L, b, T, K]), or None.
      features: router features of the recorded routes, or None.
      logged: routes of the sampler that are measured against and not replayed, or None.
      shift: what the sampler selected by, p + h @ shift, or None; of the batch, not of its rows.
      lookahead: the part of `shift` that is not the predictor's, or None.
    """

    tokens: Int[Array, "B T"]
    lengths: Int[Array, " B"]
    loss_mask: Float[Array, "B T"]
    old_logprobs: Float[Array, "B T"]
    behavior_logprobs: Float[Array, "B T"]
    ref_logprobs: Float[Array, "B T"] | None
    advantages: Float[Array, " B"]
    routes: Int[Array, "L B T K"] | None
    features: RouterFeatures | None
    logged: Int[Array, "L B T K"] | None = None
    shift: Float[Array, "L D E"] | None = None
    lookahead: Float[Array, "L D E"] | None = None

    def only_rows(self) -> LearnerBatch:
        """The batch without what is not of its rows: every leaf that is left has a row axis."""
        return self.replace(shift=None, lookahead=None)

    @property
    def positions(self) -> Int[Array, "B T"]:
        """0, 1, 2, ... in every row."""
        steps = jnp.arange(self.tokens.shape[-1], dtype=jnp.int32)
        return jnp.broadcast_to(steps, self.tokens.shape)

    @property
    def segment_ids(self) -> Int[Array, "B T"]:
        """1 on real tokens, 0 on padding; from lengths alone, whatever the pad id is."""
        return (self.positions < self.lengths[..., None]).astype(jnp.int32)
