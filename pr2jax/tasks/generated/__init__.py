"""Our own generators: every domain has one that needs no data ("generated/NAME").

An item is a pure function of (seed, index, settings); its ground truth has the shape that Guru's
files (arXiv 2506.14965) have in its domain, so that their verifiers score it.
"""

import difflib
import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.tasks import base, draw
from pr2jax.tasks.base import Problem, TaskConfig
from pr2jax.tasks.generated import logic, numbers, programs, science, simulation, tabular
from pr2jax.tasks.generated.items import Generator, Item, Settings

GENERATORS: dict[str, Generator] = {
    **numbers.GENERATORS,
    **programs.GENERATORS,
    **science.GENERATORS,
    **logic.GENERATORS,
    **simulation.GENERATORS,
    **tabular.GENERATORS,
}


def generator(name: str) -> Generator:
    """The generator of that name. Raises ConfigError where there is none."""
    if name not in GENERATORS:
        near = difflib.get_close_matches(name, GENERATORS, n=1, cutoff=0.0)
        raise ConfigError(f"name: no generator generated/{name}; did you mean {near[0]!r}?")
    return GENERATORS[name]


def item(name: str, seed: int, index: int, settings: Settings) -> Item:
    """Item `index` of a generator's stream: the same in every process."""
    rng = random.Random(f"{name}/{seed}/{index}")  # a text seeds by its SHA-512
    return generator(name).make(rng, settings)


def parse_settings(name: str, values: dict[str, Any]) -> Settings:
    """`values` as the generator's settings. Raises ConfigError "settings.key: ..."."""
    return from_config_dict(generator(name).settings, values, "settings")


def problems(cfg: TaskConfig) -> Iterator[Problem]:
    """The endless stream of a task's problems, repeats included."""
    name = cfg.name.partition("/")[2]
    settings = parse_settings(name, cfg.settings_dict())
    bare = settings.form == "bare"
    for index in itertools.count():
        try:
            made = item(name, cfg.seed, index, settings)
        except ConfigError as error:
            raise ConfigError(f"settings.{error}") from None
        wrap = "{}" if bare else made.wrap
        meta = made.meta | {"wrap": wrap, "level": settings.level}
        if bare and not cfg.response_regex:
            meta["response_regex"] = "(.+)"
        yield base.finish_problem(
            cfg,
            ident=f"{name}-{cfg.seed}-{index}",
            question=f"{made.question}\n{made.ask}" if settings.form == "full" else made.question,
            answer=made.truth,
            data_source=made.data_source,
            meta=meta,
            target=wrap.replace("{}", made.value, 1),
        )


def build(cfg: TaskConfig, exclude: Iterable[Problem] = ()) -> draw.Split:
    """Draws distinct questions: the first `held_out` are held out, the next `size` train.

    Raises ConfigError where there is no such generator, a setting is wrong, or it has too few
    distinct questions.
    """
    what = f"{cfg.name} with {cfg.settings}"
    return draw.draw(cfg, what, problems(cfg), exclude)


def wrong(problem: Problem, rng: random.Random) -> tuple[str, float]:
    """(a response that is wrong, the score it must get), for a problem of a generator here."""
    name = problem.id.rpartition("/")[2].partition("-")[0]
    return generator(name).wrong(problem, rng)
