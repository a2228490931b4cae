"""Recipes that several configs share."""

import json

from pr2jax.core.config import to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.core.sharding import MeshConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models.config import ModelConfig
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.types import PREDICTOR_GROUP, RLConfig, predictor_group
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from pr2jax.tasks.base import TaskConfig
from pr2jax.train.config import Config, EvalConfig, LoopConfig

SUMS = TaskConfig(
    name="reasoning_gym/chain_sum",
    settings=json.dumps({"min_terms": 2, "max_terms": 2, "max_digits": 2}),
    size=64,
    held_out=8,
    question_regex=r": (.* =)$",
    prompt_template="{question} ",
)
MATH = TaskConfig(
    name="jsonl:dapo_math.jsonl",
    size=-1,
    held_out=128,
    prompt_template="{question}\nPlease reason step by step; put the final answer in \\boxed{}.\n",
)


def paper_pr2(
    arg: str,
    *,
    model: ModelConfig,
    small: ModelConfig,
    init_from: str,
    mesh: MeshConfig,
    response: int,
    feature_tokens: int,
    predictor_rate: float,
    bucket: int,
):
    """GRPO + PR2 on competition mathematics, off-2 (arXiv 2606.00395), as a `ConfigDict`.

    Args:
      arg: "" or "smoke", two steps of `small` on sums.
      response: tokens of a response at most; `feature_tokens` of them are kept for the predictor.
      predictor_rate: times the policy's learning rate.
      bucket: tokens that lengths are rounded up to.
    """
    smoke = arg == "smoke"
    prompt, response = (32, 8) if smoke else (1024, response)
    sampling = SamplingParams(temperature=1.0, max_tokens=response)
    cfg = Config(
        mode="rl",
        init_from="" if smoke else init_from,
        model=small if smoke else model,
        tokenizer=TokenizerConfig(kind="byte"),
        mesh=MeshConfig() if smoke else mesh,
        rl_task=SUMS if smoke else MATH,
        rl=RLConfig(
            steps=2 if smoke else 500,
            prompts_per_batch=8 if smoke else 32,
            samples_per_prompt=4 if smoke else 16,
            mini_steps=2,
            micro_batch=16 if smoke else 32,
            clip_low=0.2,
            clip_high=0.28,
            length_bucket=8 if smoke else bucket,
            eval_every=0 if smoke else 25,
            sampling=sampling,
            optim=OptimConfig(
                learning_rate=2e-6,
                b1=0.9,
                b2=0.98,
                weight_decay=0.1,
                groups={PREDICTOR_GROUP: predictor_group(predictor_rate)},
            ),
        ),
        replay=ReplayConfig(mode="pr2", feature_tokens=8 if smoke else feature_tokens),
        sampler=SamplerConfig(
            slots=32 if smoke else 512,
            max_prompt=prompt,
            max_tokens=response,
            bucket=32 if smoke else bucket,
            chunk=8 if smoke else 64,
            prefill_rows=8 if smoke else 32,
            unroll_layers=smoke,
        ),
        eval=EvalConfig(
            samples=2 if smoke else 8, ks=(1, 2) if smoke else (1, 8), sampling=sampling
        ),
        loop=LoopConfig(checkpoint_every=0 if smoke else 25),
    )
    return to_config_dict(cfg)
