"""Verifiers by data source, and Guru's files as they are."""

import json
import subprocess
import sys

import pytest

from pr2jax.tasks import logic, rows
from pr2jax.tasks.base import JudgeRequest, Problem, TaskConfig, Verdict, checked, domain_of
from pr2jax.tasks.registry import VERIFIERS, build_task, needs, score, verifier_for

# Of every kind of source: a ground truth as Guru's files have it, a right and a wrong response.
GRID = [[1, 2], [3, 4]]
ZEBRA = {"header": ["House", "Pet"], "rows": [["1", "cat"], ["2", "dog"]]}
CRUX = "[PYTHON]\ndef f(x):\n    return x + 1\nassert f(16) == ??\n[/PYTHON]"
CASES = [
    ("math__dapo", "34", r"\boxed{34}", r"\boxed{35}", "math"),
    ("stem__gpqa_diamond", "C", r"\boxed{C}", r"\boxed{D}", "science"),
    ("stem_web", "9.8 m/s^2", r"\boxed{9.8}", r"\boxed{8.9}", "science"),
    ("zebra_puzzle_dataset", ZEBRA, f"<answer>{ZEBRA}</answer>", "<answer>x</answer>", "logic"),
    ("ordering_puzzle_dataset", ["a", "b"], '<answer>["a","b"]</answer>', "a, b", "logic"),
    ("graph_logical_dataset", "leaf", "<answer>leaf</answer>", "<answer>eaf</answer>", "logic"),
    ("simulation__arcagi1", GRID, f"<answer>{GRID}</answer>", "<answer>[[1]]</answer>", "logic"),
    ("simulation__barc", GRID, f"<answer>{GRID}</answer>", "<answer>[[1]]</answer>", "logic"),
    ("simulation__codeio", '"output": {"a": 1}', '```json\n{"output": {"a": 1}}\n```', "{}",
     "simulation"),
    ("simulation__cruxeval-o", '{"functional": "17"}', "[ANSWER]17[/ANSWER]",
     "[ANSWER]16[/ANSWER]", "simulation"),
    ("table__hitab", "a|1,000", r"\boxed{1000|a}", r"\boxed{a}", "tabular"),
]  # fmt: skip


def row(source, truth, i=0, **changes):
    base = {
        "prompt": [{"role": "user", "content": f"{i} {CRUX}"}],
        "data_source": source,
        "ability": "x",
        "apply_chat_template": True,
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "train", "index": i},
        "qwen2.5_7b_pass_rate": 0.25,
        "qwen3_30b_pass_rate": None,
    }
    return base | changes


def tasks(path, rows_, kind):
    """The rows as problems, out of a file of their own."""
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows_), encoding="utf-8")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_), path)
    return build_task(TaskConfig(name=f"{kind}:{path}", size=-1, held_out=0)).train


@pytest.mark.parametrize(("source", "truth", "right", "wrong", "domain"), CASES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_every_domain(tmp_path, source, truth, right, wrong, domain, kind):
    (problem,) = tasks(tmp_path / f"r.{kind}", [row(source, truth)], kind)
    assert domain_of(problem) == domain
    assert problem.meta["index"] == 0
    assert problem.meta["pass_rates"] == {"qwen2.5_7b": 0.25}
    assert score(problem, right).score == 1.0
    assert score(problem, wrong).score == 0.0
    for cut in (f"<think>{right}", f"<think>{right}</think>", right[: len(right) // 2]):
        assert score(problem, cut).score == 0.0


def test_json_texts_as_ground_truth(tmp_path):
    found = tasks(tmp_path / "r.jsonl", [row("zebra_puzzle_dataset", json.dumps(ZEBRA))], "jsonl")
    assert score(found[0], f"<answer>{json.dumps(ZEBRA)}</answer>").score == 1.0


def test_objects_of_different_keys_in_one_parquet_column(tmp_path):
    """A column of objects has the keys of all rows; those that a row lacks are None."""
    truths = [ZEBRA, {"other": 1}]
    sources = ["zebra_puzzle_dataset", "math__x"]
    made = [row(s, t, i) for i, (s, t) in enumerate(zip(sources, truths, strict=True))]
    found = {p.data_source: p for p in tasks(tmp_path / "r.parquet", made, "parquet")}
    assert json.loads(found["zebra_puzzle_dataset"].answer) == ZEBRA
    assert json.loads(found["math__x"].answer) == {"other": 1}


def test_what_verifiers_need_of_a_row():
    cfg = TaskConfig(name="jsonl:x")
    extra = {"index": 3, "prefix": "import x", "original_prompt": "o", "question": "Why?", "n": 1}
    problem = rows.parse_row(cfg, "r", row("codegen__taco", "{}", extra_info=extra))
    assert problem.meta["prefix"] == "import x"
    assert problem.meta["original_prompt"] == "o"
    assert problem.meta["judge_question"] == "Why?"
    assert "n" not in problem.meta
    # Rows for base models have an empty prompt and a raw one.
    base = rows.parse_row(cfg, "r", row("table__x", "1", prompt=[], raw_prompt=" Which? "))
    assert base.prompt == "Which?\n"
    assert "judge_question" not in base.meta
    both = rows.parse_row(cfg, "r", row("stem_web", "x", raw_prompt="Which?"))
    assert both.meta["judge_question"] == "Which?"
    request = score(both, r"\boxed{y}")
    assert request == JudgeRequest("Which?", "x", "y")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"prompt": [], "raw_prompt": ""}, "prompt is neither"),
        ({"reward_model": {"ground_truth": {}}}, "ground_truth is {}"),
        ({"reward_model": {"ground_truth": []}}, r"ground_truth is \[\]"),
        ({"reward_model": {"ground_truth": {"a": None}}}, "ground_truth is {}"),
        ({"reward_model": {"ground_truth": True}}, "ground_truth is True"),
        ({"reward_model": {"ground_truth": [float("nan")]}}, "no JSON data"),
        ({"reward_model": {"ground_truth": [b"x"]}}, "no JSON data"),
    ],
)
def test_malformed_rows(changes, why):
    with pytest.raises(ValueError, match=why):
        rows.parse_row(TaskConfig(name="jsonl:x"), "r", row("math__x", "1", **changes))


