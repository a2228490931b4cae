"""What counts as the same answer."""

import pytest

from pr2jax.evaluation.votes import answer_key
from pr2jax.tasks.base import Problem


def problem(source, **meta):
    return Problem("p", "?", "", source, meta=meta)


@pytest.mark.parametrize(
    ("source", "response", "key"),
    [
        ("math__x", "<think>\\boxed{1}</think> so \\boxed{ 2  X }", "2 x"),
        ("math__x", "I do not know", None),
        ("stem__gpqa", "\\boxed{C}", "c"),
        ("table__hitab", "\\boxed{1 | 2}", "1 | 2"),
        ("logic__zebra_puzzle", "so <answer>{'rows': []}</answer>", "{'rows': []}"),
        ("codegen__mbpp", "first\n```python\ndef f():\n    pass\n```", "def f(): pass"),
        ("codegen__mbpp", "no code", None),
        ("simulation__cruxeval-o", "[ANSWER] 'ab' [/ANSWER]", "'ab'"),
        ("simulation__codeio", '```json\n{"output": [1,2]}\n```', "{'output': [1, 2]}"),
        ("simulation__codeio", '```json\n{"output":  [1, 2]}\n```', "{'output': [1, 2]}"),
        ("reasoning_gym/chain_sum", " 12\n", "12"),
        ("reasoning_gym/chain_sum", "  ", None),
    ],
)
def test_answers_are_found_where_verifiers_look(source, response, key):
    assert answer_key(problem(source), response) == key


def test_the_tasks_own_expression_goes_first():
    asked = problem("math__x", response_regex=r"A: (\S+)")
    assert answer_key(asked, "\\boxed{1} A: 7") == "7"
    assert answer_key(asked, "\\boxed{1}") is None


def test_a_gym_problem_of_a_domain_is_still_answered_whole():
    assert answer_key(problem("reasoning_gym/chain_sum", domain="math"), "12") == "12"
