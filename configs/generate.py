"""Samples from a checkpoint to JSONL, a line a prompt.

  python -m pr2jax.main --config=configs/generate.py --workdir=/tmp/samples \
      --config.init_from=/tmp/pr2jax_quickstart --config.generate.prompts=prompts.txt

prompts.txt holds one prompt a line; model and tokenizer are those saved with the checkpoint.
`:smoke` needs a checkpoint too, and samples two problems of the quickstart's task.
Expect WORKDIR/samples.jsonl with the text, tokens, log-probs and how each sample ended.
"""

import dataclasses

from configs import quickstart
from pr2jax.core.config import to_config_dict
from pr2jax.train.config import Config, GenerateConfig


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
