"""EMO: pre-training on text whose pool of experts grows, 4 -> 8 -> 16 -> 32 with k = 4 a token.

  python -m pr2jax.main --config=configs/emo_text.py --workdir=/tmp/pr2jax_emo

The stages' lengths come from a scaling law (arXiv 2605.13247 on 2502.05172); the plan is printed
before anything runs. `--config.emo.budget=shares --config.emo.shares='(0.4,0.3,0.2,0.1)'` sets
them by hand, `--config.emo.growth.init=copy_noise` changes how newborns start, and
`--config.emo.growth.init=masked_copy --config.emo.unmask_steps=10` leaves the function as it is
at growth. Data and tokenizer as in configs/pretrain_text.py. Each stage has a folder of its own
(WORKDIR/stage_N) whose checkpoint restores by itself, as in configs/generate.py with
--config.init_from=WORKDIR/stage_3. WORKDIR/report.html shows stages, jumps and expert usage.
`:smoke` takes four steps, growing twice.
"""

from pr2jax.core.config import to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.data.sources import STDLIB, SourceConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.emo.expansion import GrowthConfig
from pr2jax.emo.schedule import EMOConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.train.config import Config, LoopConfig, PretrainConfig


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    smoke = arg == "smoke"
    steps = 4 if smoke else 600
    cfg = Config(
        mode="pretrain",
        model=ModelConfig(
            vocab_size=0,
            d_model=64 if smoke else 128,
            num_layers=2 if smoke else 4,
            moe=MoEConfig(num_experts=4, top_k=4, expert_dim=64, shared_dim=64, predictor=False),
            scan_layers=False,
        ),
        tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=512 if smoke else 4096),
        pretrain=PretrainConfig(
            data={"text": SourceConfig(path=STDLIB)},
            steps=steps,
            batch=2 if smoke else 16,
            row_length=64 if smoke else 256,
            eval_every=0 if smoke else 50,
            eval_rows=4 if smoke else 128,
            optim=OptimConfig(
                learning_rate=3e-3,
                schedule="wsd",
                decay_fraction=0.2,
                final_fraction=0.05,
                warmup_steps=1 if smoke else 30,
                total_steps=steps,
                b2=0.98,
            ),
        ),
        emo=EMOConfig(
            experts=(4, 8, 16) if smoke else (4, 8, 16, 32),
            budget="steps" if smoke else "law",
            steps=(2, 1, 1) if smoke else (),
            growth=GrowthConfig(),
            rewarmup_steps=1 if smoke else 15,
        ),
        loop=LoopConfig(checkpoint_every=100),
    )
    return to_config_dict(cfg)
