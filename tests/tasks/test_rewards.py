r"""Format and length terms."""

import pytest

from pr2jax.core.config import ConfigError
from pr2jax.tasks.rewards import RewardTerm, format_reward, length_reward, term_value


@pytest.mark.parametrize(
    ("kind", "text", "want"),
    [
        ("boxed", r"so \boxed{4}", 1),
        ("boxed", r"so \boxed{ }", 0),
        ("boxed", r"so \boxed{4", 0),
        ("boxed", r"<think>\boxed{4}</think> 4", 0),
        ("answer_tag", "<answer>4</answer>", 1),
        ("answer_tag", "<answer></answer>", 0),
        ("answer_tag", "<answer>4</answer><answer>5</answer>", 0),
        ("answer_tag", "<answer>4", 0),
        ("think", "<think>a</think> b", 1),
        ("think", " \n<think></think>b", 1),
        ("think", "<think>a</think>", 0),
        ("think", "<think>a</think> \n", 0),
        ("think", "<think>a", 0),
        ("think", "a</think> b", 0),
        ("think", "x <think>a</think> b", 0),
        ("think", "<think>a</think> b <think>c</think> d", 0),
        ("think", "<think><think>a</think> b", 0),
        ("think_opened", "a</think> b", 1),
        ("think_opened", "<think>a</think> b", 0),
        ("think_opened", "a</think></think> b", 0),
        ("json", '```json\n{"a": 1}\n```', 1),
        ("json", '```json\n{"a": 1\n```', 0),
        ("json", "a", 0),
        ("code", "```python\nx\n```", 1),
        ("code", "```python\n\n```", 0),
        ("code", "```python\nx", 0),
    ],
)
def test_formats(kind, text, want):
    assert format_reward(kind, text) == want
    assert term_value(RewardTerm(kind), text, 10**6) == want


def test_length_falls_in_a_line():
    assert [length_reward(n, 100, 200) for n in (0, 100, 101, 150, 199, 200, 999)] == [
        1.0, 1.0, 0.99, 0.5, 0.01, 0.0, 0.0,
    ]  # fmt: skip
    assert term_value(RewardTerm("length", target=0, max=10), "any", 5) == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "rhyme"}, "kind: 'rhyme'"),
        ({"weight": float("nan")}, "weight: nan"),
        ({"weight": float("inf")}, "weight: inf"),
        ({"kind": "length"}, "max: target 0 and max 0"),
        ({"kind": "length", "target": 5, "max": 5}, "max: "),
        ({"kind": "length", "target": -1, "max": 5}, "max: "),
        ({"kind": "boxed", "max": 5}, "target: only for kind 'length'"),
    ],
)
def test_bad_terms_name_their_key(fields, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        RewardTerm(**fields).validate()


def test_good_terms():
    RewardTerm().validate()
    RewardTerm("length", -0.5, target=10, max=20).validate()
    with pytest.raises(ValueError, match="format 'rhyme'"):
        format_reward("rhyme", "")
