"""GRPO + PR2 on OLMoE-1B-7B with competition mathematics: arXiv 2606.00395's smallest model.

  python -m pr2jax.main --config=configs/olmoe_1b_7b_pr2.py --workdir=/tmp/pr2jax_olmoe_pr2 \
      --config.init_from=OLMoE-1B-7B-0924 --config.rl_task.name=jsonl:dapo_math.jsonl

`init_from` is the model's Hugging Face folder, and the rows are DAPO-math's in the Guru schema:
{"prompt": [{"role": "user", "content": "..."}], "data_source": "math__dapo",
 "reward_model": {"ground_truth": "34"}}, the answer to stand in a \\boxed{}.
32 prompts x 16 samples a batch, two mini-steps (off-2), responses of up to 1,024 tokens, router
features of all of them; AdamW at 2e-6, the predictor at 1e3 times that.
Its smallest TPU v5p slice is v5p:2x2x2, 8 chips: compiled, it takes 60.5 of 102.8 GB a chip (half
of them, by estimate, would want 105).
--compile_only --topology=NAME compiles its programs for a slice that is not there, --estimate
counts; both work without the weights. `:smoke` takes two steps of a small model on sums.
"""

import json

from pr2jax.core.config import to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.core.sharding import MeshConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.types import PREDICTOR_GROUP, RLConfig, predictor_group
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from pr2jax.tasks.base import TaskConfig
from pr2jax.train.config import Config, EvalConfig, LoopConfig

MODEL = ModelConfig(
    vocab_size=50304,
    d_model=2048,
    num_layers=16,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    moe=MoEConfig(num_experts=64, top_k=8, expert_dim=1024, normalize="none"),
    qk_norm="full",
    norm_eps=1e-5,
    tie_embeddings=False,
    remat="full",
    logprob_chunk=1024,
)
SMALL = ModelConfig(
    vocab_size=0,
    d_model=64,
    num_layers=2,
    num_kv_heads=4,
    moe=MoEConfig(num_experts=16, top_k=4, expert_dim=32, normalize="none"),
    qk_norm="full",
    tie_embeddings=False,
    remat="full",
)
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


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    smoke = arg == "smoke"
    prompt, response = (32, 8) if smoke else (1024, 1024)
    sampling = SamplingParams(temperature=1.0, max_tokens=response)
    cfg = Config(
        mode="rl",
        init_from="" if smoke else "OLMoE-1B-7B-0924",
        model=SMALL if smoke else MODEL,
        tokenizer=TokenizerConfig(kind="byte"),
        mesh=MeshConfig() if smoke else MeshConfig(expert=8),
        rl_task=SUMS if smoke else MATH,
        rl=RLConfig(
            steps=2 if smoke else 500,
            prompts_per_batch=8 if smoke else 32,
            samples_per_prompt=4 if smoke else 16,
            mini_steps=2,
            micro_batch=16 if smoke else 32,
            clip_low=0.2,
            clip_high=0.28,
            length_bucket=8 if smoke else 256,
            eval_every=0 if smoke else 25,
            sampling=sampling,
            optim=OptimConfig(
                learning_rate=2e-6,
                b1=0.9,
                b2=0.98,
                weight_decay=0.1,
                groups={PREDICTOR_GROUP: predictor_group(1e3)},
            ),
        ),
        replay=ReplayConfig(mode="pr2", feature_tokens=8 if smoke else 1024),
        sampler=SamplerConfig(
            slots=32 if smoke else 512,
            max_prompt=prompt,
            max_tokens=response,
            bucket=32 if smoke else 256,
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
