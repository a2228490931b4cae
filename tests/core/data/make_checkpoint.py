"""Makes checkpoint_37b816c.tar.xz, a checkpoint as an earlier commit wrote it.

  git worktree add /tmp/old 37b816c && cd /tmp/old && python THIS_FILE OUT.tar.xz

Written with orbax-checkpoint 0.12.8 before records had a schema number and steps a manifest.
"""

import sys
import tarfile
import tempfile

import jax
import jax.numpy as jnp

from pr2jax.core import rng
from pr2jax.core.checkpoint import Checkpointer
from pr2jax.core.optim import OptimConfig, ParamGroup, build_optimizer
from pr2jax.core.params import ParamSpec, init_params, normal
from pr2jax.core.state import create

SPECS = {
    "block": {
        "w": ParamSpec((16, 8), ("embed", "mlp"), normal(1.0)),
        "half": ParamSpec((8, 4), ("embed", None), normal(1.0), jnp.bfloat16),
    },
    "bias": ParamSpec((5,), (None,), normal(1.0)),
}
EXTRA = {"config": {"mode": "sft"}, "position": 7, "seconds": 1.25, "memory": {"mismatch": 0.1}}


def main(out: str) -> None:
    """Leaf number i of the state holds i, i + 1, i + 2, ..."""
    optimizer = build_optimizer(OptimConfig(groups={"g": ParamGroup("bias")}), SPECS)
    leaves, tree = jax.tree.flatten(create(init_params(SPECS, rng.root(0)), optimizer))
    counted = [
        (i + jnp.arange(x.size)).reshape(x.shape).astype(x.dtype) for i, x in enumerate(leaves)
    ]
    with tempfile.TemporaryDirectory() as folder:
        with Checkpointer(folder, best_metric="acc") as checkpoints:
            state = jax.tree.unflatten(tree, counted)
            checkpoints.save(7, state, EXTRA, {"acc": 0.5})
        with tarfile.open(out, "w:xz") as packed:
            packed.add(folder + "/7", "7")


if __name__ == "__main__":
    main(sys.argv[1])
