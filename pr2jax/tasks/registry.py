"""From a TaskConfig to a Task, and from a problem's `data_source` to its verifier."""

from collections.abc import Callable, Iterable

from pr2jax.tasks import generated, gym, math, mixture, packaged, rows
from pr2jax.tasks.base import MIXTURE, Problem, Task, TaskConfig, Verdict, checked

# Chosen by the start of `data_source`: reasoning-gym's own names, then Guru's domains.
VERIFIERS: dict[str, Callable[[Problem, str], Verdict]] = {
    "reasoning_gym/": gym.verify,
    "math__": math.verify,
}


def verifier_for(data_source: str) -> Callable[[Problem, str], Verdict]:
    """The verifier of a data source. Raises ValueError naming it where there is none."""
    for prefix, verify in VERIFIERS.items():
        if data_source.startswith(prefix):
            return verify
    raise ValueError(
        f"no verifier for data_source {data_source!r}; there are: {', '.join(VERIFIERS)}"
    )


def score(problem: Problem, response: str) -> Verdict:
    """Scores one response here, without limits. Raises what the verifier raises."""
    return checked(verifier_for(problem.data_source)(problem, response))


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
