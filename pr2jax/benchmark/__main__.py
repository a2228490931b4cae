"""python -m pr2jax.benchmark COMMAND [--option=value ...]; see the package's docstring."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pr2jax.benchmark import commands, curation, machine, programs
from pr2jax.benchmark import experts as pools
from pr2jax.benchmark.commands import Options
from pr2jax.benchmark.sides import BenchmarkError
from pr2jax.benchmark.workload import FULL, SMOKE, model_config, parse_overrides, sampler_config
from pr2jax.core.config import ConfigError
from pr2jax.core.files import user_cache
from pr2jax.core.metrics import write_json

EXIT_BAD = 2

_DECODE = ("rows", "prompt", "new")
_GRPO = ("prompts", "samples", "prompt", "completion", "feature_tokens")
# command: (what runs it, peers, sizes that are its own)
COMMANDS: dict[str, tuple[Callable[[Options], tuple[dict, str]], tuple[str, ...], tuple]] = {
    "train": (commands.train, ("transformers",), ("batch", "length")),
    "decode": (commands.decode, ("transformers",), (*_DECODE, "feature_tokens")),
    "grpo": (commands.grpo, ("trl",), _GRPO),
    "pr2": (commands.pr2, (), _GRPO),
    "experts": (pools.experts, (), ("batch", "length")),
    "divergence": (commands.divergence, (), _DECODE),
    "peaks": (commands.peaks, ("torch",), ()),
    "curate": (curation.curate, (), ("rows",)),
    "sandbox": (programs.sandbox, (), ("rows",)),
}
# Sizes that are not FULL's, and the smoke form's.
OWN_SIZES = {
    "curate": ({"rows": 100_000}, {"rows": 2_000}),
    "sandbox": ({"rows": 1000}, {"rows": 8}),
}
_WITHOUT_MODEL = ("curate", "sandbox")
_TIMED = ("train", "decode", "grpo", "pr2", "experts")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="pr2jax.benchmark", allow_abbrev=False)
    kinds = top.add_subparsers(dest="command", required=True)
    for name, (run, peers, sizes) in COMMANDS.items():
        doc = run.__doc__.partition(";")[0]
        sub = kinds.add_parser(name, help=doc, description=doc, allow_abbrev=False)
        if peers:
            sub.add_argument("--peer", choices=peers, help="measured beside ours")
            sub.add_argument("--peer_python", help="its Python (PR2JAX_REFERENCE_PYTHON)")
            sub.add_argument("--cache", type=Path, help="folder of random checkpoints")
        for size in sizes:
            default = OWN_SIZES.get(name, ({}, {}))[0].get(size, getattr(FULL, size))
            sub.add_argument(f"--{size}", type=int, help=f"default {default}")
        if name not in _WITHOUT_MODEL:
            sub.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
        rounds = 1 if name == "curate" else 5
        sub.add_argument("--repeats", type=int, default=rounds, help="rounds (peaks: tries)")
        if name in _TIMED:
            sub.add_argument("--steps", type=int, default=1, help="steps of a side in a round")
            sub.add_argument("--profile", type=Path, help="trace one more round of ours into it")
        if name not in ("peaks", *_WITHOUT_MODEL):
            sub.add_argument("--set", action="append", default=[], metavar="model.KEY=VALUE")
        sub.add_argument("--compilation_cache", default="off", help="folder; default: off")
        sub.add_argument("--json", type=Path, help="file for the figures")
        sub.add_argument("--smoke", action="store_true", help="a tiny model and tiny sizes")
        sub.add_argument("--quiet_check", action="store_true", help="warn on a busy machine")
    return top


def options_of(arguments: argparse.Namespace) -> Options:
    """The options of a command line. Raises ConfigError naming the one at fault."""
    given = vars(arguments)
    fields = {f.name for f in dataclasses.fields(FULL)}
    asked = {k: v for k, v in given.items() if k in fields and v is not None}
    own = OWN_SIZES.get(arguments.command, ({}, {}))[arguments.smoke]
    sizes = dataclasses.replace(SMOKE if arguments.smoke else FULL, **(own | asked))
    sizes.validate()
    for key in ("repeats", "steps"):
        if given.get(key, 1) < 1:
            raise ConfigError(f"{key}: must be at least 1, got {given[key]}")
    if given.get("peer_python") and not given["peer"]:
        raise ConfigError("peer_python: means something only with --peer")
    overrides = parse_overrides(given.get("set", []))
    model_config(arguments.smoke, overrides)  # tells what cannot be before anything starts
    sampler_config(sizes, sizes.rows, sizes.new, overrides)
    return Options(
        command=arguments.command,
        sizes=sizes,
        smoke=arguments.smoke,
        peer=given.get("peer"),
        peer_python=given.get("peer_python"),
        dtype=given.get("dtype", "auto"),
        repeats=arguments.repeats,
        steps=given.get("steps", 1),
        overrides=overrides,
        cache=given.get("cache") or user_cache("benchmark"),
        compilation_cache=arguments.compilation_cache,
        profile=given.get("profile"),
    )


def run(options: Options, warn: bool) -> tuple[dict[str, Any], str]:
    """The report of a command, and its text; first, if `warn`, a line on a busy machine."""
    quiet = machine.quietness()
    if warn and (line := machine.warning(quiet)):
        print(f"[pr2jax] {line}", file=sys.stderr, flush=True)
    report, text = COMMANDS[options.command][0](options)
    common = {
        "command": options.command,
        "sizes": dataclasses.asdict(options.sizes),
        "smoke": options.smoke,
        "repeats": options.repeats,
        "steps": options.steps,
        "overrides": options.overrides,
        "machine": report.pop("machine") | {"quiet": quiet},
    }
    return common | report, text


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; the exit status."""
    arguments = parser().parse_args(argv)
    try:
        options = options_of(arguments)
        report, text = run(options, arguments.quiet_check)
    except (BenchmarkError, ConfigError) as error:
        print(f"[pr2jax] {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_BAD
    except KeyboardInterrupt:
        return 130
    print(text)
    if arguments.json:
        write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
