"""First light: a small Mixture-of-Experts learns arithmetic by GRPO with routing replay.

python -m pr2jax.main --config=configs/quickstart.py --workdir=/tmp/pr2jax_quickstart
"""

import json

from pr2jax.core.config import to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.types import PREDICTOR_GROUP, RLConfig, predictor_group
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from pr2jax.tasks.base import TaskConfig
from pr2jax.train.config import Config, EvalConfig, LoopConfig, SFTConfig


def task(size: int, held_out: int, seed: int, **settings) -> TaskConfig:
    """Sums put compactly: "12 + 7 =" instead of a sentence around it."""
    return TaskConfig(
        name="reasoning_gym/chain_sum",
        settings=json.dumps(settings),
        size=size,
        held_out=held_out,
        seed=seed,
        question_regex=r": (.* =)$",
        prompt_template="{question} ",
        partial_credit=False,
    )


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    smoke = arg == "smoke"
    easy = task(64 if smoke else 4000, 0, 1, min_terms=2, max_terms=2, min_digits=1, max_digits=2)
    hard = task(
        64 if smoke else 4000,
        16 if smoke else 200,
        2,
        min_terms=3,
        max_terms=3,
        min_digits=1,
        max_digits=1,
    )
    sampling = SamplingParams(max_tokens=8)
    cfg = Config(
        mode="sft_then_rl",
        model=ModelConfig(
            vocab_size=0,
            d_model=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            moe=MoEConfig(num_experts=16, top_k=2, expert_dim=128),
            scan_layers=False,
        ),
        tokenizer=TokenizerConfig(kind="char", alphabet="0123456789+-= "),
        rl_task=hard,
        sft=SFTConfig(
            task=easy,
            steps=2 if smoke else 300,
            batch=8 if smoke else 32,
            row_length=128,
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=20, weight_decay=0.01),
        ),
        rl=RLConfig(
            steps=2 if smoke else 60,
            prompts_per_batch=8 if smoke else 64,
            samples_per_prompt=8,
            mini_steps=4,
            micro_batch=16 if smoke else 128,
            sampling=sampling,
            length_bucket=8,
            eval_every=0 if smoke else 20,
            optim=OptimConfig(
                learning_rate=3e-4,
                warmup_steps=8,
                groups={PREDICTOR_GROUP: predictor_group(10.0)},
            ),
        ),
        replay=ReplayConfig(mode="pr2", feature_tokens=8),
        sampler=SamplerConfig(
            slots=64 if smoke else 512,
            chunk=8,
            max_prompt=24,
            max_tokens=8,
            bucket=32,
            prefill_rows=8 if smoke else 64,
        ),
        eval=EvalConfig(
            samples=8, ks=(1, 8), quick_problems=100, quick_samples=4, sampling=sampling
        ),
        loop=LoopConfig(checkpoint_every=20),
    )
    return to_config_dict(cfg)
