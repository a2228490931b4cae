"""Supervised fine-tuning on solved problems, packed; the loss is on answers only.

  python -m pr2jax.main --config=configs/sft.py --workdir=/tmp/pr2jax_sft \
      --config.sft.task.name=reasoning_gym/chain_sum

From random parameters, or from --config.init_from=DIR. On sums of two and three numbers of up to
two digits expect a loss of .45 nats and a held-out pass@1 of .55 after 500 steps, seven minutes on
two busy CPU cores; WORKDIR/report.html has the curves. `:smoke` takes two steps.
"""

import json

from pr2jax.core.config import to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from pr2jax.tasks.base import TaskConfig
from pr2jax.train.config import Config, EvalConfig, SFTConfig


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    smoke = arg == "smoke"
    sampling = SamplingParams(max_tokens=16)
    steps = 2 if smoke else 500
    cfg = Config(
        mode="sft",
        model=ModelConfig(vocab_size=0, moe=MoEConfig(num_experts=16, top_k=2)),
        tokenizer=TokenizerConfig(kind="byte"),
        sft=SFTConfig(
            task=TaskConfig(
                name="reasoning_gym/chain_sum",
                settings=json.dumps({"min_terms": 2, "max_terms": 3, "max_digits": 2}),
                size=64 if smoke else 8000,
                held_out=16 if smoke else 128,
                question_regex=r": (.* =)$",
                prompt_template="{question} ",
                partial_credit=0.0,
            ),
            steps=steps,
            batch=8 if smoke else 32,
            row_length=128,
            optim=OptimConfig(
                learning_rate=2e-3,
                schedule="cosine",
                warmup_steps=1 if smoke else 20,
                total_steps=steps,
            ),
        ),
        sampler=SamplerConfig(slots=64, max_prompt=64, max_tokens=16, chunk=16),
        eval=EvalConfig(samples=4, ks=(1, 4), quick_samples=4, sampling=sampling),
    )
    return to_config_dict(cfg)
