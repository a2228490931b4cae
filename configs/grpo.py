"""GRPO with routing replay, from a checkpoint, on any task with a verifier.

  python -m pr2jax.main --config=configs/grpo.py --workdir=/tmp/pr2jax_grpo \
      --config.init_from=/tmp/pr2jax_sft --config.replay.mode=pr2 \
      --config.rl_task.name=jsonl:problems.jsonl --config.rl_task.settings={} \
      --config.rl_task.question_regex= --config.rl_task.size=-1

The last two lines put rows of the Guru schema in the place of reasoning-gym's sums.
The argument names a member of the family, whose settings of `rl` are then its paper's:
`:grpo`, `:dr_grpo`, `:dapo`, `:gspo`, `:cispo`, `:rloo`; as in `:gspo,smoke`. Without one it is
GRPO with DAPO's clip and token mean.
Replay modes: off, r2, r3, pr2, lookahead, pr2+lookahead. Model and tokenizer are those of
`init_from` (a run's folder, or an imported one); without it the model below starts at random.
What to expect: in the quickstart, whose RL this is, reward rose from .36 to .6 in 40 batches; a
start that solves nothing gives no signal. `:smoke` takes two steps from random parameters.
"""

import json

from pr2jax.core.config import ConfigError, to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.types import PREDICTOR_GROUP, RLConfig, predictor_group
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from pr2jax.tasks.base import TaskConfig
from pr2jax.train.config import Config, EvalConfig


def family(tokens: int) -> dict[str, dict]:
    """Settings of `rl` by name, for responses of at most `tokens`."""
    return {
        # DeepSeekMath, arXiv 2402.03300, Sec. 4.2.
        "grpo": {"clip_high": 0.2, "aggregation": "sequence_mean", "kl_coef": 0.04},
        # arXiv 2503.20783: no division by the group's std, nor by a response's length.
        "dr_grpo": {"advantage": "dr_grpo", "clip_high": 0.2, "aggregation": "fixed"},
        # arXiv 2503.14476; its buffer is a fifth of the longest response.
        "dapo": {"dynamic_sampling": True, "overlong_buffer": max(tokens // 5, 1)},
        # arXiv 2507.18071, Sec. 5.1.
        "gspo": {
            "ratio": "sequence",
            "aggregation": "sequence_mean",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
        },
        # arXiv 2506.13585: no lower bound; the paper gives no number for the upper one.
        "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 4.0},
        # arXiv 2402.14740: a response is one action, so its tokens are summed.
        "rloo": {"advantage": "rloo", "clip_high": 0.2, "aggregation": "fixed"},
    }


def get_config(arg: str = ""):
    """`arg`: "smoke", the name of a `family` member, both with a comma between, or neither."""
    words = [word for word in arg.split(",") if word]
    smoke = "smoke" in words
    tokens = 8 if smoke else 16
    known = family(tokens)
    names = [word for word in words if word != "smoke"]
    if len(names) > 1 or not set(names) <= known.keys():
        raise ConfigError(f"--config: {arg!r} is not one of {', '.join(known)}, and smoke")
    member = known[names[0]] if names else {}
    sampling = SamplingParams(max_tokens=tokens)
    cfg = Config(
        mode="rl",
        model=ModelConfig(vocab_size=0, moe=MoEConfig(num_experts=16, top_k=2)),
        tokenizer=TokenizerConfig(kind="byte"),
        rl_task=TaskConfig(
            name="reasoning_gym/chain_sum",
            settings=json.dumps({"min_terms": 3, "max_terms": 4, "max_digits": 2}),
            size=64 if smoke else 8000,
            held_out=16 if smoke else 128,
            question_regex=r": (.* =)$",
            prompt_template="{question} ",
            partial_credit=0.0,
        ),
        rl=RLConfig(
            steps=2 if smoke else 100,
            prompts_per_batch=8 if smoke else 32,
            samples_per_prompt=4 if smoke else 8,
            mini_steps=2 if smoke else 4,
            micro_batch=16 if smoke else 64,
            length_bucket=8,
            eval_every=0 if smoke else 20,
            sampling=sampling,
            optim=OptimConfig(
                learning_rate=1e-4,
                warmup_steps=8,
                b2=0.98,
                groups={PREDICTOR_GROUP: predictor_group(10.0)},
            ),
            **member,
        ),
        replay=ReplayConfig(mode="pr2", feature_tokens=tokens),
        sampler=SamplerConfig(
            slots=32 if smoke else 256, max_prompt=64, max_tokens=tokens, chunk=8
        ),
        eval=EvalConfig(samples=4, ks=(1, 4), quick_samples=4, sampling=sampling),
    )
    return to_config_dict(cfg)
