"""Six domains of verifiable rewards on a small model.

  python -m pr2jax.main --config=configs/six_domains.py --workdir=/tmp/pr2jax_six_domains

A small Mixture-of-Experts is warmed up by SFT on solved problems of all six domains (our own
generators at their level "tiny"), then goes on by GRPO + PR2 from the verifiers' verdicts:
numbers, programs run in the sandbox, letters and quantities, orderings and walks, traced
functions, lookups in tables. Ending early is a small reward term of its own. The report shows every
domain's reward and held-out pass@1. What to expect (docs/results/six_domains.md): pass@1 .35 after
SFT and .37 after 60 batches of RL; SFT continued reaches .50. `:smoke` takes two steps of each.

`:guru` is the recipe of arXiv 2506.14965 for a checkpoint and the published parquet files:
  --config=configs/six_domains.py:guru --config.init_from=DIR \\
      --config.rl_task.parts.math.name=parquet:FILE ...
"""

import dataclasses
import json

from pr2jax.core.config import ConfigError, to_config_dict
from pr2jax.core.optim import OptimConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.types import PREDICTOR_GROUP, RLConfig, predictor_group
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from pr2jax.tasks.base import TaskConfig
from pr2jax.tasks.rewards import RewardTerm
from pr2jax.tasks.sandbox import SandboxConfig
from pr2jax.train.config import Config, EvalConfig, LoopConfig, SFTConfig
from pr2jax.train.verifier_config import VerifierConfig

# Domain -> generators of our own (tasks/generated).
PARTS = {
    "math": ("numbers",),
    "code": ("programs",),
    "science": ("science",),
    "logic": ("ordering", "graph"),
    "simulation": ("codeio", "cruxeval"),
    "tabular": ("tables",),
}
TOKENS = 20
PROMPT = 72
LETTERS = "\n" + "".join(map(chr, range(ord(" "), ord("~"))))


def tiny(size: int, held_out: int, seed: int) -> TaskConfig:
    """A mixture of `size` problems a domain, put and answered in as few letters as can be."""
    parts = {}
    for domain, names in PARTS.items():
        for name in names:
            parts[domain if len(names) == 1 else f"{domain}_{name}"] = TaskConfig(
                name=f"generated/{name}",
                settings=json.dumps({"level": "tiny", "form": "bare"}),
                size=size // len(names),
                held_out=held_out // len(names),
                seed=seed,
                prompt_template="{question}\n",
                partial_credit=0.0,
            )
    return TaskConfig(name="mixture", parts=parts, seed=seed)


def _small(smoke: bool) -> Config:
    sampling = SamplingParams(max_tokens=TOKENS)
    return Config(
        mode="sft_then_rl",
        model=ModelConfig(
            vocab_size=0,
            d_model=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            moe=MoEConfig(num_experts=16, top_k=2, expert_dim=64, shared_dim=128),
            scan_layers=False,
        ),
        tokenizer=TokenizerConfig(kind="char", alphabet=LETTERS),
        rl_task=tiny(12 if smoke else 600, 4 if smoke else 40, seed=2),
        sft=SFTConfig(
            task=tiny(12 if smoke else 1800, 0, seed=1),
            steps=2 if smoke else 900,
            batch=8 if smoke else 16,
            row_length=160,
            optim=OptimConfig(
                learning_rate=2e-3,
                schedule="wsd",
                decay_fraction=0.5,
                final_fraction=0.2,
                warmup_steps=20,
                total_steps=900,
                b2=0.98,
            ),
        ),
        rl=RLConfig(
            steps=2 if smoke else 100,
            prompts_per_batch=8 if smoke else 48,
            samples_per_prompt=4 if smoke else 8,
            mini_steps=2 if smoke else 4,
            micro_batch=16 if smoke else 32,
            sampling=sampling,
            length_bucket=24,
            eval_every=0 if smoke else 20,
            rewards={"short": RewardTerm(kind="length", weight=0.05, target=16, max=TOKENS)},
            optim=OptimConfig(
                learning_rate=1e-4,
                warmup_steps=8,
                b2=0.98,
                groups={PREDICTOR_GROUP: predictor_group(1.0)},
            ),
        ),
        replay=ReplayConfig(mode="pr2", feature_tokens=TOKENS),
        sampler=SamplerConfig(
            slots=32 if smoke else 384,
            chunk=10,
            max_prompt=PROMPT,
            max_tokens=TOKENS,
            bucket=64,
            prefill_rows=8 if smoke else 32,
        ),
        eval=EvalConfig(
            samples=4, ks=(1, 4), quick_problems=120, quick_samples=2, sampling=sampling
        ),
        verifier=VerifierConfig(sandbox=SandboxConfig(timeout_s=2.0, total_s=10.0)),
        loop=LoopConfig(checkpoint_every=0 if smoke else 20),
    )


def _guru() -> Config:
    """Batch 512, n 16, mini-batches of 64 prompts, lr 1e-6, clip 0.2, no KL, T 1, 8K responses."""
    names = ("math", "codegen", "stem", "logic", "simulation", "table")
    parts = {
        name: TaskConfig(
            name=f"parquet:data/train/{name}.parquet", size=-1, held_out=0, prompt_template="chat"
        )
        for name in names
    }
    sampling = SamplingParams(max_tokens=8192)
    cfg = _small(False)
    rl = RLConfig(
        steps=200,
        prompts_per_batch=512,
        samples_per_prompt=16,
        mini_steps=8,
        micro_batch=64,
        clip_high=0.2,
        length_bucket=1024,
        sampling=sampling,
        optim=OptimConfig(
            learning_rate=1e-6, warmup_steps=10, groups={PREDICTOR_GROUP: predictor_group()}
        ),
    )
    return dataclasses.replace(
        cfg,
        mode="rl",
        tokenizer=TokenizerConfig(),
        rl_task=TaskConfig(name="mixture", parts=parts),
        rl=rl,
        replay=ReplayConfig(mode="pr2"),
        sampler=SamplerConfig(slots=512, chunk=64, max_prompt=4096, max_tokens=8192, bucket=1024),
        eval=EvalConfig(samples=4, ks=(1, 4), sampling=sampling),
    )


def get_config(arg: str = ""):
    """`arg`: "", "smoke" or "guru"."""
    if arg not in ("", "smoke", "guru"):
        raise ConfigError(f"--config: {arg!r} is not smoke or guru")
    return to_config_dict(_guru() if arg == "guru" else _small(arg == "smoke"))
