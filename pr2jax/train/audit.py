"""Two runs of one configuration compared: states bit for bit, rows, evaluations, the ledger."""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path
from typing import Any

from etils import epath

from pr2jax.core.checkpoint import read_arrays, read_checkpoint
from pr2jax.core.config import from_config_dict
from pr2jax.core.manifest import COMMITTED
from pr2jax.core.store import as_path, is_store
from pr2jax.data.packing import BatchOrder
from pr2jax.data.tokenizer import build_tokenizer
from pr2jax.tasks.registry import build_task
from pr2jax.train.config import Config
from pr2jax.train.loop import LEDGER
from pr2jax.train.sft import pack_problems

# Figures of the clock or of the process, not of the run.
TIMED = ("time", "tokens_per_second", "model_flops_per_second", "mfu", "compilations")
TIMED_PREFIXES = ("time/", "journal/")
BY_THE_CLOCK = "sft_continued"


def rows(path: epath.Path | Path) -> list[dict[str, Any]]:
    """All lines of a JSONL file, repeated steps included. Raises ValueError for a torn one."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in TIMED and not k.startswith(TIMED_PREFIXES)}


def compare_stage(whole: str | os.PathLike, killed: str | os.PathLike) -> list[str]:
    """What differs between two stages' folders, a line each."""
    whole, killed = as_path(whole), as_path(killed)
    (step, a), (other, b) = (read_arrays(p / "checkpoints") for p in (whole, killed))
    if step != other:
        return [f"the last checkpoint is of step {other}, not {step}"]
    found = [f"array {name} is in one of the two" for name in a.keys() ^ b.keys()]
    found += [f"array {n} differs" for n in a.keys() & b.keys() if a[n].tobytes() != b[n].tobytes()]
    extras = [read_checkpoint(p / "checkpoints", "latest")[1] for p in (whole, killed)]
    found += [
        f"{key} in the checkpoint differs"
        for key in ("position", "memory", "config")
        if extras[0][key] != extras[1][key]
    ]
    for name in ("metrics.jsonl", LEDGER):
        if not (whole / name).exists():
            continue
        one, two = rows(whole / name), rows(killed / name)
        if [r["step"] for r in one] != [r["step"] for r in two]:
            found.append(f"{name}: steps {[r['step'] for r in two]}")
            continue
        for x, y in zip(map(_figures, one), map(_figures, two), strict=True):
            keys = [k for k in sorted(x.keys() | y.keys()) if x.get(k) != y.get(k)]
            found += [f"{name}, step {x['step']}: {k} differs" for k in keys[:3]]
    return found + [f"{name} was left behind" for name in _left_behind(killed)]


def _left_behind(folder: epath.Path) -> list[str]:
    """Names of what killed processes began to write: parts of checkpoints, files without a name."""
    if is_store(folder):
        steps = [p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
        return [p.name for p in steps if not (p / COMMITTED).exists()]
    folder = Path(folder)
    left = [p.name for p in folder.rglob("*") if "orbax-checkpoint-tmp" in p.name]
    return left + [p.name for p in folder.glob(".*")] + [p.name for p in folder.glob("journal/.*")]


def updates(stage: Path) -> int:
    """Optimizer steps that a stage's last checkpoint has behind it."""
    _, arrays = read_arrays(stage / "checkpoints")
    return int(arrays["step"])


def compare_files(whole: Path, killed: Path) -> list[str]:
    """What differs between the evaluations and reports of two runs."""
    found = []
    for path in sorted(whole.glob("*")):
        own = killed / path.name
        if path.is_file() and path.name != "chaos.log" and not own.exists():
            found.append(f"{path.name} is missing")
        elif path.name.startswith("eval_") and BY_THE_CLOCK not in path.name:
            one, two = (json.loads(p.read_text(encoding="utf-8")) for p in (path, own))
            if any(one[k] != two[k] for k in one.keys() - {"seconds"}):
                found.append(f"{path.name} differs")
    return found


def expected_items(workdir: Path, stage: str, count: int) -> list | None:
    """The first `count` items in the order that the run's seed defines; None where the ledger's
    items are not places in such an order (pre-training)."""
    saved = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    cfg = from_config_dict(Config, saved)
    kind = stage if cfg.mode == "sft_then_rl" else cfg.mode
    if kind == "rl":
        items: list = [problem.id for problem in build_task(cfg.rl_task).train]
    elif kind == "sft" and cfg.mode == "sft":
        problems = build_task(cfg.sft.task).train
        packed = pack_problems(problems, build_tokenizer(cfg.tokenizer), cfg.sft.row_length)
        items = list(range(len(packed.tokens)))
    else:
        return None
    order = BatchOrder(len(items), 1, cfg.seed)
    return [items[order.at(i)[0]] for i in range(count)]


def account(workdir: Path, stage: Path, reference: Path) -> dict[str, int]:
    """{"items", "skipped", "twice"} of a stage's ledger against the seed's order (without one,
    against the ledger of the run left alone), step by step."""
    steps = rows(stage / LEDGER)
    taken = [list(map(_key, [*r["items"], *r.get("filtered", [])])) for r in steps]
    total = sum(map(len, taken))
    expected = expected_items(workdir, stage.name, total)
    if expected is None:
        expected = [x for r in rows(reference / LEDGER) for x in r["items"]]
    expected = list(map(_key, expected))
    skipped = twice = start = 0
    for items in taken:
        due = collections.Counter(expected[start : start + len(items)])
        own = collections.Counter(items)
        start += len(items)
        skipped += sum((due - own).values())
        twice += sum((own - due).values())
    return {"items": total, "skipped": skipped + len(expected) - start, "twice": twice}


def _key(item: Any) -> str:
    return json.dumps(item)
