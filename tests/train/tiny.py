"""A run small enough for a test: one MoE layer pair, sums of two digits."""

import dataclasses
import json

from pr2jax.core.optim import OptimConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.types import PREDICTOR_GROUP, RLConfig, predictor_group
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from pr2jax.tasks.base import TaskConfig
from pr2jax.train.config import Config, EvalConfig, LoopConfig, SFTConfig, VerifierConfig


def config(**changes) -> Config:
    """The tiny run, with top-level fields replaced."""
    task = TaskConfig(
        name="reasoning_gym/chain_sum",
        settings=json.dumps({"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
        size=48,
        held_out=8,
        question_regex=r": (.* =)$",
        prompt_template="{question} ",
        partial_credit=0.0,
    )
    sampling = SamplingParams(max_tokens=4)
    cfg = Config(
        mode="rl",
        model=ModelConfig(
            vocab_size=0,
            d_model=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            moe=MoEConfig(num_experts=8, top_k=2, expert_dim=16),
        ),
        tokenizer=TokenizerConfig(kind="char", alphabet="0123456789+-= "),
        sft=SFTConfig(task=task, steps=4, batch=8, row_length=32),
        rl_task=task,
        rl=RLConfig(
            steps=4,
            prompts_per_batch=8,
            samples_per_prompt=4,
            mini_steps=2,
            micro_batch=8,
            filter_zero_variance=False,
            length_bucket=8,
            eval_every=2,
            sampling=sampling,
            optim=OptimConfig(learning_rate=1e-3, groups={PREDICTOR_GROUP: predictor_group(10.0)}),
        ),
        replay=ReplayConfig(mode="pr2", feature_tokens=4),
        sampler=SamplerConfig(
            slots=32, chunk=4, max_prompt=16, max_tokens=4, bucket=16, prefill_rows=8
        ),
        eval=EvalConfig(samples=2, ks=(1, 2), quick_samples=2, sampling=sampling),
        verifier=VerifierConfig(workers=1),
        loop=LoopConfig(checkpoint_every=2, tensorboard=False),
    )
    return dataclasses.replace(cfg, **changes)
