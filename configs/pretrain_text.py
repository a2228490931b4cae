"""Pre-training of a small Mixture-of-Experts on text: your own files, or Python's own library.

  python -m pr2jax.main --config=configs/pretrain_text.py --workdir=/tmp/pr2jax_pretrain \
      --config.pretrain.data.text.path='books/*.txt'

Without the second line it takes the standard library's sources and texts on this machine. Text
(a document a file, or `.separator=$'\\n\\n'` between them), JSONL, parquet and ArrayRecord are told
apart by suffix. A mixture: `pretrain_text.py:books,code` has two sources,
`--config.pretrain.data.books.path=... --config.pretrain.data.books.weight=3`, and so for code.
A tokenizer of `--config.tokenizer.vocab_size` pieces is trained on the documents and cached.
Expect held-out bits per byte to fall from 3.35 to 1.94 in its 600 steps of 4,096 tokens, five
minutes on two CPU cores; WORKDIR/report.html has the curves. `:smoke` takes two steps.
Then sample: configs/generate.py with --config.init_from=WORKDIR.
"""

from pr2jax.core.config import to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.data.sources import STDLIB, SourceConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.train.config import Config, LoopConfig, PretrainConfig


def get_config(arg: str = ""):
    """`arg`: "", "smoke", or the names of the sources, with commas between."""
    smoke = arg == "smoke"
    names = [] if smoke else [name for name in arg.split(",") if name]
    steps = 2 if smoke else 600
    cfg = Config(
        mode="pretrain",
        model=ModelConfig(
            vocab_size=0,
            d_model=64 if smoke else 128,
            num_layers=2 if smoke else 4,
            moe=MoEConfig(num_experts=16, top_k=2, expert_dim=64, shared_dim=128, predictor=False),
            scan_layers=False,
        ),
        tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=512 if smoke else 4096),
        pretrain=PretrainConfig(
            data={n: SourceConfig() for n in names} or {"text": SourceConfig(path=STDLIB)},
            steps=steps,
            batch=2 if smoke else 16,
            row_length=64 if smoke else 256,
            eval_every=0 if smoke else 50,
            eval_rows=4 if smoke else 128,
            optim=OptimConfig(
                learning_rate=3e-3,
                schedule="wsd",
                decay_fraction=0.3,
                final_fraction=0.05,
                warmup_steps=1 if smoke else 30,
                total_steps=steps,
                b2=0.98,
            ),
        ),
        loop=LoopConfig(checkpoint_every=100),
    )
    return to_config_dict(cfg)
