"""The sampling budget of one's own: rollouts C = B_p n M spent on many samples, or many updates?

  python -m pr2jax.main --config=configs/studies/isocompute.py --workdir=DIR

starts the sweep and goes on with it, `--config.study.workers=2` runs at a time. A small MoE (two
layers of 8 experts, top-2 and a shared one; d = 64) is warmed up by SFT on words of 3 to 5 letters,
its avg@16 is measured on a pool of words of 5 letters to spell backwards, and those in the regime
are what all runs learn from and are validated on: `:easy` (avg@16 in [0.3, 0.6], the default) or
`:hard` ([0, 0.0625]). One trajectory each of n = 4, 8, 16, 32, 64 samples of B_p = 8 prompts and a
seed (three), all of the same C = 32,768, with budgets nested in it: avg@4, best@4 and worst@4 every
2,048 rollouts. n = 16 is also run with B_p = 32, for what B_p does.

The recipe is the IsoCompute study's: strictly on-policy GRPO, learning rate as the square root of
the batch, 10 steps of warm-up and then constant, temperature 0.6, truncated importance sampling
against the learner's own log-probs, KL and entropy terms for easy problems alone.
DIR/study.md and DIR/report.html say what n*(C) is and whether it grows; DIR/law.json is what
configs/plan.py plans with; DIR/runs.csv has every evaluation.

  ... --config=configs/studies/isocompute.py:csv --config.study.runs_csv=FILE --workdir=DIR

fits evaluations that are there already (columns: n, prompts, seed, compute, score; and best,
worst). `:smoke` runs three n of four steps.
"""

import dataclasses
import json

from pr2jax.core.config import to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.types import RLConfig
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from pr2jax.scaling.sampling_law import WARMUP_STEPS, square_root_rate
from pr2jax.tasks.base import TaskConfig
from pr2jax.train.config import (
    CellConfig,
    Config,
    EvalConfig,
    LoopConfig,
    SFTConfig,
    StudyConfig,
    VerifierConfig,
)
from pr2jax.train.study_config import REGIMES

NS, PROMPTS, SEEDS = (4, 8, 16, 32, 64), 8, 3
OTHER = ((16, 32),)  # (n, B_p) besides
COMPUTE, EVALUATE = 32768, 2048  # rollouts of a run; between evaluations
RATE, BATCH = 4e-4, 1024  # the learning rate at so many rows; as their square root


def _words(shortest: int, longest: int, size: int, held_out: int, seed: int) -> TaskConfig:
    return TaskConfig(
        name="reasoning_gym/spell_backward",
        settings=json.dumps({"min_word_len": shortest, "max_word_len": longest}),
        size=size,
        held_out=held_out,
        seed=seed,
        question_regex=r"example: \w+ -> \w+\): (\w+)$",
        prompt_template="{question}>",
        lowercase=True,
        partial_credit=0.0,
    )


def _cell(n: int, prompts: int, compute: int, every: int, seeds: int) -> CellConfig:
    rows = n * prompts
    return CellConfig(
        f"n {n}",
        f"B_p {prompts}",
        (
            f"rl.samples_per_prompt={n}",
            f"rl.prompts_per_batch={prompts}",
            f"rl.steps={compute // rows}",
            f"rl.eval_every={max(every // rows, 1)}",
            f"rl.micro_batch={min(rows, 128)}",
            f"rl.optim.learning_rate={square_root_rate(rows, RATE, BATCH):.6g}",
            f"sampler.slots={min(max(rows, 128), 512)}",
        ),
        seeds=seeds,
        priority=0 if prompts == PROMPTS else 1,
    )


def get_config(arg: str = ""):
    """`arg`: "easy" (or nothing), "hard", "csv" or "smoke"."""
    if arg not in ("", "easy", "hard", "csv", "smoke"):
        raise ValueError(f"{arg!r} is not easy, hard, csv or smoke")
    smoke, easy = arg == "smoke", arg != "hard"
    cells = [_cell(n, PROMPTS, COMPUTE, EVALUATE, SEEDS) for n in NS]
    cells += [_cell(n, prompts, COMPUTE, EVALUATE, SEEDS) for n, prompts in OTHER]
    if smoke:
        cells = [_cell(n, 4, 4 * 4 * n, 4 * n, 1) for n in (2, 4, 8)]
    sampling = SamplingParams(temperature=0.6, max_tokens=8)
    regime = REGIMES["easy" if easy else "hard"]
    if smoke:
        regime = dataclasses.replace(regime, samples=2, low=0.0, high=1.0)
    cfg = Config(
        mode="study",
        study=StudyConfig(
            kind="budget",
            cells=() if arg == "csv" else tuple(cells),
            runs_csv="runs.csv" if arg == "csv" else "",
        ),
        regime=regime,
        model=ModelConfig(
            vocab_size=0,
            d_model=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            head_dim=16,
            moe=MoEConfig(num_experts=8, top_k=2, expert_dim=32, shared_dim=64, impl="dense"),
            scan_layers=False,
        ),
        tokenizer=TokenizerConfig(kind="char", alphabet=">abcdefghijklmnopqrstuvwxyz"),
        sft=SFTConfig(
            task=_words(3, 5, 64 if smoke else 4000, 0, seed=1),
            steps=2 if smoke else 170,
            batch=4 if smoke else 16,
            row_length=96,
            optim=OptimConfig(
                learning_rate=2e-3,
                schedule="wsd",
                decay_fraction=0.8,
                final_fraction=0.2,
                warmup_steps=20,
                total_steps=320,
                b2=0.98,
            ),
        ),
        rl_task=_words(5, 5, 32 if smoke else 3500, 16 if smoke else 1500, seed=2),
        rl=RLConfig(
            prompts_per_batch=4 if smoke else PROMPTS,
            micro_batch=8 if smoke else 64,
            mini_steps=1,
            epochs=1,
            tis_cap=2.0,
            scoring_pass="always",
            kl_coef=1e-3 if easy else 0.0,
            entropy_coef=1e-3 if easy else 0.0,
            sampling=sampling,
            length_bucket=16,
            optim=OptimConfig(learning_rate=RATE, warmup_steps=WARMUP_STEPS, b2=0.98),
        ),
        replay=ReplayConfig(mode="r3"),
        sampler=SamplerConfig(
            slots=64 if smoke else 512,
            chunk=8,
            max_prompt=8,
            max_tokens=8,
            bucket=16,
            prefill_rows=8 if smoke else 64,
        ),
        eval=EvalConfig(samples=8, ks=(1, 4), quick_samples=4, sampling=sampling),
        verifier=VerifierConfig(workers=1),
        loop=LoopConfig(checkpoint_every=0, tensorboard=False, journal=False),
    )
    return to_config_dict(cfg)
