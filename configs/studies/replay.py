"""The replay study: what each way of replaying routes does at every mini-step, and why.

  python -m pr2jax.main --config=configs/studies/replay.py --workdir=DIR

starts it and goes on with it: 5 warm-ups and 120 runs, `--config.study.workers=2` at a time.
`:main` runs the main cells only, `:r3,pr2` (any names) main cells by name, `:sweep` settings of
W_p and of lookahead, `:smoke` two cells of two batches. Read DIR/study.md and DIR/report.html;
DIR/study.json holds every figure.

A small MoE (4 MoE layers of 16 experts, top-2, and a shared expert; d = 64) is warmed up by SFT on
words of 3 to 5 letters and then learns to spell words of 4 and 5 letters backwards by GRPO, 64
prompts x 8 samples a batch, in 2, 4 or 8 mini-steps (off-N), by Adam with beta1 = 0.9 or 0.98. All
cells of a seed start from the same weights. fp32; sampler and learner agree to 1e-6 nats.

Cells: `off`; `r2`; `r3`; `pr2`; `lookahead`; `pr2+lookahead`; `frozen router` (live routes, router
weights fixed); and at off-8 `pr2 by Adam`. W_p learns by plain SGD at 0.2 (2000 times the policy's
rate), which a trial of one seed had chosen: drifts of 44 windows of an r3 run (beta1 = 0.98), on
which W_p was then trained alone. SGD below that won less, at 0.3 as much, from 0.4 on it diverged;
Adam lost at every alpha from 0.03 to 3, its KL above that of W_p = 0. lookahead extrapolates by as
many mini-steps as the batch has. Features of the un-shifted old route are kept in all, so that
each mini-step has the used route and the old one on the same tokens; the drift is probed
(train/probe.py) in two consecutive batches of every twelve.

Hypotheses, written down before the run:

1. Last mini-step, zero deviation: pr2 > r3, lookahead > r3, r2 = r3 (they record the same routes
   where sampler and learner agree).
2. First mini-steps: r3 is best by construction (1.0 at the first), so over the whole window pr2 and
   lookahead may lose more than they win at its end. Both are reported.
3. pr2 wins where the drift persists: more with beta1 = 0.98 than with 0.9 (window-to-window cosine
   of the drift's linear map near 0 with 0.9 and well above with 0.98), more at off-8 than at off-2.
4. Within a window the drift is linear in h to a good part (held-out R2 of the oracle .2 to .5),
   so the oracle's zero deviation is well above the old route's whatever beta1 is.
5. lookahead wins less than pr2 can: most of the drift comes through h, not through W_r.
6. The KL of the shifted logits falls below that of the old ones where pr2 wins; a falling KL alone
   is not a rising agreement.
7. Rewards do not differ between r2, r3, pr2 and lookahead beyond seeds; the spread of the
   importance ratio orders as zero deviation does, `off` above all.
8. A frozen router still flips, since h drifts: less than a live one.
"""

import dataclasses
import json

from pr2jax.core.config import to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.types import PREDICTOR_GROUP, RLConfig, predictor_group
from pr2jax.sampler.types import SamplerConfig, SamplingParams
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

_GROUP = f"rl.optim.groups.{PREDICTOR_GROUP}"
_BASE = 1e-4  # the policy's learning rate


def _sgd(rate: float) -> tuple[str, ...]:
    """W_p by plain SGD at an absolute rate."""
    alpha = f"{_GROUP}.lr_multiplier={rate / _BASE:g}"
    return (f"{_GROUP}.optimizer=sgd", f"{_GROUP}.eps=null", alpha)


def _adam(alpha: float) -> tuple[str, ...]:
    """W_p by Adam, with the policy's betas, at alpha times its rate."""
    return (f"{_GROUP}.lr_multiplier={alpha:g}",)


MODES = {
    "off": ("replay.mode=off",),
    "r2": ("replay.mode=r2",),
    "r3": ("replay.mode=r3",),
    "lookahead": ("replay.mode=lookahead",),
    "pr2": ("replay.mode=pr2", *_sgd(0.2)),
    "pr2+lookahead": ("replay.mode=pr2+lookahead", *_sgd(0.2)),
    "pr2 by Adam": ("replay.mode=pr2", *_adam(0.1)),
    "frozen router": ("replay.mode=off", "rl.optim.trainable=^(?!.*moe/router/).*$"),
}
MAIN = ("r3", "lookahead", "pr2", "pr2+lookahead")


def _words(shortest: int, longest: int, size: int, seed: int) -> TaskConfig:
    return TaskConfig(
        name="reasoning_gym/spell_backward",
        settings=json.dumps({"min_word_len": shortest, "max_word_len": longest}),
        size=size,
        held_out=0,
        seed=seed,
        question_regex=r"example: \w+ -> \w+\): (\w+)$",
        prompt_template="{question}>",
        lowercase=True,
        partial_credit=0.0,
    )


