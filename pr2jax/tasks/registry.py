"""From a TaskConfig to a Task, and from a problem's `data_source` to its verifier."""

import functools
from collections.abc import Callable, Iterable

from pr2jax.tasks import (
    code,
    generated,
    gym,
    logic,
    math,
    mixture,
    packaged,
    rows,
    science,
    simulation,
    tabular,
)
from pr2jax.tasks.base import MIXTURE, JudgeRequest, Problem, Task, TaskConfig, Verdict, checked
from pr2jax.tasks.tools import Tools

Scored = Verdict | JudgeRequest
Verifier = Callable[[Problem, str, Tools], Scored]


def _pure(verify: Callable[[Problem, str], Scored]) -> Verifier:
    return lambda problem, response, tools: verify(problem, response)


_science = _pure(science.verify)

# Chosen by the longest of these that a `data_source` starts with: reasoning-gym's own names, then
# Guru's domains and sets.
VERIFIERS: dict[str, Verifier] = {
    "reasoning_gym/": _pure(gym.verify),
    "math__": _pure(math.verify),
    "code__": code.verify,
    "codegen__": code.verify,
    "stem__": _science,
    "stem_web": _science,
    "science__": _science,
    "zebra_puzzle_dataset": _pure(logic.verify_zebra),
    "logic__zebra_puzzle": _pure(logic.verify_zebra),
    "ordering_puzzle_dataset": _pure(logic.verify_ordering),
    "logic__ordering_puzzle": _pure(logic.verify_ordering),
    "graph_logical_dataset": _pure(logic.verify_word),
    "logic__graph_logical": _pure(logic.verify_word),
    "logic__arcagi": _pure(logic.verify_grid),
    "logic__barc": _pure(logic.verify_grid),
    "simulation__arcagi": _pure(logic.verify_grid),
    "simulation__barc": _pure(logic.verify_grid),
    "simulation__codeio": _pure(simulation.verify_codeio),
    "simulation__cruxeval": simulation.verify_cruxeval,
    "table__": _pure(tabular.verify),
    "tabular__": _pure(tabular.verify),
}


def verifier_for(data_source: str) -> Verifier:
    """The verifier of a data source. Raises ValueError naming it where there is none."""
    known = [prefix for prefix in VERIFIERS if data_source.startswith(prefix)]
    if not known:
        raise ValueError(
            f"no verifier for data_source {data_source!r}; there are: {', '.join(VERIFIERS)}"
        )
    return VERIFIERS[max(known, key=len)]


def needs(problem: Problem) -> str:
    """What scoring the problem may take besides a rule: "sandbox", "judge", or ""."""
    verify = verifier_for(problem.data_source)
    if verify in (code.verify, simulation.verify_cruxeval):
        return "sandbox"
    judged = verify is _science and science.kind_of(problem) in ("formula", "text")
    return "judge" if judged else ""


@functools.cache
def _own_tools() -> Tools:
    return Tools()


def score(problem: Problem, response: str, tools: Tools | None = None) -> Scored:
    """Scores one response here, without limits, or says what a judge has to decide.

    tools: what verifiers that run programs need; without them this process opens its own with
    default settings. Raises what the verifier raises.
    """
    verify = verifier_for(problem.data_source)
    return checked(verify(problem, response, _own_tools() if tools is None else tools))


def build_task(cfg: TaskConfig, exclude: Iterable[Problem] = ()) -> Task:
    """Builds the problems of a task, none of whose questions is among `exclude`.

    Held-out problems are taken first and do not change with `size`; the same `cfg` gives the
    same task. Raises ConfigError naming the key, or RowError for a bad file.
    """
    cfg.validate()
    if cfg.kind == MIXTURE:
        train, held_out, stats = mixture.build(cfg, exclude, build_task)
    elif cfg.kind in ("jsonl", "parquet"):
        train, held_out, stats = rows.build(cfg, exclude, check=verifier_for)
    else:
        build = {"reasoning_gym": gym, "packaged": packaged, "generated": generated}[cfg.kind].build
        train, held_out, stats = build(cfg, exclude)
    return Task(cfg, train, held_out, score, stats)
