"""A scaling law of one's own: a sweep of small MoE models, the law that fits it, its forecast.

  python -m pr2jax.main --config=configs/studies/moe_law.py --workdir=DIR

starts the sweep and goes on with it, `--config.study.workers=2` runs at a time; a run that has
finished is not made again. 36 models: width 32, 48 and 64; 4, 8, 16 and 32 experts (k = 4 and a
shared one); 100, 200 and 400 steps of 2,048 tokens of the standard library's text. The joint MoE
law (arXiv 2502.05172) is fitted on all but the fifth with most compute, which it is judged by.
DIR/study.md and DIR/report.html show the forecast against the truth, and give the flags that plan
a run's stages with it, or say why it cannot; DIR/law.json has the coefficients, DIR/runs.csv the
runs.

  ... --config=configs/studies/moe_law.py:csv --config.study.runs_csv=FILE --workdir=DIR

fits runs that are there already: a table with the columns active_params (without embeddings),
tokens, experts, top_k, loss. `:smoke` sweeps 16 models of two and three steps.
"""

from pr2jax.core.config import to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.data.sources import STDLIB, SourceConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.train.config import CellConfig, Config, LoopConfig, PretrainConfig, StudyConfig

WIDTHS, POOLS, STEPS = (32, 48, 64), (4, 8, 16, 32), (100, 200, 400)


def _cell(width: int, pool: int, steps: int) -> CellConfig:
    return CellConfig(
        f"width {width}, {pool} experts, {steps} steps",
        "sweep",
        (
            f"model.d_model={width}",
            f"model.num_heads={width // 16}",
            f"model.num_kv_heads={width // 16}",
            f"model.moe.expert_dim={width // 2}",
            f"model.moe.shared_dim={width // 2}",
            f"model.moe.num_experts={pool}",
            f"pretrain.steps={steps}",
            f"pretrain.optim.total_steps={steps}",
        ),
    )


def get_config(arg: str = ""):
    """`arg`: "" (the sweep), "csv" (runs that are there) or "smoke"."""
    if arg not in ("", "csv", "smoke"):
        raise ValueError(f"{arg!r} is not csv or smoke")
    smoke = arg == "smoke"
    lengths = (2, 3) if smoke else STEPS
    cells = [_cell(w, p, n) for n in lengths for w in WIDTHS for p in POOLS]
    if smoke:
        cells = [_cell(w, p, n) for n in lengths for w in (16, 32) for p in POOLS]
    cfg = Config(
        mode="study",
        study=StudyConfig(
            kind="law",
            cells=() if arg == "csv" else tuple(cells),
            runs_csv="runs.csv" if arg == "csv" else "",
            warmup=False,
        ),
        model=ModelConfig(
            vocab_size=0,
            d_model=WIDTHS[0],
            num_layers=1 if smoke else 3,
            head_dim=16,
            moe=MoEConfig(num_experts=4, top_k=4, score="sigmoid", selection_bias=True),
            scan_layers=False,
        ),
        tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=512 if smoke else 1024),
        pretrain=PretrainConfig(
            data={"text": SourceConfig(path=STDLIB)},
            steps=lengths[0],
            batch=2 if smoke else 16,
            row_length=32 if smoke else 128,
            eval_rows=4 if smoke else 512,
            bias_update_rate=1e-3,
            optim=OptimConfig(
                learning_rate=3e-3,
                schedule="wsd",
                decay_fraction=0.2,
                final_fraction=0.02,
                warmup_steps=1 if smoke else 20,
                total_steps=lengths[0],
                b2=0.98,
                weight_decay=0.05,
            ),
        ),
        loop=LoopConfig(checkpoint_every=0, tensorboard=False),
    )
    return to_config_dict(cfg)
