"""GRPO + PR2 on Qwen3-30B-A3B-Base with competition mathematics: the recipe of arXiv 2606.00395.

  python -m pr2jax.main --config=configs/qwen3_30b_a3b_pr2.py --workdir=/tmp/pr2jax_qwen3_pr2 \
      --config.init_from=Qwen3-30B-A3B-Base --config.rl_task.name=jsonl:dapo_math.jsonl

`init_from` is the model's Hugging Face folder, and the rows are DAPO-math's in the Guru schema:
{"prompt": [{"role": "user", "content": "..."}], "data_source": "math__dapo",
 "reward_model": {"ground_truth": "34"}}, the answer to stand in a \\boxed{}.
32 prompts x 16 samples a batch, two mini-steps (off-2), responses of up to 16,384 tokens, router
features of 2,048 of them; AdamW at 2e-6, the predictor at 1e4 times that.
Its smallest TPU v5p slice is v5p:4x4x2, 32 chips: compiled, it takes 93.3 of 102.8 GB a chip
(half of them, by estimate, would want 159).
--compile_only --topology=NAME compiles its programs for a slice that is not there, --estimate
counts; both work without the weights. `:smoke` takes two steps of a small model on sums.
"""

from pr2jax.core.sharding import MeshConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.train.recipes import paper_pr2

MODEL = ModelConfig(
    vocab_size=151936,
    d_model=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    moe=MoEConfig(num_experts=128, top_k=8, expert_dim=768, normalize="post"),
    qk_norm="head",
    rope_theta=1e6,
    tie_embeddings=False,
    remat="full",
    logprob_chunk=1024,
)
SMALL = ModelConfig(
    vocab_size=0,
    d_model=64,
    num_layers=2,
    moe=MoEConfig(num_experts=16, top_k=4, expert_dim=32),
    rope_theta=1e6,
    tie_embeddings=False,
    remat="full",
)


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    return paper_pr2(
        arg,
        model=MODEL,
        small=SMALL,
        init_from="Qwen3-30B-A3B-Base",
        mesh=MeshConfig(fsdp=4, expert=8),
        response=16384,
        feature_tokens=2048,
        predictor_rate=1e4,
        bucket=1024,
    )
