"""Several tasks as one: no question twice over all of them, ids and figures told apart by part."""

import dataclasses
import random
from collections.abc import Callable, Iterable

from pr2jax.core.config import ConfigError
from pr2jax.tasks.base import Problem, Task, TaskConfig
from pr2jax.tasks.draw import Split
from pr2jax.tasks.rows import RowError


def build(cfg: TaskConfig, exclude: Iterable[Problem], build_task: Callable[..., Task]) -> Split:
    """The parts of a mixture, built by `build_task(part, exclude)`.

    Training problems are interleaved in proportion to the parts' sizes: in any prefix each part
    is within one problem of its share, give or take rounding of the shares. Held-out problems are
    the union, interleaved likewise, and do not change with any part's `size`. A problem's id
    is "PART/ID", and meta["part"] says where it is from; counts are "PART.count".
    Raises ConfigError "parts.NAME.key: ..." or RowError for what is wrong with a part.
    """
    exclude = list(exclude)
    names = sorted(cfg.parts)  # the order a ConfigDict gives them, whatever the writer's
    # Held-out questions of all parts first: no part may train on another's.
    held: dict[str, list[Problem]] = {}
    for name in names:
        part = cfg.parts[name]
        others = exclude + [p for problems in held.values() for p in problems]
        held[name] = []
        if part.held_out:
            only = dataclasses.replace(part, size=0) if not part.parts else part
            held[name] = _part(build_task, name, only, others).held_out
    train: dict[str, list[Problem]] = {}
    stats: dict[str, int] = {}
    for name in names:
        others = [p for other in names if other != name for p in held[other]]
        others += [p for problems in train.values() for p in problems]
        task = _part(build_task, name, cfg.parts[name], exclude + others)
        train[name] = task.train
        counts = {"train": len(task.train), "held_out": len(task.held_out)} | task.stats
        stats |= {f"{name}.{key}": value for key, value in counts.items()}
        held[name] = task.held_out
    mixed = [_named(name, p) for name, p in interleave(train, cfg.seed)]
    # Interleaved, too: the first so many of them are of all parts.
    return mixed, [_named(name, p) for name, p in interleave(held, cfg.seed)], stats


def _part(build_task: Callable[..., Task], name: str, part: TaskConfig, exclude: list) -> Task:
    try:
        return build_task(part, exclude)
    except ConfigError as error:
        raise ConfigError(f"parts.{name}.{error}") from None
    except RowError as error:
        raise RowError(f"parts.{name}: {error}") from None


def _named(part: str, problem: Problem) -> Problem:
    inner = problem.meta.get("part")
    meta = problem.meta | {"part": f"{part}/{inner}" if inner else part}
    return dataclasses.replace(problem, id=f"{part}/{problem.id}", meta=meta)


def interleave(parts: dict[str, list[Problem]], seed: int) -> list[tuple[str, Problem]]:
    """(part, problem) with each part spread evenly over the whole, keeping a part's own order.

    Problem i of n stands at (i + u) / n of the way, with u in [0, 1) drawn for each part.
    """
    placed = []
    for name in sorted(parts):
        offset = random.Random(f"{seed}/{name}").random()
        size = len(parts[name])
        placed += [((i + offset) / size, name, p) for i, p in enumerate(parts[name])]
    placed.sort(key=lambda item: item[:2])
    return [(name, problem) for _, name, problem in placed]
