"""GRPO + PR2 on Moonlight-16B-A3B with competition mathematics (arXiv 2606.00395 has it too).

  python -m pr2jax.main --config=configs/moonlight_16b_a3b_pr2.py --workdir=/tmp/pr2jax_moonlight \
      --config.init_from=Moonlight-16B-A3B --config.rl_task.name=jsonl:dapo_math.jsonl

`init_from` is the model's Hugging Face folder, and the rows are DAPO-math's in the Guru schema:
{"prompt": [{"role": "user", "content": "..."}], "data_source": "math__dapo",
 "reward_model": {"ground_truth": "34"}}, the answer to stand in a \\boxed{}.
32 prompts x 16 samples a batch, two mini-steps (off-2), responses of up to 1,024 tokens, router
features of all of them; AdamW at 2e-6, the predictor at 1e2 times that.
Smallest TPU v5p slice: v5p:2x2x2, 8 chips (compiled, 91.0 of 102.8 GB a chip).
--compile_only --topology=NAME compiles its programs for a slice that is not there, --estimate
counts; both work without the weights. `:smoke` takes two steps of a small model on sums.
"""

from pr2jax.core.sharding import MeshConfig
from pr2jax.models.config import MLAConfig, ModelConfig, MoEConfig
from pr2jax.train.recipes import paper_pr2

MODEL = ModelConfig(
    vocab_size=163840,
    d_model=2048,
    num_layers=27,
    num_heads=16,
    dense_dim=11264,
    first_dense=1,
    mla=MLAConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
    moe=MoEConfig(
        num_experts=64,
        top_k=6,
        expert_dim=1408,
        shared_dim=2816,
        score="sigmoid",
        normalize="post",
        selection_bias=True,
        routed_scaling=2.446,
    ),
    num_kv_heads=16,
    qk_norm="none",
    rope_theta=50000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    remat="full",
    logprob_chunk=1024,
)
SMALL = ModelConfig(
    vocab_size=0,
    d_model=64,
    num_layers=3,
    dense_dim=128,
    first_dense=1,
    mla=MLAConfig(),
    moe=MoEConfig(
        num_experts=16,
        top_k=4,
        expert_dim=32,
        shared_dim=64,
        score="sigmoid",
        normalize="post",
        selection_bias=True,
        routed_scaling=2.446,
    ),
    qk_norm="none",
    tie_embeddings=False,
    remat="full",
)


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    return paper_pr2(
        arg,
        model=MODEL,
        small=SMALL,
        init_from="Moonlight-16B-A3B",
        mesh=MeshConfig(expert=8),
        response=1024,
        feature_tokens=1024,
        predictor_rate=1e2,
        bucket=256,
    )
