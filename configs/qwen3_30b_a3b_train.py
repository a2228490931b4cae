"""Pre-training of Qwen3-30B-A3B, random or from its weights, on 32 TPU v5p chips (or more).

  python -m pr2jax.main --config=configs/qwen3_30b_a3b_train.py --workdir=/tmp/pr2jax_qwen3 \
      --config.pretrain.data.text.path='corpus/*.parquet'

The model's real dimensions; mesh fsdp 4 x expert 8, one row of 4,096 tokens a chip, AdamW with
fp32 parameters and both moments, every layer rematerialised. Continue from its weights with
--config.init_from=DIR, a Hugging Face folder; the tokenizer is that folder's too, else it is read
from --config.tokenizer.path. Compiled for v5p:4x4x2 it
takes 24.6 of 102.8 GB a chip (11.6 of state, 13.0 of temporaries); the same without a TPU:

  python -m pr2jax.main --config=configs/qwen3_30b_a3b_train.py --workdir=/tmp/check \
      --compile_only --topology=v5p:4x4x2

`:smoke` takes two steps of a small model of this kind on Python's own library.
"""

from pr2jax.core.config import to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.core.sharding import MeshConfig
from pr2jax.data.sources import STDLIB, SourceConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.train.config import Config, LoopConfig, PretrainConfig

MODEL = ModelConfig(
    vocab_size=151936,
    d_model=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    moe=MoEConfig(num_experts=128, top_k=8, expert_dim=768, normalize="post", predictor=False),
    qk_norm="head",
    rope_theta=1e6,
    tie_embeddings=False,
    remat="full",
    logprob_chunk=1024,
)


def _smoke() -> Config:
    return Config(
        mode="pretrain",
        model=ModelConfig(
            vocab_size=0,
            d_model=64,
            num_layers=2,
            moe=MoEConfig(num_experts=16, top_k=4, expert_dim=32, predictor=False),
            rope_theta=1e6,
            tie_embeddings=False,
            remat="full",
        ),
        tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=512),
        pretrain=PretrainConfig(
            data={"text": SourceConfig(path=STDLIB)},
            steps=2,
            batch=8,
            row_length=64,
            eval_rows=8,
        ),
    )


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    if arg == "smoke":
        return to_config_dict(_smoke())
    cfg = Config(
        mode="pretrain",
        model=MODEL,
        tokenizer=TokenizerConfig(kind="hf", path="Qwen3-30B-A3B-Base"),
        mesh=MeshConfig(fsdp=4, expert=8),
        pretrain=PretrainConfig(
            data={"text": SourceConfig(path="corpus/*.parquet")},
            steps=10000,
            batch=32,
            row_length=4096,
            eval_every=500,
            eval_rows=256,
            load_balance_coef=0.001,
            z_coef=0.0,
            optim=OptimConfig(
                learning_rate=3e-4,
                schedule="cosine",
                final_fraction=0.1,
                warmup_steps=500,
                total_steps=10000,
                weight_decay=0.1,
            ),
        ),
        loop=LoopConfig(checkpoint_every=500),
    )
    return to_config_dict(cfg)
