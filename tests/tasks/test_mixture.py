"""Mixtures: parts by name, questions told apart over all of them, errors that name the part."""

import dataclasses
import json

import pytest

from pr2jax.core.config import ConfigError, from_config_dict, to_config_dict
from pr2jax.tasks import base
from pr2jax.tasks.base import MIXTURE, Problem, TaskConfig
from pr2jax.tasks.mixture import interleave
from pr2jax.tasks.registry import build_task
from pr2jax.tasks.rows import RowError

TINY = json.dumps({"level": "tiny", "form": "bare"})
SUMS = TaskConfig(name="generated/numbers", settings=TINY, size=60, held_out=10)
# "print n: add 1" to 99: 99 questions.
FEW = TaskConfig(
    name="generated/programs",
    settings=json.dumps({"level": "tiny", "io": "stdio", "families": ["add"]}),
    size=90,
    held_out=10,
)


def mixture(**parts):
    return TaskConfig(name=MIXTURE, parts=parts)


def generated(name, size, held_out=10, seed=0):
    return TaskConfig(
        name=f"generated/{name}", settings=TINY, size=size, held_out=held_out, seed=seed
    )


def six():
    return mixture(
        math=SUMS,
        code=generated("programs", 30),
        science=generated("science", 45),
        logic=generated("graph", 15),
        simulation=generated("cruxeval", 20),
        tabular=generated("tables", 50),
    )


def test_all_domains_in_one_task():
    task = build_task(six())
    assert len(task.train) == 60 + 30 + 45 + 15 + 20 + 50 == six().train_size
    assert len(task.held_out) == 60
    assert {base.domain_of(p) for p in task.train} == set(base.DOMAINS)
    # A part is named by its domain here.
    assert all(base.domain_of(p) == p.meta["part"] for p in task.train + task.held_out)
    ids = [p.id for p in task.train + task.held_out]
    assert len(set(ids)) == len(ids)
    assert all(p.id.startswith(f"{p.meta['part']}/") for p in task.train)
    assert task.stats["code.train"] == 30
    assert task.stats["science.held_out"] == 10
    assert task.stats["tabular.draws"] >= 60
    again = build_task(six())
    assert (again.train, again.held_out) == (task.train, task.held_out)


def test_parts_are_spread_in_proportion():
    sizes = {"a": 7, "b": 100, "c": 31}
    parts = {
        name: [Problem(f"{name}{i}", "?", "!", "test") for i in range(size)]
        for name, size in sizes.items()
    }
    for seed in range(5):
        mixed = interleave(parts, seed)
        for name in sizes:  # each keeps its order
            assert [p for n, p in mixed if n == name] == parts[name]
        for length in range(len(mixed)):
            for name, size in sizes.items():
                count = sum(n == name for n, _ in mixed[:length])
                # One for the part's own rounding, one for that of the prefix.
                assert abs(count - length * size / 138) <= 2
    assert interleave(parts, 0) != interleave(parts, 1)


def test_questions_are_distinct_over_parts_and_split():
    # Two parts draw from the same 99 * 99 * 2 sums with seeds of their own, most of them.
    cfg = mixture(
        one=dataclasses.replace(SUMS, size=4000, held_out=300),
        two=dataclasses.replace(SUMS, size=4000, held_out=300, seed=1),
    )
    task = build_task(cfg)
    train, held = ({p.meta["question"] for p in ps} for ps in (task.train, task.held_out))
    assert (len(train), len(held)) == (8000, 600)
    assert not train & held
    apart = [{p.meta["question"] for p in build_task(cfg.parts[n]).train} for n in cfg.parts]
    assert apart[0] & apart[1]  # built alone they overlap


def test_held_out_does_not_depend_on_sizes():
    small, large = (
        build_task(
            mixture(
                one=dataclasses.replace(SUMS, size=size, held_out=200),
                two=dataclasses.replace(SUMS, size=2 * size, held_out=200, seed=1),
            )
        )
        for size in (50, 3000)
    )
    assert small.held_out == large.held_out


