"""lm-evaluation-harness with a checkpoint of this project, through its model plug-in interface.

    python -m pr2jax.train.lm_eval run --model pr2jax \
        --model_args checkpoint=RUN,max_length=2048 --tasks NAME --include_path FOLDER

is the harness's own command with the model "pr2jax" added; `import pr2jax.train.lm_eval` adds it to
`lm_eval.simple_evaluate(model="pr2jax", ...)`. Needs `pip install 'pr2jax[lm_eval]'`.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from pr2jax.train.harness import open_model

log = logging.getLogger("pr2jax")


@register_model("pr2jax")
class PR2JaxLM(LM):
    """model_args: checkpoint (what `init_from` takes); max_length, max_gen_toks, slots, dtype
    (see `harness.HarnessModel`). The harness's own batch_size are the rows scored together; its
    device is PyTorch's and comes with every command: JAX's devices are used, as the log says."""

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str = 8,
        max_length: int = 2048,
        max_gen_toks: int = 256,
        slots: int = 32,
        dtype: str = "auto",
        device: str | None = None,
    ):
        super().__init__()
        if device is not None:
            log.info("device %s is PyTorch's: JAX uses %s", device, jax.devices()[0])
        self.checkpoint = checkpoint
        self.model = open_model(
            checkpoint,
            dtype=dtype,
            batch_size=8 if str(batch_size).startswith("auto") else int(batch_size),
            max_length=int(max_length),
            max_gen_toks=int(max_gen_toks),
            slots=int(slots),
        )

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of each (context, continuation)."""
        return self._remember("loglikelihood", requests, self.model.loglikelihood)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log-probability of each (text,)."""
        texts = lambda all_args: self.model.loglikelihood_rolling([text for (text,) in all_args])
        return self._remember("loglikelihood_rolling", requests, texts)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """What follows each (context, gen_kwargs)."""
        return self._remember("generate_until", requests, self.model.generate_until)

    def _remember(self, kind: str, requests: list[Any], answer: Any) -> list[Any]:
        """The answers, in the harness's cache too where it keeps one."""
        found = answer([request.args for request in requests])
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial(kind, request.args, value)
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as a text that the model knows (`HarnessModel.apply_chat_template`)."""
        return self.model.apply_chat_template(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """Tells the harness's caches of prompts apart."""
        return f"pr2jax {self.checkpoint}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's template is used, whatever its name."""
        return "" if self.model.session.tokenizer.chat is None else "the tokenizer's own"


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
