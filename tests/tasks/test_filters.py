"""What curation compares and decides by."""

import re

import numpy as np
import pytest

from pr2jax.core.config import ConfigError
from pr2jax.tasks import columns, filters
from pr2jax.tasks.filters import Comparable, CurateConfig, TokenCodes


def test_questions_are_compared_in_lower_case_with_single_spaces():
    compare = Comparable()
    assert compare("  What\tIS\n\n 1 + 1? ") == "what is 1 + 1?"
    assert compare("E\u0301cole") == compare("\u00c9cole") == "\u00e9cole"  # one letter or two
    assert compare("x\u00b2") != compare("x2")  # compatibility forms are other mathematics
    assert compare("a\ud800b") == "a?b"


def test_boilerplate_is_no_part_of_a_question():
    compare = Comparable((r"please answer in \\boxed\{\}\.",))
    assert compare("How many? PLEASE answer in \\boxed{}.") == "how many?"
    assert compare("Please answer in \\boxed{}.") == "please answer in \\boxed{}."  # all there is


def test_an_empty_prompt_leaves_it_to_the_raw_one():
    for prompt in ([], "", None):
        assert filters.question_of({"prompt": prompt, "raw_prompt": "Q: 1 + 1?"}) == "Q: 1 + 1?"
    asked = [{"role": "user", "content": "Who?"}]
    assert filters.question_of({"prompt": asked, "raw_prompt": "Q: 1 + 1?"}) == "Who?"


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("How many?", "How many?"),
        ([{"role": "user", "content": " How many? "}], "How many?"),
        (
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How many?"}],
            "How many?",
        ),
        ([{"role": "system", "content": "How many?"}], "How many?"),
    ],
)
def test_the_question_is_the_prompt_without_its_system_message(prompt, question):
    assert filters.question_of({"prompt": prompt}) == question


@pytest.mark.parametrize("prompt", [None, "", "  ", [], 3, [{"role": "user"}], [3]])
def test_a_prompt_without_a_question_is_refused(prompt):
    with pytest.raises(ValueError, match="prompt|message"):
        filters.question_of({"prompt": prompt})


def test_tokens_are_words_and_marks():
    assert filters.tokens("it's x_1+23, ok?") == ["it", "'", "s", "x_1", "+", "23", ",", "ok", "?"]
    assert filters.words("it's x_1+23, ok?") == ["it", "s", "x_1", "23", "ok"]
    assert filters.tokens("\u6c42\u548c1") == ["\u6c42", "\u548c", "1"]
    codes = TokenCodes()(filters.tokens("a + b"))
    assert len(filters.words_only(codes)) == 2
    assert len(set(codes.tolist())) == 3


def test_token_codes_do_not_depend_on_what_was_seen_before():
    few = TokenCodes(limit=2)
    text = filters.tokens("one two three four one two")
    assert few(text).tolist() == TokenCodes()(text).tolist() == few(text).tolist()


def test_grams_are_equal_where_the_tokens_are():
    code, rng = TokenCodes(), np.random.default_rng(0)
    text = [str(n) for n in rng.integers(0, 3, 400)]
    for size in (1, 2, 5):
        found = filters.grams(code(text), size)
        runs = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
        assert len(found) == len(runs)
        # As many codes as runs, and one for each: a bijection.
        assert len(set(zip(found.tolist(), runs, strict=True))) == len(set(runs))
        assert len(set(found.tolist())) == len(set(runs))
    assert len(filters.grams(code(["a"]), 2)) == 0
    assert len(filters.shingles(code(["a", "b"]), 3)) == 1


def test_numbers_key_is_of_the_numbers_alone():
    assert filters.numbers_key("3 hens, 12 geese") == filters.numbers_key("12 cows and 3 dogs")
    assert filters.numbers_key("3 hens") != filters.numbers_key("4 hens")
    assert filters.numbers_key("1.5 m") != filters.numbers_key("1 5 m")


