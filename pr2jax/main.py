"""python -m pr2jax.main --config=configs/NAME.py[:arg] --workdir=DIR [--config.key=value ...]"""

from __future__ import annotations

import logging
import sys

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.core.device import setup_compilation_cache

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file, with an optional argument: configs/NAME.py[:arg].",
    lock_config=True,
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and reports go.")
PROFILE = flags.DEFINE_integer("profile", 0, "Trace this many steps into WORKDIR/profile.")
CACHE = flags.DEFINE_string(
    "compilation_cache", None, "Folder of compiled programs; 'off' for none (default: user cache)."
)

log = logging.getLogger("pr2jax")

EXIT_RESUME = 75  # sysexits' EX_TEMPFAIL: saved, run the same command again


def run(config, workdir: str, profile_steps: int = 0) -> None:
    """Runs a `train.config.Config` (dataclass) in `workdir`."""
    from pr2jax.train import generate, pipeline  # they import JAX and its friends

    modes = {
        "sft": pipeline.run_sft,
        "rl": pipeline.run_rl,
        "sft_then_rl": pipeline.run_sft_then_rl,
        "generate": generate.run_generate,
    }
    modes[config.mode](config, workdir, profile_steps)


def _start(argv: list[str]) -> None:
    from pr2jax.core.checkpoint import CheckpointError
    from pr2jax.core.sharding import ShardingError
    from pr2jax.tasks.rows import RowError
    from pr2jax.train.config import Config
    from pr2jax.train.loop import Interrupted, TrainingDiverged

    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are --config.key=value")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[pr2jax] %(message)s"))
    absl_logging.set_verbosity(absl_logging.ERROR)  # libraries write a line for every file
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        config = from_config_dict(Config, CONFIG.value)
        cache = setup_compilation_cache(CACHE.value)
        log.info("compilation cache: %s", cache or "off")
        run(config, WORKDIR.value, PROFILE.value)
    except Interrupted as stopped:
        log.warning("%s", stopped)
        sys.exit(EXIT_RESUME)
    except (ConfigError, ShardingError, CheckpointError, RowError, TrainingDiverged) as error:
        log.error("%s: %s", type(error).__name__, error)
        sys.exit(2)


def main() -> None:
    """Entry point of `python -m pr2jax.main`."""
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(_start)


if __name__ == "__main__":
    main()
