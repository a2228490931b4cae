"""python -m pr2jax.main --config=configs/NAME.py[:arg] --workdir=DIR [--config.key=value ...]"""

from __future__ import annotations

import logging
import os
import re
import sys
from contextlib import nullcontext

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from pr2jax.core import goodput, hosts, xla_flags
from pr2jax.core.config import ConfigError
from pr2jax.core.device import reuse_freed_memory, setup_compilation_cache
from pr2jax.core.files import check_writable, remove_leftovers
from pr2jax.core.mirror import Mirror
from pr2jax.core.peers import Peers
from pr2jax.core.store import StorageError, is_store

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
COMPILE_ONLY = flags.DEFINE_bool(
    "compile_only", False, "Compile the run's programs for --topology and say whether they fit."
)
ESTIMATE = flags.DEFINE_bool(
    "estimate", False, "Say what memory the run needs, of --topology or of this machine."
)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chips that are not here, like v5p:4x4x2, v5e:2x4, h100:8."
)

DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Join the other processes of a run: where the surroundings tell of some (auto), or always.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where the surroundings do not tell it."
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run, one a host.")
PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
PEER_TIMEOUT = flags.DEFINE_float(
    "peer_timeout_s", 30.0, "Silence after which another host counts as lost, and all end.", 5.0
)

log = logging.getLogger("pr2jax")

EXIT_TOO_LARGE = 1
EXIT_FAILED = 1
EXIT_BAD_CONFIG = 2
EXIT_RESUME = 75  # sysexits' EX_TEMPFAIL: saved, run the same command again


def run(config, workdir: str, profile_steps: int = 0) -> None:
    """Runs a `train.config.Config` (dataclass) in `workdir`."""
    # They import JAX.
    from pr2jax.train import curate, evaluate, generate, pipeline, plan, regimes, study

    modes = {
        "sft": pipeline.run_sft,
        "rl": pipeline.run_rl,
        "sft_then_rl": pipeline.run_sft_then_rl,
        "generate": generate.run_generate,
        "eval": evaluate.run_eval,
        "curate": curate.run_curate,
        "study": study.run_study,
        "difficulty": regimes.run_difficulty,
        "plan": plan.run_plan,
        "pretrain": pipeline.run_pretrain,
        "pretrain_sft_rl": pipeline.run_pretrain_sft_rl,
    }
    alone = ("generate", "eval", "curate", "study", "difficulty", "plan")
    if hosts.several() and config.mode in alone:
        raise ConfigError(f"mode: {config.mode!r} runs in one process, here are several")
    of_files = config.mode in ("eval", "curate", "study", "difficulty")
    with Mirror(workdir) if of_files and is_store(workdir) else nullcontext(workdir) as folder:
        modes[config.mode](config, os.fspath(folder), profile_steps)


def check_memory(config, workdir: str) -> bool:
    """--compile_only or --estimate instead of a run; whether the run fits the chips.

    Of a run that grows its experts, phase by phase, in a folder each.
    """
    if not config.emo.experts:
        return _check_memory(config, workdir)
    from pr2jax.train.emo import folder, phase_configs

    found = []
    for phase, part in phase_configs(config):
        log.info("phase %d: %d experts", phase.index, part.model.moe.num_experts)
        found.append(_check_memory(part, os.path.join(workdir, folder(phase))))
    return all(found)


def _check_memory(config, workdir: str) -> bool:
    """The check of one model."""
    if config.mode == "pretrain_sft_rl":
        raise ConfigError("mode: its parts are checked one at a time: pretrain, then sft_then_rl")
    if COMPILE_ONLY.value:
        if not TOPOLOGY.value:
            raise ConfigError("--topology: --compile_only needs one, like v5p:4x4x2 or v5e:2x4")
        from pr2jax.train.compile_check import run_compile_check

        return run_compile_check(config, workdir, TOPOLOGY.value)
    from pr2jax.train.estimate import run_estimate

    return run_estimate(config, workdir, TOPOLOGY.value)


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with an unknown configuration key or argument told as ours are."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # What a config file raises arrives as the text of its traceback.
        told = re.search(r"^\s*pr2jax\S*(ConfigError: .*)$", str(error), re.MULTILINE)
        if not told:
            return app.parse_flags_with_usage(argv)
        print(f"[pr2jax] {told[1]}", file=sys.stderr)
        sys.exit(EXIT_BAD_CONFIG)
    except (AttributeError, KeyError) as error:
        found = re.search(r"'(\w+)'", str(error).replace("\\", ""))
        near = re.search(r'Did you mean "(\w+)"', str(error))
        key = found[1] if found else ""
        flag = next((a for a in argv if re.search(rf"[.]{key}(\.|=|$)", a)), "")
        dotted = flag.lstrip("-").partition("=")[0].removeprefix("config.")
        if not key or not dotted:
            raise
        hint = f"; did you mean {near[1]}?" if near else ""
        print(f"[pr2jax] ConfigError: {dotted}: unknown key {key!r}{hint}", file=sys.stderr)
        sys.exit(EXIT_BAD_CONFIG)


