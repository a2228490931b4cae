"""Samples from a checkpoint to JSONL, a line a prompt.

  python -m pr2jax.main --config=configs/generate.py --workdir=/tmp/samples \
      --config.init_from=/tmp/pr2jax_quickstart --config.generate.prompts=prompts.txt

prompts.txt holds one prompt a line; model and tokenizer are those saved with the checkpoint
(a folder of a run, or an imported one). `:smoke` takes two samples of 8 tokens.
Expect WORKDIR/samples.jsonl with text, tokens, log-probs and how each sample ended.
"""

from pr2jax.core.config import to_config_dict
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from pr2jax.train.config import Config, GenerateConfig


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    tokens = 8 if arg == "smoke" else 256
    cfg = Config(
        mode="generate",
        sampler=SamplerConfig(slots=16, max_prompt=256, max_tokens=tokens),
        generate=GenerateConfig(
            samples=2 if arg == "smoke" else 1,
            sampling=SamplingParams(temperature=1.0, max_tokens=tokens),
        ),
    )
    return to_config_dict(cfg)
