"""From nothing to PR2 in one command: pre-train with growth, SFT, then GRPO + PR2.

  python -m pr2jax.main --config=configs/emo_pr2.py --workdir=/tmp/pr2jax_emo_pr2

An MoE with route predictors is pre-trained on text while its pool grows, 4 -> 8 -> 16 experts with
k = 2 a token (WORKDIR/pretrain, a folder a stage); the result learns to spell short words
backwards by SFT, and longer ones by GRPO with predicted routes (WORKDIR/report.html). Growth takes
the predictor's columns along. Killed anywhere, the same command goes on. Bytes are the tokens, so
that one tokenizer does for text and words. `:smoke` takes two or three steps of each.
"""

import json

from pr2jax.core.config import to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.data.sources import STDLIB, SourceConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.emo.schedule import EMOConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.types import PREDICTOR_GROUP, RLConfig, predictor_group
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from pr2jax.tasks.base import TaskConfig
from pr2jax.train.config import Config, EvalConfig, LoopConfig, PretrainConfig, SFTConfig


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
        partial_credit=0.0,
    )


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    smoke = arg == "smoke"
    sampling = SamplingParams(max_tokens=9)
    pretrain_steps, sft_steps = (3, 2) if smoke else (200, 300)
    cfg = Config(
        mode="pretrain_sft_rl",
        model=ModelConfig(
            vocab_size=0,
            d_model=32 if smoke else 128,
            num_layers=2 if smoke else 4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            moe=MoEConfig(num_experts=4, top_k=2, expert_dim=64, shared_dim=128),
            scan_layers=False,
        ),
        tokenizer=TokenizerConfig(kind="byte"),
        pretrain=PretrainConfig(
            data={"text": SourceConfig(path=STDLIB)},
            steps=pretrain_steps,
            batch=2 if smoke else 16,
            row_length=64 if smoke else 256,
            eval_rows=4 if smoke else 64,
            optim=OptimConfig(
                learning_rate=3e-3,
                schedule="wsd",
                warmup_steps=1 if smoke else 20,
                total_steps=pretrain_steps,
                b2=0.98,
            ),
        ),
        emo=EMOConfig(
            experts=(4, 8, 16),
            budget="shares",
            shares=(0.34, 0.33, 0.33),
            rewarmup_steps=1 if smoke else 10,
        ),
        rl_task=_words(5, 6, 64 if smoke else 5000, 16 if smoke else 256, seed=2),
        sft=SFTConfig(
            task=_words(3, 5, 64 if smoke else 9000, 0, seed=1),
            steps=sft_steps,
            batch=8 if smoke else 16,
            row_length=96,
            optim=OptimConfig(
                learning_rate=1e-3,
                schedule="wsd",
                decay_fraction=0.8,
                final_fraction=0.35,
                warmup_steps=1 if smoke else 20,
                total_steps=sft_steps,
                b2=0.98,
            ),
        ),
        rl=RLConfig(
            steps=2 if smoke else 100,
            prompts_per_batch=8 if smoke else 64,
            samples_per_prompt=8,
            mini_steps=4,
            micro_batch=16 if smoke else 32,
            sampling=sampling,
            length_bucket=4,
            eval_every=0 if smoke else 25,
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
        loop=LoopConfig(checkpoint_every=50),
    )
    return to_config_dict(cfg)