def _config():
    """The dataclass of --config. Raises ConfigError, also where the file cannot be loaded."""
    from pr2jax.train.plan import configure

    if not isinstance(CONFIG.value, ConfigDict):
        try:
            CONFIG.value.mode  # noqa: B018 (the flag's value raises what went wrong)
        except Exception as error:
            raise ConfigError(f"--config: {error}") from error
    given = config_flags.get_override_values(flags.FLAGS["config"])
    return configure(CONFIG.value, given)


def _start(argv: list[str]) -> None:
    from pr2jax.core.checkpoint import CheckpointError
    from pr2jax.core.sharding import ShardingError
    from pr2jax.models.importers.hf import CheckpointFormatError
    from pr2jax.tasks.rows import RowError
    from pr2jax.train.loop import Interrupted, TrainingDiverged
    from pr2jax.train.precision import PrecisionError
    from pr2jax.train.study import StudyError

    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are --config.key=value")
    _log_to_stderr()
    told = (
        ConfigError,
        ShardingError,
        CheckpointError,
        CheckpointFormatError,
        RowError,
        TrainingDiverged,
        StudyError,
        PrecisionError,
        StorageError,
        hosts.HostError,
    )
    peers = None
    try:
        xla_flags.apply("tpu" if COMPILE_ONLY.value else None)  # the check's programs are a run's
        config = _config()
        check_writable(WORKDIR.value)
        if COMPILE_ONLY.value or ESTIMATE.value:
            sys.exit(0 if check_memory(config, WORKDIR.value) else EXIT_TOO_LARGE)
        if TOPOLOGY.value:
            raise ConfigError("--topology: only with --compile_only or --estimate")
        reuse_freed_memory()
        hosts.start(COORDINATOR.value, PROCESSES.value, PROCESS.value, DISTRIBUTED.value)
        peers = Peers(PEER_TIMEOUT.value)
        if not hosts.first():
            log.setLevel(logging.WARNING)  # process 0 speaks for all
        cache = setup_compilation_cache(CACHE.value)
        log.info("compilation cache: %s", cache or "off")
        remove_leftovers(WORKDIR.value)
        with goodput.recording(WORKDIR.value):
            run(config, WORKDIR.value, PROFILE.value)
        peers.leave()
    except Interrupted as stopped:
        log.warning("%s", stopped)
        peers.leave()
        sys.exit(EXIT_RESUME)
    except hosts.AbsentHost as error:
        log.error("%s; start all processes again", error)
        _leave(peers, EXIT_RESUME, str(error))
    except KeyboardInterrupt:
        log.warning("interrupted; the same command goes on from the last checkpoint")
        _leave(peers, EXIT_RESUME, "interrupted")
    except told as error:
        log.error("%s: %s", type(error).__name__, error)
        _leave(peers, EXIT_BAD_CONFIG, f"{type(error).__name__}: {error}")
    except Exception as error:
        if peers is None or not hosts.several():
            raise
        log.exception("failed")
        peers.blame()  # a collective that failed because another host is gone
        _leave(peers, EXIT_FAILED, f"{type(error).__name__}: {str(error)[:300]}")


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    # On a terminal a progress line may stand there: write over it.
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    handler.setFormatter(logging.Formatter(f"{clear}[pr2jax] %(message)s"))
    absl_logging.set_verbosity(absl_logging.ERROR)  # libraries write a line for every file
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _leave(peers, code: int, why: str) -> None:
    """Ends this process with `code`, and the others of its run, which are told why."""
    if peers is None or not hosts.several():
        sys.exit(code)
    peers.fail(code, why)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an orderly end would wait for them


def main() -> None:
    """Entry point of `python -m pr2jax.main`."""
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(_start, flags_parser=_parse_flags)


if __name__ == "__main__":
    main()