def test_difficulty_rule_of_guru():
    rates = np.array([[0.9, 0.5], [0.89, 0.5], [0.0, 1e-5], [0.0, 0.0625], [np.nan, np.nan]])
    cfg = CurateConfig()
    assert filters.too_easy(rates, cfg).tolist() == [True, False, False, False, False]
    assert filters.too_hard(rates, cfg).tolist() == [False, False, True, False, False]
    loose = CurateConfig(too_easy=1.0, too_hard=0.1)
    assert filters.too_easy(rates, loose).tolist() == [False] * 5
    assert filters.too_hard(rates, loose).tolist() == [False, False, True, True, False]


def test_names_of_the_pass_rates():
    assert CurateConfig().columns() == ("qwen2.5_7b_pass_rate", "qwen3_30b_pass_rate")
    models = CurateConfig(difficulty="models", weak="a", strong_column="s")
    assert models.columns() == ("weak_pass_rate", "s")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"inputs": ("a.csv",)}, "inputs"),
        ({"inputs": ("a.jsonl", "a.jsonl")}, "inputs"),
        ({"against": ("packaged/x", "packaged/x")}, "against"),
        ({"boilerplate": ("(",)}, "boilerplate"),
        ({"near": 1.5}, "near"),
        ({"near_recall": 1.0}, "near_recall"),
        ({"shard_rows": 0}, "shard_rows"),
        ({"short_words": 14}, "short_words"),
        ({"difficulty": "models"}, "difficulty"),
        ({"weak": "a"}, "difficulty"),
        ({"weak_column": "r", "strong_column": "r"}, "strong_column"),
    ],
)
def test_a_bad_setting_is_named(settings, key):
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}:"):
        CurateConfig(**settings).validate()


# --- One schema for rows that do not agree


def through_arrow(rows):
    kind = {"kind": "null"}
    for row in rows:
        kind = columns.merge(kind, columns.kind_of(row))
    return columns.table(rows, kind).to_pylist()


def test_what_all_rows_agree_on_comes_back_as_it_was():
    rows = [
        {"a": 1, "b": [[1, 2], [3]], "reward_model": {"ground_truth": ["x", "y"]}, "c": True},
        {"a": None, "b": [], "reward_model": {"ground_truth": []}, "c": None},
    ]
    assert through_arrow(rows) == rows


def test_answers_of_different_types_become_text():
    truths = ["7", 7, 7.5, ["a", "b"], {"header": ["h"], "rows": [["1"]], "other": None}]
    found = through_arrow([{"reward_model": {"ground_truth": truth}} for truth in truths])
    assert [row["reward_model"]["ground_truth"] for row in found] == [
        *("7", "7", "7.5", '["a", "b"]', '{"header": ["h"], "rows": [["1"]]}')
    ]
    # An int among floats must not become "7.0": answers are compared as texts.
    found = through_arrow([{"reward_model": {"ground_truth": t}} for t in (7, 7.5)])
    assert [row["reward_model"]["ground_truth"] for row in found] == ["7", "7.5"]


def test_objects_of_other_keys_are_json_except_where_guru_has_them():
    rows = [
        {"reward_model": {"ground_truth": {"a": 1}}, "extra_info": {"index": 1}},
        {"reward_model": {"ground_truth": {"b": 1}}, "extra_info": {"split": "train"}, "rate": 1},
        {"reward_model": {"ground_truth": {"b": 1}}, "extra_info": {"index": "x"}, "rate": 0.5},
    ]
    found = through_arrow(rows)
    assert [r["reward_model"]["ground_truth"] for r in found] == [
        '{"a": 1}',
        '{"b": 1}',
        '{"b": 1}',
    ]
    assert [r["extra_info"] for r in found] == [
        {"index": "1", "split": None},
        {"index": None, "split": "train"},
        {"index": "x", "split": None},
    ]
    assert [r["rate"] for r in found] == [None, 1.0, 0.5]


def test_lists_that_mix_and_integers_too_large_are_text():
    found = through_arrow([{"a": [1, "x"], "b": 2**70}, {"a": [1], "b": 1}])
    assert found == [{"a": '[1, "x"]', "b": str(2**70)}, {"a": "[1]", "b": "1"}]
