"""I have C rollouts (or tokens): how many samples a prompt, prompts a batch, updates; which rate?

  python -m pr2jax.main --config=configs/plan.py --workdir=/tmp/plan --config.plan.compute=1e6
  python -m pr2jax.main --config=configs/plan.py --workdir=/tmp/plan \
      --config.plan.compute=2e9 --config.plan.unit=tokens --config.plan.tokens_per_rollout=2000 \
      --config.plan.regime=hard

answers from the published law (IsoCompute, a 7B model; `easy` or `hard` problems, by the base
model's avg@16), and says so; with --config.plan.fit=DIR from the law of one's own sweep in DIR
(configs/studies/isocompute.py). Prints a table and writes WORKDIR/plan.json, which a run takes:

  python -m pr2jax.main --config=configs/grpo.py --workdir=/tmp/grpo \
      --config.rl_plan=/tmp/plan/plan.json

n is rounded so that a batch is cut by --config.rl.micro_batch, as the run's must be. It takes no
time and no accelerator, so there is no smaller form: `:smoke` is the same.
"""

from pr2jax.core.config import to_config_dict
from pr2jax.train.config import Config


def get_config(arg: str = ""):
    """`arg`: "" or "smoke", which are the same."""
    del arg
    return to_config_dict(Config(mode="plan"))
