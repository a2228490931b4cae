"""What a verifier may need beside the problem and the response; made once a process."""

from __future__ import annotations

import dataclasses
import functools

from pr2jax.tasks.sandbox import Sandbox, SandboxConfig


@dataclasses.dataclass(frozen=True)
class Tools:
    """Settings of the tools, which are opened on first use."""

    sandbox_config: SandboxConfig = dataclasses.field(default_factory=SandboxConfig)

    @functools.cached_property
    def sandbox(self) -> Sandbox:
        """The code sandbox. Raises SandboxError where this machine cannot isolate programs."""
        return Sandbox(self.sandbox_config)
