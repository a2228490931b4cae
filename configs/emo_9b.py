"""EMO's main run in shape (arXiv 2605.13247): 16 layers, d 2048, E 8 -> 128 with k = 8, 9.9B.

  python -m pr2jax.main --config=configs/emo_9b.py --workdir=/tmp/pr2jax_emo_9b \
      --config.pretrain.data.text.path='corpus/*.parquet'

Experts of 768 units and a shared one, sigmoid scores with a selection bias, 1.1B active
parameters (1.07B where the law counts them; the law's shares are of N = 0.73B); 229,000 steps of
1,024 rows of 8,192 tokens (1.92T tokens), AdamW (0.9, 0.95), decay 0.05, peak 9e-4, WSD over the
last tenth, 500 steps of warm-up after each growth. What the paper does not say is chosen here:
attention (16 heads on 4), the vocabulary, the rate of the selection bias (1e-3).
On v5p:2x2x2 (8 chips) the batch is summed over 128 parts; a real run wants more chips and fewer.

  python -m pr2jax.main --config=configs/emo_9b.py --workdir=/tmp/check \
      --compile_only --topology=v5p:2x2x2     # every stage, in a folder each

`:smoke` takes three steps of a small model of this kind on Python's own library, growing once.
"""

from pr2jax.core.config import to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.core.sharding import MeshConfig
from pr2jax.data.sources import STDLIB, SourceConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.emo.schedule import EMOConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.train.config import Config, LoopConfig, PretrainConfig


def _moe(**sizes) -> MoEConfig:
    return MoEConfig(score="sigmoid", selection_bias=True, predictor=False, **sizes)


def _smoke() -> Config:
    return Config(
        mode="pretrain",
        model=ModelConfig(
            vocab_size=0,
            d_model=64,
            num_layers=2,
            moe=_moe(num_experts=4, top_k=4, expert_dim=32, shared_dim=32),
            remat="full",
        ),
        tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=512),
        pretrain=PretrainConfig(
            data={"text": SourceConfig(path=STDLIB)},
            steps=3,
            batch=4,
            accumulate=2,
            row_length=64,
            eval_rows=4,
            bias_update_rate=1e-3,
        ),
        emo=EMOConfig(experts=(4, 8), budget="steps", steps=(2, 1), rewarmup_steps=1),
    )


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    if arg == "smoke":
        return to_config_dict(_smoke())
    steps = 229_000
    cfg = Config(
        mode="pretrain",
        model=ModelConfig(
            vocab_size=65536,
            d_model=2048,
            num_layers=16,
            num_heads=16,
            num_kv_heads=4,
            head_dim=128,
            moe=_moe(num_experts=8, top_k=8, expert_dim=768, shared_dim=768),
            tie_embeddings=False,
            remat="full",
            logprob_chunk=1024,
        ),
        tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=65536),
        mesh=MeshConfig(expert=8),
        pretrain=PretrainConfig(
            data={"text": SourceConfig(path="corpus/*.parquet")},
            steps=steps,
            batch=1024,
            accumulate=128,
            row_length=8192,
            eval_every=1000,
            eval_rows=256,
            load_balance_coef=0.001,
            z_coef=0.0,
            bias_update_rate=1e-3,
            optim=OptimConfig(
                learning_rate=9e-4,
                schedule="wsd",
                decay_fraction=0.1,
                warmup_steps=500,
                total_steps=steps,
                weight_decay=0.05,
            ),
        ),
        emo=EMOConfig(experts=(8, 16, 32, 64, 128), law_params=0.73e9, rewarmup_steps=500),
        loop=LoopConfig(checkpoint_every=500),
    )
    return to_config_dict(cfg)