def test_other_tasks_questions_are_excluded():
    first = build_task(six())
    other = build_task(
        dataclasses.replace(six(), seed=3), exclude=iter(first.train + first.held_out)
    )
    seen = base.SeenQuestions(first.train + first.held_out)
    assert not any(p in seen for p in other.train + other.held_out)


def test_a_mixture_can_be_a_part():
    task = build_task(mixture(all=six(), more=generated("tables", 5, seed=9)))
    assert task.stats["all.code.train"] == 30
    assert len({p.id for p in task.train}) == len(task.train) == 225
    assert any(p.id.startswith("all/code/programs-") for p in task.train)
    assert {p.meta["part"] for p in task.train} >= {"all/code", "more"}


def test_config_round_trip_and_overrides():
    values = to_config_dict(six())
    values.parts.math.size = 7
    values.parts.math.held_out = 3
    cfg = from_config_dict(TaskConfig, values)
    assert cfg.parts["math"] == dataclasses.replace(SUMS, size=7, held_out=3)
    assert cfg.parts["code"] == six().parts["code"]
    assert from_config_dict(TaskConfig, json.loads(json.dumps(values.to_dict()))) == cfg
    with pytest.raises(AttributeError):
        values.parts.math.sise = 7


def test_command_line_overrides_reach_parts(tmp_path, monkeypatch):
    # As main does it: a config file read by ml_collections' flag.
    from absl import flags
    from ml_collections import config_flags

    file = tmp_path / "mixed.py"
    file.write_text(
        "from pr2jax.core.config import to_config_dict\n"
        "from pr2jax.tasks.base import TaskConfig\n"
        "def get_config():\n"
        "    part = TaskConfig(name='generated/tables')\n"
        "    return to_config_dict(TaskConfig(name='mixture', parts={'a': part, 'b': part}))\n"
    )
    argv = ["prog", f"--config={file}", "--config.parts.b.size=12", "--config.parts.a.seed=4"]
    monkeypatch.setattr("sys.argv", argv)  # where that flag looks for overrides
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(argv)
    cfg = from_config_dict(TaskConfig, values.config)
    assert (cfg.parts["a"].size, cfg.parts["b"].size) == (1000, 12)
    assert (cfg.parts["a"].seed, cfg.parts["b"].seed) == (4, 0)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (TaskConfig(name=MIXTURE), "parts: a mixture needs"),
        (TaskConfig(parts={"a": SUMS}), "parts: reasoning_gym has none"),
        (dataclasses.replace(mixture(a=SUMS), size=5), "size: set it on the parts"),
        (dataclasses.replace(mixture(a=SUMS), prompt_template="{question}?"), "prompt_template: s"),
        (dataclasses.replace(mixture(a=SUMS), lowercase=True), "lowercase: set it"),
        (mixture(**{"a/b": SUMS}), "parts: 'a/b' is not a name"),
        (mixture(a=dataclasses.replace(SUMS, size=-1)), "parts.a.size: -1 problems"),
        (mixture(a=mixture(b=dataclasses.replace(SUMS, name="x"))), "parts.a.parts.b.name: 'x'"),
        (mixture(a=FEW), "parts.a.size: generated/programs .* gave 99 distinct"),
        (mixture(a=TaskConfig(name="jsonl:/nowhere")), "parts.a.name: no file"),
        (mixture(a=TaskConfig(name="mixture/a")), "parts.a.name: 'mixture/a' is not one of"),
    ],
)
def test_errors_name_the_part(cfg, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        build_task(cfg)


def test_errors_of_a_config_name_the_part_once():
    values = to_config_dict(mixture(a=SUMS))
    values.parts.a.size = -5
    with pytest.raises(ConfigError, match=r"^rl_task\.parts\.a\.size: -5 problems$"):
        from_config_dict(TaskConfig, values, "rl_task")


def test_bad_rows_name_the_part(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    with pytest.raises(RowError, match=r"^parts\.a: .*rows\.jsonl"):
        build_task(mixture(a=TaskConfig(name=f"jsonl:{path}", size=-1, held_out=0)))
