r"""Math answers (the last \boxed{}), and rows of the Guru schema in JSONL and parquet."""

import json
import logging

import pytest

from pr2jax.core.config import ConfigError
from pr2jax.tasks.base import Problem, TaskConfig
from pr2jax.tasks.registry import build_task, score
from pr2jax.tasks.rows import RowError


def problem(answer):
    return Problem("p", "?", answer, "math__test")


@pytest.mark.parametrize(
    ("answer", "response", "want"),
    [
        ("42", r"\boxed{42}", 1),
        ("1/2", r"\boxed{\frac{1}{2}}", 1),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1),
        (r"\boxed{x^2+2x+1}", r"\boxed{(x+1)^2}", 1),
        (r"\{1, 2, 3\}", r"\boxed{\{3, 2, 1\}}", 1),
        ("42", r"\boxed{43}", 0),
        ("42", "42", 0),
        ("42", r"\boxed{42} no, \boxed{41}", 0),
        ("42", r"\boxed{}", 0),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", 1),
    ],
)
def test_math_answers(answer, response, want):
    verdict = score(problem(answer), response)
    assert verdict.score == want
    assert (verdict.reason == "") == (want == 1)


def test_math_answers_by_a_stated_form():
    p = Problem("p", "?", "1/2", "math__test", meta={"response_regex": "Answer: (.*)"})
    assert score(p, "Answer: 0.5").score == 1.0
    assert score(p, r"\boxed{0.5}").score == 0.0


def row(i, **changes):
    base = {
        "prompt": [{"role": "user", "content": f"What is {i} + {i}?"}],
        "data_source": "math__sums",
        "ability": "math",
        "apply_chat_template": True,
        "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
        "extra_info": {"split": "train", "index": i},
    }
    return base | changes


def write_jsonl(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return f"jsonl:{path}"


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return f"parquet:{path}"


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_guru_rows(tmp_path, write):
    name = write(
        tmp_path / f"{write.__name__[6:]}.{write.__name__[6:]}", [row(i) for i in range(30)]
    )
    cfg = TaskConfig(name=name, size=-1, held_out=5, answer_template="\\boxed{{answer}}")
    task = build_task(cfg)
    assert (len(task.train), len(task.held_out)) == (25, 5)
    assert {p.prompt for p in task.train + task.held_out} == {
        f"What is {i} + {i}?\n" for i in range(30)
    }
    for p in task.train:
        assert p.answer == str(2 * p.meta["index"])
        assert task.score(p, p.solution).score == 1.0


def test_split_ignores_row_order_and_repeats(tmp_path):
    rows = [row(i) for i in range(30)]
    there = write_jsonl(tmp_path / "a.jsonl", rows)
    back = write_jsonl(tmp_path / "b.jsonl", rows[::-1] + rows[:7])
    a = build_task(TaskConfig(name=there, size=10, held_out=5))
    b = build_task(TaskConfig(name=back, size=10, held_out=5))
    assert [p.prompt for p in a.held_out] == [p.prompt for p in b.held_out]
    assert [p.prompt for p in a.train] == [p.prompt for p in b.train]
    assert b.stats["repeats"] == 7
    c = build_task(TaskConfig(name=there, size=-1, held_out=0), exclude=a.held_out)
    assert not {p.prompt for p in c.train} & {p.prompt for p in a.held_out}
    assert len(c.train) == 25


BAD_ROWS = [
    ('{"prompt": ', "Expecting"),
    ("[1]", "not a JSON object"),
    (row(1, prompt=[]), "prompt is neither"),
    (row(1, prompt=[{"role": "user"}]), "message 0 has no string 'content'"),
    (row(1, data_source=None), "data_source is not a text"),
    (row(1, reward_model={}), "ground_truth is None"),
    (row(1, reward_model=None), "ground_truth is None"),
]


@pytest.mark.parametrize(("bad", "why"), BAD_ROWS)
def test_malformed_rows_are_counted_and_named(tmp_path, caplog, bad, why):
    name = write_jsonl(tmp_path / "rows.jsonl", [row(i) for i in range(9)] + [bad])
    with caplog.at_level(logging.WARNING):
        task = build_task(TaskConfig(name=name, size=-1, held_out=0, max_bad_share=0.1))
    assert task.stats["malformed"] == 1
    assert len(task.train) == 9
    assert "rows.jsonl:10: " in caplog.text
    assert why in caplog.text
    with pytest.raises(RowError, match=r"1 of 10 rows are malformed.*rows.jsonl:10"):
        build_task(TaskConfig(name=name, size=-1, held_out=0, max_bad_share=0.09))


def test_bytes_that_are_no_text_are_a_malformed_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(row(1)).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(RowError, match=r"rows.jsonl:2: 'utf-8'"):
        build_task(TaskConfig(name=f"jsonl:{path}", size=-1, held_out=0))


def test_unsupported_domain_stops_with_its_name(tmp_path):
    rows = [row(1), row(2, data_source="chess__taco")]
    name = write_jsonl(tmp_path / "r.jsonl", rows)
    with pytest.raises(RowError, match=r"r.jsonl:2: no verifier for data_source 'chess__taco'"):
        build_task(TaskConfig(name=name, size=-1, held_out=0, max_bad_share=1.0))


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ConfigError, match="name: no file"):
        build_task(TaskConfig(name=f"jsonl:{tmp_path}/none.jsonl"))
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(RowError, match="no rows"):
        build_task(TaskConfig(name=f"jsonl:{tmp_path}/e.jsonl"))
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match="is not a parquet file"):
        build_task(TaskConfig(name=f"parquet:{tmp_path}/x.parquet"))
    name = write_jsonl(tmp_path / "two.jsonl", [row(1), row(2)])
    with pytest.raises(ConfigError, match="size: .* has 2 distinct"):
        build_task(TaskConfig(name=name, size=5, held_out=0))
