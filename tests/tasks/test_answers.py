r"""Where answers stand in responses: boxes, tags, fences, JSON, letters; and in linear time."""

import json
import time

import pytest

from pr2jax.tasks import answers
from pr2jax.tasks.base import Problem


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{\frac{a}{b^{2}}}} done", r"\sqrt{\frac{a}{b^{2}}}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\{x\}", None),  # the escaped brace does not close the box
        (r"{ \boxed{5}", "5"),
        (r"} \boxed{5} }", "5"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> none", None),
        (r"<think>a</think> \boxed{1} <think>\boxed{2}</think> \boxed{3}", "3"),
        (r"\boxed{1}</think> none", None),  # the prompt opened the thought
        (r"<think>\boxed{1}", None),  # cut off while thinking
        (r"</think>\boxed{1}<think>", None),
        (r"\boxed{7} and \boxed{8", "7"),  # cut off: the last complete one
        (r"\boxed {3}", "3"),
        ("\\boxed\n{3}", "3"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{5 \boxed{6}", "6"),
        (r"\fbox{4}", "4"),
        (r"\\boxed{4}", "4"),
        (r"\boxed{}", ""),
        ("the answer is 42", None),
        (r"\boxed 5", None),
        (r"\boxedx{5}", None),
    ],
)
def test_last_boxed(text, content):
    assert answers.last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<answer>a</answer>", "a"),
        ("<answer>a</answer> <answer>\n b \n</answer> c", "b"),
        ("<answer>a</answer> <answer>b", "a"),
        ("<answer>a <answer>b</answer>", "b"),
        ("<think><answer>a</answer></think>", None),
        ("<think><answer>a</answer>", None),
        ("a</answer>", None),
        ("<answer>a", None),
    ],
)
def test_answer_tags(text, content):
    assert answers.answer_tag(text) == content
    block = text.replace("<answer>", "[ANSWER]").replace("</answer>", "[/ANSWER]")
    assert answers.answer_block(block) == content


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```python\nx = 1\n```", [("python", "x = 1")]),
        ("a\n```\nx\n```\nb\n```json\n{}\n```", [("", "x"), ("json", "{}")]),
        ("```python\nx = '```'\n```", [("python", "x = '```'")]),  # ticks within a line
        ('```json {"a": 1}```', [("json", '{"a": 1}')]),
        ('```{"a": 1}```', [("", '{"a": 1}')]),
        ("```python\nx = 1", []),  # cut off
        ("```a\n1\n```\n```b\n2", [("a", "1")]),
        ("<think>```\n1\n```</think>```\n2\n```", [("", "2")]),
        ("```Python\r\nx\n```", [("python", "x")]),
        ("no fence", []),
    ],
)
def test_fences(text, found):
    blocks = answers.fences(text)
    assert [(b.language, b.body.rstrip("\n")) for b in blocks] == found


def test_last_code_prefers_the_language():
    text = "```python\na\n```\n```\nb\n```\n```python\nc\n```\n```text\nd\n```"
    assert answers.last_code(text, ("python", "py")) == "c"
    assert answers.last_code(text) == "d"
    assert answers.last_code("```text\nd\n```", ("python",)) == "d"
    assert answers.last_code("x = 1") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('```json\n{"output": [1, 2]}\n```', {"output": [1, 2]}),
        ('```json\n{"a": 1}\n```\nno, wait\n```json\n{"a": 2}\n```', {"a": 2}),
        ('```json\n"output": 5\n```', {"output": 5}),  # the outer braces left out
        ('```\n{"a": 1}\n```', {"a": 1}),
        (r"\boxed{{\"a\": 1}}".replace('\\"', '"'), {"a": 1}),
        (r'\boxed{"output": 3}', {"output": 3}),
        ('so {"a": {"b": 2}} it is', {"a": {"b": 2}}),
        ('{"a": 1} or rather {"a": 2}', {"a": 2}),
        ('{"a": 1} and {"a": 2', {"a": 1}),
        ('{"a": "}"} x', None),  # braces in a text are not looked into outside of fences
        ('<think>{"a": 1}</think>{"a": 2}', {"a": 2}),
        ('<think>{"a": 1}', None),
        ("{'a': 1}", None),
        ('```json\n{"a": NaN}\n```', None),
        ("nothing", None),
    ],
)
def test_json_answers(text, value):
    assert answers.json_answer(text) == (value is not None, value)


