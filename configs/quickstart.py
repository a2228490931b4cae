"""First light: a small Mixture-of-Experts learns to spell backwards by GRPO with routing replay.

  python -m pr2jax.main --config=configs/quickstart.py --workdir=/tmp/pr2jax_quickstart

It is warmed up by SFT on short words (3 to 5 letters, solved), then learns longer ones (5 and 6
letters) by GRPO + PR2 from the verifier alone, and is compared with SFT continued on short words
for the same wall time. On two CPU cores it takes six to eight minutes; held-out pass@1 goes from
.36 to .89 (seed 0), SFT continued ends at .42. `:smoke` runs two steps of each.
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


def _words(shortest: int, longest: int, size: int, held_out: int, seed: int) -> TaskConfig:
    """Put compactly: "chess>" instead of a sentence around the word."""
    return TaskConfig(
        name="reasoning_gym/spell_backward",
        settings=json.dumps({"min_word_len": shortest, "max_word_len": longest}),
        size=size,
        held_out=held_out,
        seed=seed,
        question_regex=r"example: \w+ -> \w+\): (\w+)$",
        prompt_template="{question}>",
        lowercase=True,
        # The verifier gives part of the score for a right beginning with letters too many, and a
        # policy rewarded so learns never to stop.
        partial_credit=0.0,
    )


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    smoke = arg == "smoke"
    sampling = SamplingParams(max_tokens=9)
    cfg = Config(
        mode="sft_then_rl",
        model=ModelConfig(
            vocab_size=0,
            d_model=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            moe=MoEConfig(num_experts=16, top_k=2, expert_dim=64, shared_dim=128),
            scan_layers=False,
        ),
        tokenizer=TokenizerConfig(kind="char", alphabet=">abcdefghijklmnopqrstuvwxyz"),
        rl_task=_words(5, 6, 64 if smoke else 5000, 16 if smoke else 256, seed=2),
        sft=SFTConfig(
            task=_words(3, 5, 64 if smoke else 9000, 0, seed=1),
            steps=2 if smoke else 300,
            batch=8 if smoke else 16,
            row_length=96,
            optim=OptimConfig(
                learning_rate=1e-3,
                schedule="wsd",
                decay_fraction=0.8,
                final_fraction=0.35,
                warmup_steps=20,
                total_steps=300,
                b2=0.98,
            ),
        ),
        rl=RLConfig(
            steps=2 if smoke else 300,
            prompts_per_batch=8 if smoke else 64,
            samples_per_prompt=8,
            mini_steps=4,
            micro_batch=16 if smoke else 32,
            sampling=sampling,
            length_bucket=4,
            eval_every=0 if smoke else 40,
            optim=OptimConfig(
                learning_rate=1e-4,
                warmup_steps=8,
                b2=0.98,
                groups={PREDICTOR_GROUP: predictor_group(1.0)},
            ),
        ),
        replay=ReplayConfig(mode="pr2", feature_tokens=9),
        sampler=SamplerConfig(
            slots=64 if smoke else 512,
            chunk=9,
            max_prompt=8,
            max_tokens=9,
            bucket=32,
            prefill_rows=8 if smoke else 32,
        ),
        eval=EvalConfig(
            samples=8, ks=(1, 8), quick_problems=128, quick_samples=2, sampling=sampling
        ),
        loop=LoopConfig(checkpoint_every=40),
    )
    return to_config_dict(cfg)