def _window(off: int, b1: float) -> tuple[str, tuple[str, ...]]:
    """A group's name and overrides. As many mini-steps ahead as the batch has."""
    overrides = (f"rl.mini_steps={off}", f"rl.optim.b1={b1}", f"replay.kappa={off}")
    return f"off-{off}, beta1 {b1}", overrides


def _study_cells() -> list[CellConfig]:
    cells = []
    for off in (8, 4, 2):
        for b1 in (0.98, 0.9):
            group, common = _window(off, b1)
            for name, mode in MODES.items():
                if off < 8 and name == "pr2 by Adam":
                    continue
                main = off == 8 and name in MAIN
                cells.append(
                    CellConfig(
                        name=name,
                        group=group,
                        overrides=(*common, *mode),
                        seeds=5 if main else 3 if off == 8 else 2,
                        against="" if name == "r3" else "r3",
                        priority=0 if main else 1 if off == 8 else 2,
                    )
                )
    return cells


def _sweep_cells() -> list[CellConfig]:
    """One seed: learning rates of W_p, and how far lookahead extrapolates."""
    cells = []
    for b1 in (0.98, 0.9):
        group, common = _window(8, b1)
        tried = {"r3": MODES["r3"]}
        for alpha in (0.03, 0.1, 0.3, 1.0):
            tried[f"pr2, Adam, alpha {alpha:g}"] = ("replay.mode=pr2", *_adam(alpha))
        for rate in (0.03, 0.1, 0.2, 0.3):
            tried[f"pr2, SGD at {rate:g}"] = ("replay.mode=pr2", *_sgd(rate))
        for kappa in (4, 8):
            tried[f"lookahead, kappa {kappa}"] = (*MODES["lookahead"], f"replay.kappa={kappa}")
        for name, own in tried.items():
            against = "" if name == "r3" else "r3"
            cells.append(CellConfig(name, group, (*common, *own), against=against))
    return cells


def get_config(arg: str = ""):
    """`arg`: "" (all), "main", names of main cells, "sweep" or "smoke"."""
    smoke = arg == "smoke"
    cells = _sweep_cells() if arg == "sweep" else _study_cells()
    if smoke:
        cells = [CellConfig(name, "smoke", MODES[name]) for name in ("r3", "pr2")]
    elif arg not in ("", "sweep"):
        names = MAIN if arg == "main" else arg.split(",")
        if unknown := set(names) - set(MAIN):
            raise ValueError(f"{sorted(unknown)} are none of the main cells {MAIN}")
        cells = [cell for cell in cells if cell.priority == 0 and cell.name in names]
        there = {(cell.group, cell.name) for cell in cells}
        lone = lambda cell: (cell.group, cell.against) not in there
        cells = [dataclasses.replace(c, against="") if lone(c) else c for c in cells]
    sampling = SamplingParams(max_tokens=7)
    cfg = Config(
        mode="study",
        study=StudyConfig(cells=tuple(cells), steady_from=0 if smoke else 20),
        model=ModelConfig(
            vocab_size=0,
            d_model=64,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=16,
            moe=MoEConfig(num_experts=16, top_k=2, expert_dim=32, shared_dim=64),
            scan_layers=False,
        ),
        tokenizer=TokenizerConfig(kind="char", alphabet=">abcdefghijklmnopqrstuvwxyz"),
        sft=SFTConfig(
            task=_words(3, 5, 64 if smoke else 4000, seed=1),
            steps=2 if smoke else 160,
            batch=4 if smoke else 16,
            row_length=96,
            optim=OptimConfig(
                learning_rate=2e-3,
                schedule="wsd",
                decay_fraction=0.8,
                final_fraction=0.2,
                warmup_steps=20,
                total_steps=160,
                b2=0.98,
            ),
        ),
        rl_task=_words(4, 5, 64 if smoke else 3000, seed=2),
        rl=RLConfig(
            steps=2 if smoke else 100,
            prompts_per_batch=8 if smoke else 64,
            samples_per_prompt=8,
            mini_steps=4 if smoke else 8,
            micro_batch=16 if smoke else 64,
            sampling=sampling,
            length_bucket=4,
            eval_every=0,
            optim=OptimConfig(
                learning_rate=_BASE,
                warmup_steps=16,
                b2=0.98,
                groups={PREDICTOR_GROUP: predictor_group(1.0)},
            ),
        ),
        replay=ReplayConfig(
            mode="r3", feature_tokens=7, keep_features=True, probe_every=2 if smoke else 12
        ),
        sampler=SamplerConfig(
            slots=64 if smoke else 512,
            chunk=7,
            max_prompt=6,
            max_tokens=7,
            bucket=16,
            prefill_rows=8 if smoke else 64,
        ),
        eval=EvalConfig(sampling=sampling),
        verifier=VerifierConfig(workers=1),
        loop=LoopConfig(checkpoint_every=0, tensorboard=False, journal=False),
    )
    return to_config_dict(cfg)
