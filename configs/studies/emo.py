"""Does a pool of experts that grows end as well as one that was large from the start?

  python -m pr2jax.main --config=configs/studies/emo.py --workdir=DIR

starts the study and goes on with it, `--config.study.workers=2` runs at a time. `:growth` runs
its first group only, `:ablation` the second, `:smoke` three tiny cells. Read DIR/study.md and
DIR/report.html; DIR/study.json holds every figure. EMO is arXiv 2605.13247.

Text is the standard library's; a small MoE (3 layers, d = 64, experts of 32, k = 4 and a shared
expert; sigmoid scores, selection bias) learns 1,000 steps of 32 rows of 128 tokens (4,096 tokens a
step, 4.1M in all), WSD with its decay over the last 20%. All arms of a seed see the same batches.

1. "growth", three seeds: the pool grows 4 -> 8 -> 16 -> 32 by the law's budgets, against fixed
   pools of 4, 16 and 32 at the same tokens; and a fixed 32 that has the same re-warm-ups of its
   learning rate, since these alone change the loss.
2. "one growth, 8 -> 16 at step 150 of 400", three seeds: how newborns start, and what becomes of
   the optimizer's moments.

Hypotheses, written down before the run:

1. Larger fixed pools end lower: 32 < 16 < 4. EMO lies between 16 and 32, nearer to 32 (the paper:
   within 2.3% of the largest, and below half its size).
2. EMO takes less time than fixed 32; predicted from step times, measured to within noise.
3. Newborns: the final losses are equal within seeds; the jumps are not. `masked_copy` jumps by 0.
4. Moments: no difference at the end.
"""

from pr2jax.core.config import to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.data.sources import STDLIB, SourceConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.emo.schedule import EMOConfig, boundaries
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.train.config import CellConfig, Config, LoopConfig, PretrainConfig, StudyConfig

STAGES = (4, 8, 16, 32)
STEPS, REWARMUP, VOCABULARY = 1000, 20, 1024
NEWBORNS = ("gaussian", "gaussian_bias_reset", "copy", "copy_noise", "masked_copy")


def _model(smoke: bool, vocab_size: int = 0) -> ModelConfig:
    width = 32 if smoke else 64
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=width,
        num_layers=2 if smoke else 3,
        num_heads=width // 16,
        num_kv_heads=width // 16,
        head_dim=16,
        moe=MoEConfig(
            num_experts=4,
            top_k=4,
            expert_dim=width // 2,
            shared_dim=width // 2,
            score="sigmoid",
            selection_bias=True,
            predictor=False,
        ),
        scan_layers=False,
    )


def _growing(stages: tuple[int, ...], **settings: str) -> tuple[str, ...]:
    listed = "[" + ",".join(map(str, stages)) + "]"
    own = tuple(f"emo.{key}={value}" for key, value in settings.items())
    return (f"emo.experts={listed}", f"model.moe.num_experts={stages[0]}", *own)


def _growth_cells() -> list[CellConfig]:
    law = EMOConfig(experts=STAGES)
    starts = boundaries(law, _model(False, VOCABULARY), STEPS)[:-1]
    again = (f"pretrain.optim.rewarmup_at={starts}", f"pretrain.optim.rewarmup_steps={REWARMUP}")
    fixed = lambda experts: f"model.moe.num_experts={experts}"
    cell = lambda name, *overrides, against="fixed 32": CellConfig(
        name, "growth", overrides, seeds=3, against=against
    )
    return [
        cell("EMO", *_growing(STAGES)),
        cell("fixed 32", fixed(32), against=""),
        cell("fixed 16", fixed(16)),
        cell("fixed 4", fixed(4)),
        cell("fixed 32, re-warmed", fixed(32), *again),
    ]


def _ablation_cells() -> list[CellConfig]:
    steps = ("pretrain.steps=400", "pretrain.optim.total_steps=400")
    stages = _growing((8, 16), budget="steps", steps="[150,250]")
    cells = []
    for init in NEWBORNS:
        own = [f"emo.growth.init={init}"]
        own += ["emo.unmask_steps=50"] if init == "masked_copy" else []
        cells.append((init, own))
    for moments in ("keep", "copy"):
        cells.append(
            (f"gaussian_bias_reset, moments {moments}", [f"emo.growth.optimizer={moments}"])
        )
    first = "gaussian_bias_reset"
    return [
        CellConfig(
            name,
            "one growth, 8 to 16 at step 150 of 400",
            (*steps, *stages, *own),
            seeds=3,
            against="" if name == first else first,
            priority=1,
        )
        for name, own in cells
    ]


def get_config(arg: str = ""):
    """`arg`: "" (all), "growth", "ablation" or "smoke"."""
    smoke = arg == "smoke"
    if arg not in ("", "growth", "ablation", "smoke"):
        raise ValueError(f"{arg!r} is not growth, ablation or smoke")
    steps = 6 if smoke else STEPS
    cells = [] if arg == "ablation" else _growth_cells()
    cells += [] if arg == "growth" else _ablation_cells()
    if smoke:
        growing = _growing((4, 8), budget="steps", steps="[3,3]")
        cells = [
            CellConfig("EMO", "smoke", growing, against="fixed 8"),
            CellConfig("fixed 8", "smoke", ("model.moe.num_experts=8",)),
            CellConfig("fixed 4", "smoke", ("model.moe.num_experts=4",)),
        ]
    cfg = Config(
        mode="study",
        study=StudyConfig(kind="growth", cells=tuple(cells), warmup=False),
        model=_model(smoke),
        tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=512 if smoke else VOCABULARY),
        pretrain=PretrainConfig(
            data={"text": SourceConfig(path=STDLIB)},
            steps=steps,
            batch=2 if smoke else 32,
            row_length=64 if smoke else 128,
            eval_every=3 if smoke else 50,
            eval_rows=4 if smoke else 512,
            bias_update_rate=1e-3,
            optim=OptimConfig(
                learning_rate=3e-3,
                schedule="wsd",
                decay_fraction=0.2,
                final_fraction=0.02,
                warmup_steps=1 if smoke else 30,
                total_steps=steps,
                b2=0.98,
                weight_decay=0.05,
            ),
        ),
        emo=EMOConfig(rewarmup_steps=1 if smoke else REWARMUP),
        loop=LoopConfig(checkpoint_every=0 if smoke else 200, tensorboard=False),
    )
    return to_config_dict(cfg)
