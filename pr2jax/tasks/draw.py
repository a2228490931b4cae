"""Distinct questions out of a stream or a list, held-out ones first."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator

from pr2jax.core.config import ConfigError
from pr2jax.tasks import base
from pr2jax.tasks.base import Problem, TaskConfig

Split = tuple[list[Problem], list[Problem], dict[str, int]]  # train, held out, counts


def draw(
    cfg: TaskConfig, what: str, problems: Iterator[Problem], exclude: Iterable[Problem]
) -> Split:
    """The first `held_out` distinct questions of a stream are held out, the next `size` train.

    what: names the stream in messages. Raises ConfigError where it has too few.
    """
    wanted = cfg.held_out + cfg.size
    seen = base.SeenQuestions(exclude)
    found: list[Problem] = []
    draws = misses = 0
    for problem in problems:
        draws += 1
        if seen.add(problem):
            found.append(problem)
            misses = 0
        else:
            misses += 1
        if len(found) == wanted:
            break
        # A space of exactly `wanted` equally likely questions is exhausted long before this.
        if misses > 1000 + 4 * wanted:
            raise ConfigError(
                f"size: {what} gave {len(found)} distinct questions not excluded in {draws} "
                f"draws; {cfg.size} and {cfg.held_out} held out were asked for"
            )
    return found[cfg.held_out :], found[: cfg.held_out], {"draws": draws, "repeats": draws - wanted}


def split(cfg: TaskConfig, problems: Iterable[Problem], exclude: Iterable[Problem]) -> Split:
    """Distinct questions of a list, in an order given by seed and question, held-out first.

    The order does not depend on where a problem stands, so a list with additions keeps most of
    its split. Raises ConfigError where there are too few.
    """
    seen = base.SeenQuestions(exclude)
    total, found = 0, []
    for problem in problems:
        total += 1
        if seen.add(problem):
            found.append(problem)

    def rank(problem: Problem) -> bytes:
        text = f"{cfg.seed}/{base.question_keys(problem)[0]}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()

    found.sort(key=rank)
    wanted = cfg.held_out + max(cfg.size, 0)
    if len(found) < wanted or (cfg.size == -1 and len(found) == cfg.held_out):
        size = "all others" if cfg.size == -1 else cfg.size
        raise ConfigError(
            f"size: {cfg.name} has {len(found)} distinct questions not excluded; {size} and "
            f"{cfg.held_out} held out were asked for"
        )
    end = None if cfg.size == -1 else wanted
    train = list(itertools.islice(found, cfg.held_out, end))
    return train, found[: cfg.held_out], {"repeats": total - len(found)}