def test_the_longest_prefix_decides(monkeypatch):
    assert verifier_for("logic__zebra_puzzle_v2") is VERIFIERS["logic__zebra_puzzle"]
    monkeypatch.setitem(VERIFIERS, "logic__", lambda problem, response, tools: Verdict(0.5))
    assert verifier_for("logic__zebra_puzzle_v2") is VERIFIERS["logic__zebra_puzzle"]
    assert score(Problem("p", "?", "x", "logic__new"), "x").score == 0.5


@pytest.mark.parametrize("source", ["", "chess", "logic__chess", "simulation__x", "stem", "math"])
def test_an_unknown_source_is_one_error(source):
    with pytest.raises(ValueError, match=f"no verifier for data_source '{source}'; there are: "):
        score(Problem("p", "?", "1", source), "1")


def test_tools_reach_the_verifiers_that_need_them(monkeypatch):
    seen = []
    verify = lambda problem, response, tools: seen.append(tools) or Verdict(1.0)
    monkeypatch.setitem(VERIFIERS, "needs__", verify)
    tools = object()
    score(Problem("p", "?", "1", "needs__x"), "1", tools)
    assert seen == [tools]


def test_requests_pass_through_the_check():
    request = JudgeRequest("q", "r", "a")
    assert checked(request) is request


@pytest.mark.parametrize(("source", "truth", "right", "wrong", "domain"), CASES)
def test_a_megabyte_of_garbage_scores_zero_soon(source, truth, right, wrong, domain):
    import time

    text = truth if isinstance(truth, str) else json.dumps(truth)
    problem = Problem("p", CRUX, text, source)
    score(problem, wrong)  # imports
    for garbage in ("{[" * 500_000, "\\boxed{" * 150_000, "<answer>" * 125_000, "x " * 500_000,
                    r"\boxed{" + "1," * 50_000 + "}", "<answer>" + "[1," * 60_000 + "</answer>",
                    "[ANSWER]" + "(" * 90_000 + "[/ANSWER]"):  # fmt: skip
        start = time.process_time()
        assert score(problem, garbage).score == 0.0
        assert time.process_time() - start < 0.5


def test_verifiers_import_no_jax():
    code = (
        "import sys; from pr2jax.tasks import registry, judge, rewards; from pr2jax.tasks.base "
        "import Problem; registry.score(Problem('p', '?', '1', 'math__x'), r'\\boxed{1.0}'); "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert logic.NO_ANSWER


@pytest.mark.parametrize(
    ("source", "answer", "needed"),
    [
        ("math__dapo", "34", ""),
        ("codegen__taco", '{"functional": "x"}', "sandbox"),
        ("simulation__cruxeval-i", "1", "sandbox"),
        ("simulation__codeio", '"output": 1', ""),
        ("stem__gpqa", "C", ""),
        ("stem_web", "9.8 m/s^2", ""),
        ("stem_web", "Rayleigh scattering", "judge"),
        ("logic__zebra_puzzle", "{}", ""),
    ],
)
def test_what_scoring_may_take(source, answer, needed):
    assert needs(Problem("p", "?", answer, source)) == needed
