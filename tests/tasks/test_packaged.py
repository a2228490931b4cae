"""HumanEval and ARC as they come with packages."""

import ast
import functools
import json
import random
import sys

import pytest

from pr2jax.core.config import ConfigError
from pr2jax.tasks import base, packaged
from pr2jax.tasks.base import TaskConfig
from pr2jax.tasks.registry import build_task


@functools.cache
def every(name):
    return build_task(TaskConfig(name=f"packaged/{name}", size=-1, held_out=0))


def test_human_eval_is_whole_and_in_gurus_shape():
    task = every("human_eval")
    assert {p.id for p in task.train} == {f"HumanEval/{i}" for i in range(164)}
    for problem in task.train:
        assert base.domain_of(problem) == "code"
        entry = problem.meta["entry_point"]
        tests = json.loads(problem.answer)["functional"]
        assert tests.endswith(f"\n\ncheck({entry})")
        defined = {node.name for node in ast.parse(tests).body if isinstance(node, ast.FunctionDef)}
        assert "check" in defined
        program = problem.solution.removeprefix("```python\n").removesuffix("\n```")
        functions = {n.name for n in ast.parse(program).body if isinstance(n, ast.FunctionDef)}
        assert entry in functions
        assert program.startswith(problem.meta["prefix"])
        assert problem.meta["prefix"].strip() in problem.prompt
        # No test and no solution in what the model reads.
        body = program.removeprefix(problem.meta["prefix"]).strip()
        assert body not in problem.prompt
        assert tests.strip() not in problem.prompt


def test_human_eval_row_by_hand():
    (problem,) = [p for p in every("human_eval").train if p.id == "HumanEval/23"]
    assert problem.meta["entry_point"] == "strlen"
    space = {}
    exec(problem.meta["prefix"] + "    return len(string)\n", space)
    exec(json.loads(problem.answer)["functional"], space)


def test_wrong_programs_of_human_eval_give_other_values():
    for problem in every("human_eval").train[:20]:
        response, expected = packaged.wrong(problem, random.Random(0))
        assert expected == 0.0
        space = {}
        exec(response.removeprefix("```python\n").removesuffix("```"), space)
        right, wrong = space["_right"], space[problem.meta["entry_point"]]
        assert right is not wrong
    (problem,) = [p for p in every("human_eval").train if p.id == "HumanEval/23"]
    exec(packaged.wrong(problem, None)[0].removeprefix("```python\n").removesuffix("```"), space)
    assert (space["_right"]("abc"), space["strlen"]("abc")) == (3, 4)


def test_human_eval_can_be_for_evaluation_alone():
    task = build_task(TaskConfig(name="packaged/human_eval", size=0, held_out=164))
    assert (len(task.train), len(task.held_out)) == (0, 164)
    with pytest.raises(ConfigError, match="size: packaged/human_eval has 164 distinct"):
        build_task(TaskConfig(name="packaged/human_eval", size=100, held_out=65))


@pytest.mark.parametrize(
    ("name", "tasks", "version"),
    [
        # Numbers of tasks as published: 400 + 400, 1000 + 120.
        ("arc1", 800, 1),
        ("arc1_train", 400, 1),
        ("arc1_eval", 400, 1),
        ("arc2", 1120, 2),
        ("arc2_train", 1000, 2),
        ("arc2_eval", 120, 2),
    ],
)
def test_arc_sets(name, tasks, version):
    task = every(name)
    problems = task.train
    assert len({p.id for p in problems}) == len(problems)
    assert len(problems) == task.stats["problems"] - task.stats["repeats"]
    # One evaluation task of ARC-AGI-1 (070dd51e) is one of its training tasks (40853293).
    repeats = int(name == "arc1")
    assert task.stats["repeats"] == repeats
    assert len({p.meta["task"] for p in problems}) == tasks - repeats
    for problem in problems:
        assert problem.data_source == f"logic__arcagi{version}"
        assert base.domain_of(problem) == "logic"
        grid = json.loads(problem.answer)
        assert 1 <= len(grid) <= 30
        assert len({len(row) for row in grid}) == 1
        assert {type(cell) for row in grid for cell in row} == {int}
        assert problem.solution == f"<answer>{problem.answer}</answer>"
        wrong, expected = packaged.wrong(problem, random.Random(problem.id))
        other = json.loads(wrong.removeprefix("<answer>").removesuffix("</answer>"))
        assert other != grid
        assert expected == 0.0


def test_an_arc_task_by_hand():
    # 007bbfb7 of ARC-AGI-1's training tasks, as published: a 3 x 3 grid tiles itself.
    (problem,) = [p for p in every("arc1_train").train if p.meta["task"] == "007bbfb7"]
    assert "Example 1\nInput:\n0 7 7\n7 7 7\n0 7 7\nOutput:\n0 0 0 0 7 7 0 7 7\n" in problem.prompt
    assert "\n\nInput:\n7 0 7\n7 0 7\n7 7 0\n\n" in problem.prompt
    tile = [[7, 0, 7], [7, 0, 7], [7, 7, 0]]
    want = [[tile[i % 3][j % 3] * (tile[i // 3][j // 3] > 0) for j in range(9)] for i in range(9)]
    assert json.loads(problem.answer) == want


def test_arc_1_tasks_in_arc_2_are_known_again():
    held, train = every("arc1_eval").train, every("arc2_train").train
    shared = {p.meta["task"] for p in held} & {p.meta["task"] for p in train}
    assert len(shared) == 376
    # Their texts differ (the order of the examples), so texts alone would not tell.
    texts = [{p.meta["question"] for p in ps} for ps in (held, train)]
    assert not texts[0] & texts[1]
    parts = {
        "evaluation": TaskConfig(name="packaged/arc1_eval", size=0, held_out=len(held)),
        "training": TaskConfig(name="packaged/arc2_train", size=-1, held_out=0),
    }
    task = build_task(TaskConfig(name="mixture", parts=parts))
    assert len(task.held_out) == len(held)
    assert {p.meta["task"] for p in task.train} == {p.meta["task"] for p in train} - shared


def test_order_and_split_follow_the_seed():
    cfg = TaskConfig(name="packaged/arc1_train", size=50, held_out=20)
    task, again = build_task(cfg), build_task(cfg)
    assert (task.train, task.held_out) == (again.train, again.held_out)
    other = build_task(TaskConfig(name="packaged/arc1_train", size=50, held_out=20, seed=1))
    assert {p.id for p in other.held_out} != {p.id for p in task.held_out}


def test_no_code_of_the_packages_runs():
    for name in ("human_eval", "arc1", "arc2"):
        every(name)
    assert "human_eval.execution" not in sys.modules


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "packaged/humaneval"}, "name: no packaged set 'humaneval'.*'human_eval'"),
        ({"settings": '{"a": 1}'}, "settings: packaged has none"),
        ({"lowercase": True}, "lowercase: packaged"),
        ({"allow_unsound": True}, "allow_unsound: only for reasoning_gym"),
        ({"size": -2}, "size: -2"),
    ],
)
def test_bad_settings_name_their_key(fields, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        build_task(TaskConfig(**({"name": "packaged/arc1"} | fields)))
