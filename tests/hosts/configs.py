"""What several processes run, for `pr2jax.main`: configs.py:pretrain:FOLDER, configs.py:grpo."""

import dataclasses
from pathlib import Path

from pr2jax.core.config import to_config_dict
from pr2jax.core.sharding import MeshConfig
from pr2jax.emo.schedule import EMOConfig
from pr2jax.tasks.rewards import RewardTerm
from pr2jax.train.config import Config, LoopConfig
from tests.train import test_emo, tiny

STEPS = 20
MESH = MeshConfig(data=2, expert=2)
LOOP = LoopConfig(checkpoint_every=1, keep=100, tensorboard=False)


def pretrain(folder: Path) -> Config:
    """Twenty steps with a growth in the middle."""
    cfg = test_emo.config(folder, mesh=MESH, loop=LOOP)
    stages = EMOConfig(experts=(4, 8), budget="steps", steps=(12, 8), rewarmup_steps=2)
    return dataclasses.replace(
        cfg, emo=stages, pretrain=dataclasses.replace(cfg.pretrain, steps=STEPS, parts=4)
    )


def grpo() -> Config:
    """Twenty batches of one update each; shorter answers are better, so there is a signal."""
    cfg = tiny.config(mesh=MESH, compute_dtype="float32", loop=LOOP)
    terms = {"short": RewardTerm("length", weight=1.0, target=0, max=8)}
    return dataclasses.replace(
        cfg, rl=dataclasses.replace(cfg.rl, steps=STEPS, mini_steps=1, eval_every=0, rewards=terms)
    )


def get_config(arg: str):
    """`arg`: "grpo", or "pretrain:FOLDER"."""
    kind, _, folder = arg.partition(":")
    return to_config_dict(grpo() if kind == "grpo" else pretrain(Path(folder)))
