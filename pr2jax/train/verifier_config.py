"""Who scores responses: worker processes, their sandbox, and a model judge."""

from __future__ import annotations

import dataclasses

from pr2jax.core.config import ConfigError
from pr2jax.sampler.types import SamplerConfig
from pr2jax.tasks.judge import JudgeConfig
from pr2jax.tasks.sandbox import SandboxConfig


@dataclasses.dataclass(frozen=True)
class VerifierConfig:
    """Worker processes that score responses.

    Attributes:
      workers: how many.
      timeout_s, memory_mb: limits of a worker for one response; sandbox.total_s comes on top of the
        first where programs are run.
      sandbox: limits and isolation of the programs that responses contain.
      judge: the model that grades answers which no rule decides.
      judge_from: judge.kind "sampler": what `init_from` is for the policy, for the judge.
      judge_sampler: its sampler's shapes; prompts hold a question, a reference and an answer.
    """

    workers: int = 2
    timeout_s: float = 5.0
    memory_mb: int = 2048
    sandbox: SandboxConfig = dataclasses.field(default_factory=SandboxConfig)
    judge: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)
    judge_from: str = ""
    judge_sampler: SamplerConfig = dataclasses.field(
        default_factory=lambda: SamplerConfig(slots=16, max_prompt=4096, max_tokens=1024)
    )

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        for key in ("workers", "timeout_s", "memory_mb"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"{key}: must be above 0, got {getattr(self, key)}")
        if (self.judge.kind == "sampler") != bool(self.judge_from):
            raise ConfigError(
                f"judge_from: judge.kind={self.judge.kind!r} and judge_from={self.judge_from!r}; "
                "kind 'sampler', and it alone, needs a model to judge with"
            )
        if self.judge.kind == "sampler" and self.judge.max_tokens > self.judge_sampler.max_tokens:
            raise ConfigError(
                f"judge_sampler.max_tokens: {self.judge_sampler.max_tokens}, less than "
                f"judge.max_tokens={self.judge.max_tokens}"
            )
