"""The whole of a run's configuration, and what must hold between its parts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from pr2jax.core.config import ConfigError
from pr2jax.core.optim import OptimConfig
from pr2jax.core.sharding import MeshConfig
from pr2jax.data.sources import SourceConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.emo.schedule import EMOConfig
from pr2jax.evaluation.suites import EvaluationConfig
from pr2jax.models.config import ModelConfig
from pr2jax.models.upcycling import UpcycleConfig
from pr2jax.replay.modes import ReplayConfig, check_model, plan
from pr2jax.rl.types import PREDICTOR_GROUP, RLConfig
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from pr2jax.tasks.base import TaskConfig
from pr2jax.tasks.filters import CurateConfig
from pr2jax.train.study_config import CellConfig as CellConfig  # configs name it from here
from pr2jax.train.study_config import GenerateConfig, PlanConfig, RegimeConfig, StudyConfig
from pr2jax.train.verifier_config import VerifierConfig

Mode = Literal[
    "sft",
    "rl",
    "sft_then_rl",
    "generate",
    "pretrain",
    "pretrain_sft_rl",
    "study",
    "difficulty",
    "plan",
    "eval",
    "curate",
]


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-training on documents, packed into rows that leave no slot empty.

    Attributes:
      data: the sources by name; their weights are shares of the training rows.
      held_out: share of each source's documents that is never trained on (at least one document).
      steps: optimizer steps.
      batch: packed rows a step, over all hosts.
      accumulate: parts of the batch whose gradients are summed one after another, for memory.
      parts: streams that the documents are dealt into, each read by the hosts whose rows come from
        it (0: as many as the run's first start has hosts); batches are a function of it.
      row_length: tokens a row.
      eval_every: steps between held-out evaluations (0: only before and after).
      eval_rows: rows of held-out text to score, about; divided over the sources by weight.
      max_skipped_in_row: non-finite steps in a row that stop the run.
      load_balance_coef, z_coef: weights of the router's auxiliary losses (mean over MoE layers).
      bias_update_rate: step of the selection bias after each update (0: none; needs such a
        router).
    """

    data: dict[str, SourceConfig] = field(default_factory=lambda: {"text": SourceConfig()})
    held_out: float = 0.02
    steps: int = 1000
    batch: int = 16
    accumulate: int = 1
    parts: int = 0
    row_length: int = 256
    eval_every: int = 0
    eval_rows: int = 128
    max_skipped_in_row: int = 5
    load_balance_coef: float = 0.01
    z_coef: float = 0.001
    bias_update_rate: float = 0.0
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=2e-3, warmup_steps=20)
    )

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        if not self.data:
            raise ConfigError("data: no source")
        for name in self.data:
            if "/" in name:
                raise ConfigError(f"data.{name}: a name has no slash")
        if not 0.0 < self.held_out < 1.0:
            raise ConfigError(f"held_out: must lie between 0 and 1, got {self.held_out}")
        if self.row_length < 2:
            raise ConfigError(f"row_length: must be at least 2, got {self.row_length}")
        for key in ("steps", "batch", "accumulate", "eval_rows", "max_skipped_in_row"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: must be at least 1, got {getattr(self, key)}")
        if self.batch % self.accumulate:
            raise ConfigError(f"accumulate: {self.accumulate} does not divide batch={self.batch}")
        for key in ("eval_every", "parts", "load_balance_coef", "z_coef", "bias_update_rate"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key}: must be >= 0, got {getattr(self, key)}")
        if self.parts and self.batch % self.parts:
            raise ConfigError(f"parts: {self.parts} does not divide batch={self.batch}")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on solved problems, packed; the loss is on answers only.

    Attributes:
      task: its training problems, whose solutions are learned.
      steps: optimizer steps.
      batch: packed rows a step.
      row_length: tokens a row.
      eval_every: steps between held-out evaluations (0: only at the end).
      max_skipped_in_row: non-finite steps in a row that stop the run.
      load_balance_coef, z_coef: weights of the router's auxiliary losses (mean over MoE layers).
      bias_update_rate: step of the selection bias after each update (0: none; needs such a
        router).
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    steps: int = 200
    batch: int = 16
    row_length: int = 256
    eval_every: int = 0
    max_skipped_in_row: int = 5
    load_balance_coef: float = 0.01
    z_coef: float = 0.0
    bias_update_rate: float = 0.0
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=2e-3, warmup_steps=20)
    )

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        for key in ("steps", "batch", "row_length", "max_skipped_in_row"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: must be at least 1, got {getattr(self, key)}")
        for key in ("eval_every", "load_balance_coef", "z_coef", "bias_update_rate"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key}: must be >= 0, got {getattr(self, key)}")


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation: n samples a problem, pass@k for each k, intervals over problems.

    `quick_problems` (0: all) and `quick_samples` bound the evaluations made while training.

    Attributes:
      samples: n of a full evaluation.
      ks: the k of pass@k; none above samples.
      transcripts: prompts and responses, before and after, that the report shows.
    """

    samples: int = 8
    ks: tuple[int, ...] = (1, 8)
    quick_problems: int = 0
    quick_samples: int = 4
    transcripts: int = 8
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        if not self.ks or min(self.ks) < 1 or max(self.ks) > self.samples:
            raise ConfigError(f"ks: {self.ks} must lie between 1 and samples={self.samples}")
        for key in ("samples", "quick_samples"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: must be at least 1, got {getattr(self, key)}")
        for key in ("quick_problems", "transcripts"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key}: must be >= 0, got {getattr(self, key)}")


@dataclass(frozen=True)
class LoopConfig:
    """Checkpoints and logs.

    checkpoint_every counts steps (0: only at the end and on interruption); `keep` of the latest
    are kept besides the best. Metrics are read from the device every log_every steps.
    save_routes writes each rollout batch's routes as a TensorStore array. journal keeps each
    rollout batch on disk, recorded router features included, until no checkpoint needs it: a run
    that was killed never samples or grades a batch twice.

    Attributes:
      tensorboard: write the metrics for TensorBoard, too.
      watchdog_factor: a step that takes more than so many times the median of the earlier ones
        leaves all threads' stacks in WORKDIR/stacks and goes on (0: never).
      watchdog_min_s: seconds that a step may take in any case.
    """

    checkpoint_every: int = 50
    keep: int = 2
    log_every: int = 1
    tensorboard: bool = True
    save_routes: bool = False
    journal: bool = True
    watchdog_factor: float = 10.0
    watchdog_min_s: float = 60.0

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        if self.checkpoint_every < 0:
            raise ConfigError(f"checkpoint_every: must be >= 0, got {self.checkpoint_every}")
        for key in ("keep", "log_every"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: must be at least 1, got {getattr(self, key)}")
        if self.watchdog_factor and not self.watchdog_factor >= 1.0:
            raise ConfigError(f"watchdog_factor: 0 or at least 1, got {self.watchdog_factor}")
        if not self.watchdog_min_s >= 0.0:
            raise ConfigError(f"watchdog_min_s: must be >= 0, got {self.watchdog_min_s}")


@dataclass(frozen=True)
class Config:
    """One run.

    mode: what it does. `sft` and `rl` are single stages; `sft_then_rl` warms up by SFT, then RL,
      compares with SFT continued for the same wall time, and writes a report; `generate` samples;
      `pretrain` learns the next token of documents, in stages of a growing pool of experts where
      emo.experts names them; `pretrain_sft_rl` does that in WORKDIR/pretrain, then `sft_then_rl`
      with the model that came out of it; `difficulty` measures how hard rl_task's problems are;
      `plan` says how to spend a budget of rollouts;
      `eval` compares checkpoints on suites of tasks; `curate` chooses rows to train on, without
      what is repeated, leaked or of the wrong difficulty.
    seed: of everything random: parameters, order of problems, sampling.
    model.vocab_size: 0 takes the tokenizer's.
    compute_dtype: auto, bfloat16 or float32 (core/device.py).
    init_from: what to start from: another run's folder (its best checkpoint, else its latest), an
      imported or Hugging Face folder, a .gguf file, or "package:NAME", the .gguf file of an
      installed Python package. The model is then the one found there, and so is the tokenizer,
      where a run's folder says it or none is configured.
    upcycle: makes a dense `init_from` sparse (upcycle.experts=0: it stays as it is).
    rl_task: what RL is about; its held-out problems are what every mode evaluates.
    rl_problems: a JSONL file with the `id`s of the only problems of rl_task to learn from and to
      evaluate, such as mode `difficulty` writes (empty: all).
    regime: what mode `difficulty` measures of rl_task's problems, and which it chooses.
    rl_plan: a plan.json of mode `plan`, or its folder (empty: none): samples, prompts, steps and
      learning rate of `rl` are the plan's, strictly on-policy (train/plan.py).
    """

    mode: Mode = "rl"
    seed: int = 0
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    init_from: str = ""
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    emo: EMOConfig = field(default_factory=EMOConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    rl_task: TaskConfig = field(default_factory=TaskConfig)
    rl_problems: str = ""
    rl_plan: str = ""
    regime: RegimeConfig = field(default_factory=RegimeConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    curate: CurateConfig = field(default_factory=CurateConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def validate(self) -> None:
        """What no part can see alone. Raises ConfigError("key: why")."""
        if self.mode == "pretrain_sft_rl":
            if self.init_from:
                raise ConfigError("init_from: mode 'pretrain_sft_rl' starts from nothing")
            for part in self.parts("pretrain"):
                part.validate()
            return
        used = [("eval.sampling", self.eval.sampling)]
        if self.mode in ("rl", "sft_then_rl"):
            used.append(("rl.sampling", self.rl.sampling))
        if self.mode == "curate" and self.curate.difficulty != "models":
            used = []
        if self.mode == "generate":
            used = [("generate.sampling", self.generate.sampling)]
        if self.mode == "eval":
            used = []  # the suites say how they sample
            for key in ("checkpoints", "suites"):
                if not getattr(self.evaluation, key):
                    raise ConfigError(f"evaluation.{key}: mode 'eval' needs at least one")
        for key, sampling in used:
            if sampling.max_tokens > self.sampler.max_tokens:
                raise ConfigError(
                    f"{key}.max_tokens: {sampling.max_tokens} is more than the sampler's room, "
                    f"sampler.max_tokens={self.sampler.max_tokens}"
                )
        if self.mode in ("rl", "sft_then_rl"):
            self._validate_rl()
        if self.mode == "sft_then_rl" and (self.sft.eval_every or self.sft.task.held_out_size):
            raise ConfigError(
                "sft.task.held_out: mode 'sft_then_rl' evaluates rl_task's; leave it and "
                "sft.eval_every at 0"
            )
        if self.emo.experts and self.mode != "pretrain":
            raise ConfigError(f"emo.experts: mode {self.mode!r} grows nothing; leave them empty")
        biased = self.model.moe is not None and self.model.moe.selection_bias
        if self.mode in ("sft", "sft_then_rl") and self.sft.bias_update_rate and not biased:
            raise ConfigError("sft.bias_update_rate: the model's router has no selection bias")
        if self.mode == "pretrain" and self.pretrain.bias_update_rate and not biased:
            raise ConfigError("pretrain.bias_update_rate: the model's router has no selection bias")
        replays = self.mode == "study" and self.study.kind in ("replay", "budget")
        pretrains = self.mode == "pretrain" or (self.mode == "study" and not replays)
        if self.tokenizer.untrained and not pretrains and not self.init_from:
            raise ConfigError("tokenizer.path: only mode 'pretrain' trains a tokenizer")
        if self.mode == "study" and not (self.study.cells or self.study.runs_csv):
            raise ConfigError("study.cells: mode 'study' needs at least one")
        budget = self.mode == "study" and self.study.kind == "budget"
        if budget and self.eval.quick_samples not in self.eval.ks:
            raise ConfigError(
                f"eval.ks: must hold eval.quick_samples={self.eval.quick_samples}: kind 'budget' "
                "reads best@k and worst@k of it"
            )
        if replays and self.study.steady_from >= self.rl.steps:
            raise ConfigError(f"study.steady_from: leaves nothing of rl.steps={self.rl.steps}")
        if self.mode == "generate" and not (self.generate.prompts or self.generate.task):
            raise ConfigError("generate.prompts: mode 'generate' needs prompts, or generate.task")
        if self.upcycle.experts and not self.init_from:
            raise ConfigError("upcycle.experts: init_from must give the dense model to upcycle")
        if self.mode == "generate" and not self.init_from:
            raise ConfigError("init_from: mode 'generate' needs a checkpoint to sample from")

    def parts(self, pretrained: str) -> tuple[Config, Config]:
        """What mode `pretrain_sft_rl` runs: pre-training, and SFT and RL of `pretrained`."""
        after = dataclasses.replace(self, mode="sft_then_rl", init_from=pretrained, emo=EMOConfig())
        return dataclasses.replace(self, mode="pretrain"), after

    def _validate_rl(self) -> None:
        check_model(self.replay, self.model)
        todo = plan(self.replay)
        if todo.predictor and PREDICTOR_GROUP not in self.rl.optim.groups:
            raise ConfigError(
                f"rl.optim.groups.{PREDICTOR_GROUP}: replay.mode={self.replay.mode!r} trains W_p, "
                "which needs a learning rate of its own"
            )
        if todo.lookahead and self.rl.optim.optimizer != "adamw":
            raise ConfigError("rl.optim.optimizer: replay.mode 'lookahead' reads Adam's moments")
        if 0 <= self.rl_task.train_size < self.rl.prompts_per_batch:
            raise ConfigError(
                f"rl_task.size: {self.rl_task.train_size} problems do not fill one batch of "
                f"rl.prompts_per_batch={self.rl.prompts_per_batch}"
            )


def with_vocab_size(cfg: Config, vocab_size: int) -> Config:
    """`cfg` with model.vocab_size filled in from the tokenizer where it is 0.

    Raises ConfigError where the model has fewer embeddings than the tokenizer has ids.
    """
    if cfg.model.vocab_size == 0:
        return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))
    if cfg.model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size: {cfg.model.vocab_size} embeddings for a tokenizer of {vocab_size}"
        )
    return cfg
