"""Puts faults to a run again and again, and compares where it ends with a run left alone.

  python -m pr2jax.chaos --config=configs/NAME.py[:arg] --workdir=DIR --kills=20 --seed=0
      [--config.key=value ...] [--json=FILE]
  python -m pr2jax.chaos --config=... --workdir=DIR --faults=60 --plant
      [--kinds=kill,hang,torn,flip,disk,pool] [--hosts=2 --devices=2 --kinds=kill,peer]

Runs `pr2jax.main` with these settings once in DIR/whole, then in DIR/killed_N, where it meets its
faults (pr2jax/chaos/faults.py says which there are) at random moments, start-up included, and is
started again until it is through. Where it is through before all faults were used, the next trial
takes the rest. Then, for each trial: parameters, optimizer state, counters and what the trainer
remembers must be equal bit for bit; every step must stand once in metrics.jsonl and ledger.jsonl,
with equal figures (times aside); the ledger must name the items in the order that the seed
defines; no process and no half-written file may be left; damaged files must have been named.

With --plant two copies of a good trial get a difference, one bit and one item, which must be told.
Exits with 1 where anything is not as it must be. Stages that end by the clock (`sft_continued`)
are not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
from pathlib import Path

from pr2jax.chaos import faults
from pr2jax.chaos.trial import Options, torment
from pr2jax.core.store import local


def _options(argv: list[str] | None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="as of pr2jax.main")
    parser.add_argument("--workdir", required=True, help="new folder for all runs")
    parser.add_argument("--kills", type=int, help="faults, all of them SIGKILL (default: 20)")
    parser.add_argument("--faults", type=int, help="faults of all --kinds, as many of each")
    parser.add_argument("--kinds", help="of kill,hang,torn,flip,disk,pool,peer; by default all")
    parser.add_argument("--hosts", type=int, default=1, help="processes of a run (peer needs 2)")
    parser.add_argument("--devices", type=int, help="CPU devices of a run, over its processes")
    parser.add_argument("--hang_s", type=float, default=30.0, help="silence that counts as a hang")
    parser.add_argument("--plant", action="store_true", help="also compare what must not be equal")
    parser.add_argument("--seed", type=int, default=0, help="of moments, kinds and victims")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options, settings = parser.parse_known_args(argv)
    if options.kills is not None and options.faults is not None:
        parser.error("--kills, --faults: one of the two")
    if options.faults is None and options.kinds is not None:
        parser.error("--kinds: only with --faults")
    count = options.faults or options.kills
    if (options.faults, options.kills) == (None, None):
        count = 20
    if not count or count < 1:
        parser.error(f"--kills, --faults: {count}: at least 1")
    possible = [k for k in faults.KINDS if k != "peer" or options.hosts > 1]
    kinds = tuple(options.kinds.split(",") if options.kinds else possible)
    if options.faults is None:
        kinds = ("kill",)
    for kind in kinds:
        if kind not in faults.KINDS:
            parser.error(f"--kinds: {kind!r} is none of {','.join(faults.KINDS)}")
    if "peer" in kinds and options.hosts < 2:
        parser.error("--kinds: peer needs --hosts=2")
    if options.hosts < 1 or (options.devices or options.hosts) % options.hosts:
        parser.error(f"--devices={options.devices}: not divided by --hosts={options.hosts}")
    options.workdir = local(options.workdir, "pr2jax.chaos")
    if options.workdir.exists() and any(options.workdir.iterdir()):
        parser.error(f"--workdir={options.workdir}: is not empty")
    kinds = faults.schedule(count, kinds, random.Random(f"kinds {options.seed}"))
    return options, settings, kinds


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m pr2jax.chaos`; the exit code."""
    options, settings, kinds = _options(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what we started ends with us
    command = [sys.executable, "-m", "pr2jax.main", f"--config={options.config}", *settings]
    environment, draw = dict(os.environ), random.Random(options.seed)
    if options.devices:
        each = options.devices // options.hosts
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={each}"
    say = lambda line: print(line, flush=True)
    try:
        whole, trials = torment(
            *(command, options.workdir, kinds, draw, environment, say),
            options=Options(options.hosts, options.hang_s),
            victims=random.Random(f"victims {options.seed}"),
        )
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    import jax
    from absl import logging as absl_logging

    from pr2jax.chaos import judge
    from pr2jax.core.metrics import write_json

    jax.config.update("jax_platforms", "cpu")  # comparing needs no accelerator
    absl_logging.set_verbosity(absl_logging.ERROR)  # orbax tells of every folder it opens
    left_alone = options.workdir / "whole"
    rows = [judge.judge(left_alone, trial) for trial in trials]
    judge.table(rows, say)
    equal = all(map(judge.passed, rows))
    say("every trial ended as the run left alone" if equal else "NOT EQUAL")
    saved = json.loads((left_alone / "config.json").read_text(encoding="utf-8"))
    again = judge.too_much_again(rows, saved["loop"]["checkpoint_every"])
    for line in again:
        say(f"more than a checkpoint's interval was done again: {line}")
    costs = judge.effective_time(rows)
    if costs:
        say(
            f"steps of 30 s, faults at a tenth of them: {costs['effective']:.1%} of the time would "
            f"be kept (means: {costs['restart_s']} s to the first step, {costs['wait_s']} s to the "
            f"end of all processes, {costs['redone']} steps again)"
        )
    planted = _planted(options, rows, left_alone, judge, say)
    caught = all(planted.values()) if planted is not None else True
    if options.json:
        write_json(
            options.json,
            {
                "config": options.config,
                "settings": settings,
                "seed": options.seed,
                "faults": len(kinds),
                "hosts": options.hosts,
                "seconds_left_alone": round(whole.seconds, 1),
                "start_up_seconds": round(whole.start_up, 1),
                "equal": equal,
                "kinds": judge.by_kind(rows),
                "checkpoint_every": saved["loop"]["checkpoint_every"],
                "redone_too_much": again,
                "effective_time": costs,
                "planted": planted,
                "trials": rows,
            },
        )
    return 0 if equal and caught and not again else 1


def _planted(options, rows, left_alone: Path, judge, say) -> dict[str, list[str]] | None:
    good = [row for row in rows if judge.passed(row)]
    if not options.plant:
        return None
    if not good:
        say("nothing is planted: no trial is good")
        return None
    trial = options.workdir / good[-1]["workdir"]
    found = judge.plant(left_alone, trial, options.workdir / "planted")
    for kind, said in found.items():
        say(f"planted in the {kind}: " + (said[0] if said else "NOT SEEN"))
    return found


if __name__ == "__main__":
    sys.exit(main())
