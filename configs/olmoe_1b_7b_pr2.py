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

from pr2jax.core.sharding import MeshConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.train.recipes import paper_pr2

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


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    return paper_pr2(
        arg,
        model=MODEL,
        small=SMALL,
        init_from="OLMoE-1B-7B-0924",
        mesh=MeshConfig(expert=8),
        response=1024,
        feature_tokens=1024,
        predictor_rate=1e3,
        bucket=256,
    )