def test_json_and_literals_have_limits():
    assert answers.parse_json("[" * 100_000) == (False, None)
    assert answers.parse_json("9" * 5000) == (False, None)
    assert answers.literal("[" * 19_000) == (False, None)
    assert answers.literal("(" * 150 + ")" * 150)[0] in (True, False)
    assert answers.literal("-" * 15_000 + "1") == (False, None)
    assert answers.literal("1" * 30_000) == (False, None)
    assert answers.literal("__import__('os')") == (False, None)
    assert answers.literal("{1, (2, 'a')}") == (True, {1, (2, "a")})
    assert answers.data('{"a": true}') == (True, {"a": True})
    assert answers.data("{'a': True}") == (True, {"a": True})


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("(B)", "B"),
        ("[C]", "C"),
        ("D.", "D"),
        (r"\text{A}", "A"),
        (r"\textbf{(B)}", "B"),
        (r"\mathrm{\text{C}}", "C"),
        ("A) five", "A"),
        ("(A) five or six", "A"),
        ("B. The moon", "B"),
        ("C: x", "C"),
        ("Option D", "D"),
        ("b", "B"),
        ("$A$", "A"),
        ("**A**", "A"),
        ("A or B", None),
        ("A, B", None),
        ("AB", None),
        ("(A) five (B) six", None),
        ("five", None),
        ("A dog", None),
        ("", None),
        ("Z", None),
        ("1", None),
    ],
)
def test_letter_of(text, letter):
    assert answers.letter_of(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"the answer is B, so \boxed{C}", "C"),
        (r"<think>\boxed{A}</think>\boxed{\text{B}}", "B"),
        (r"<think>Answer: A</think> I do not know", None),
        ("<think>Answer: A", None),
        ("... so the answer is (D).", "D"),
        ("Answer: A\nno. Answer: B", "B"),
        ("**Answer:** C", "C"),
        ("The answer is a long one.", None),
        ("I am sure. A cat.", None),
        (r"\boxed{x = 5} (A)", None),  # what is boxed is the answer, and it is no letter
        ("<answer>B</answer>", "B"),
        ("B", "B"),
        ("", None),
    ],
)
def test_choice_letter(text, letter):
    assert answers.choice_letter(text) == letter


def test_stated_answers():
    plain = Problem("p", "?", "1", "x")
    own = Problem("p", "?", "1", "x", meta={"response_regex": "= (.*)"})
    assert answers.stated(plain, r"<answer>2</answer> \boxed{ 1 }") == "1"
    assert answers.stated(plain, r"<answer>2</answer> \boxed{1}", ("tag",)) == "2"
    assert answers.stated(plain, "2") is None
    assert answers.stated(own, "x = 3") == "3"
    assert answers.stated(own, "<think>x = 3</think> no") is None
    assert answers.stated(own, "<think>x = 3") is None


MEGABYTE = 1_000_000
GARBAGE = {
    "braces": "{" * MEGABYTE,
    "pairs": "\\boxed{" + "{}" * (MEGABYTE // 2),
    "boxes": "\\boxed{" * (MEGABYTE // 7),
    "closing": "\\boxed{1}" + "}" * MEGABYTE,
    "ticks": "```" * (MEGABYTE // 3),
    "ticks by line": "```\n" * (MEGABYTE // 4),
    "ticks and one close": "```a" * (MEGABYTE // 4) + "\n```",
    "backslashes": "\\" * MEGABYTE,
    "box and spaces": "\\boxed" + " " * MEGABYTE,
    "think": "<think>" * (MEGABYTE // 7),
    "think pairs": "<think></think>" * (MEGABYTE // 15),
    "answer": "<answer>" * (MEGABYTE // 8),
    "closing answer": "</answer>" * (MEGABYTE // 9),
    "objects": '{"a":' * (MEGABYTE // 5),
    "whole objects": '{"a":1}' * (MEGABYTE // 7),
    "said": "answer is " * (MEGABYTE // 10),
    "said and spaces": "answer:" + " " * MEGABYTE,
    "option": "option: " * (MEGABYTE // 8),
    "quotes": '"' * MEGABYTE,
    "digits": "9" * MEGABYTE,
    "text": "\\text{" * (MEGABYTE // 6),
    "brackets": "([" * (MEGABYTE // 2),
    "minus": "-" * MEGABYTE,
    "words": "lorem ipsum " * (MEGABYTE // 12),
    "unicode": "٣€\u2212\u200b" * (MEGABYTE // 4),
}
FUNCTIONS = (
    answers.after_think,
    answers.last_boxed,
    answers.answer_tag,
    answers.answer_block,
    answers.fences,
    answers.last_json,
    answers.json_answer,
    answers.data,
    answers.letter_of,
    answers.choice_letter,
)


@pytest.mark.parametrize("name", GARBAGE)
def test_a_megabyte_of_garbage_is_read_in_linear_time(name):
    for function in FUNCTIONS:
        # Processor time: other processes must not fail this.
        start = time.process_time()
        function(GARBAGE[name])
        assert time.process_time() - start < 0.5, function.__name__


def test_an_answer_is_found_at_the_end_of_a_megabyte():
    text = GARBAGE["words"] + r"\boxed{5} <answer>6</answer>" + '```json\n{"a": 7}\n```'
    assert answers.last_boxed(text) == "5"
    assert answers.answer_tag(text) == "6"
    assert answers.json_answer(text) == (True, {"a": 7})
    assert answers.last_boxed(r"\boxed{5}" + GARBAGE["words"]) is None  # beyond the window
    assert json.loads(json.dumps(answers.WINDOW)) >= 100_000
