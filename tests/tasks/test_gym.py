"""reasoning-gym tasks: split by question text, own verifier, unsound generators refused."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from pr2jax.core.config import ConfigError
from pr2jax.tasks import gym
from pr2jax.tasks.base import DOMAINS, Problem, TaskConfig, Verdict, checked, domain_of
from pr2jax.tasks.registry import build_task, score, verifier_for

ONE_DIGIT = json.dumps({"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
TWO_DIGITS = json.dumps({"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2})
AFTER_COLON = r"problem: (.*)"


def expressions(problems):
    return [p.meta["entry"]["metadata"]["expression"].replace(" ", "") for p in problems]


def test_split_is_by_question_and_deterministic():
    # 200 questions exist; 180 are asked for, so draws repeat many times.
    cfg = TaskConfig(settings=ONE_DIGIT, size=140, held_out=40, question_regex=AFTER_COLON)
    task, again = build_task(cfg), build_task(cfg)
    train, held_out = expressions(task.train), expressions(task.held_out)
    assert (len(set(train)), len(set(held_out))) == (140, 40)
    assert not set(train) & set(held_out)
    assert task.stats["repeats"] > 40
    assert task.train == again.train
    assert task.held_out == again.held_out


def test_held_out_does_not_depend_on_train_size():
    small = build_task(TaskConfig(settings=TWO_DIGITS, size=10, held_out=20))
    large = build_task(TaskConfig(settings=TWO_DIGITS, size=200, held_out=20))
    assert small.held_out == large.held_out
    assert large.train[:10] == small.train
    other = build_task(TaskConfig(settings=TWO_DIGITS, size=10, held_out=20, seed=1))
    assert other.held_out != small.held_out


def test_another_tasks_questions_can_be_excluded():
    # The excluded task shows the question whole, this one only its expression: same question.
    evaluation = build_task(TaskConfig(settings=ONE_DIGIT, size=0, held_out=100, seed=5))
    cfg = TaskConfig(settings=ONE_DIGIT, size=80, held_out=10, question_regex=AFTER_COLON)
    task = build_task(cfg, exclude=evaluation.held_out)
    mine = set(expressions(task.train + task.held_out))
    assert len(mine) == 90
    assert not mine & set(expressions(evaluation.held_out))


def test_too_small_a_space_is_an_error():
    # Two terms of 1..9 under + and -: 162 questions.  (0 does not lead a number.)
    with pytest.raises(ConfigError, match=r"size: chain_sum .* distinct questions .*; 300 and 20"):
        build_task(TaskConfig(settings=ONE_DIGIT, size=300, held_out=20))


def test_prompt_target_and_score():
    cfg = TaskConfig(
        settings=TWO_DIGITS,
        size=20,
        held_out=0,
        question_regex=AFTER_COLON,
        prompt_template="Q: {question}\nA:",
        answer_template=" {answer}.",
        response_regex=r"(-?\d+)\.",
    )
    task = build_task(cfg)
    for problem, text in zip(task.train, expressions(task.train), strict=True):
        value = eval(text)  # independent of the stored answer; the text is reasoning-gym's
        assert problem.prompt.replace(" ", "") == f"Q:{text}=\nA:"
        assert problem.answer == str(value)
        assert problem.solution == f" {value}."
        assert task.score(problem, problem.solution).score == 1.0
        assert task.score(problem, f"5. or {value}.").score == 1.0  # the last match counts
        wrong = task.score(problem, f"{value + 1}.")
        assert wrong.score < 1.0
        assert wrong.reason.endswith(f"read '{value + 1}'")
        assert task.score(problem, str(value)) == Verdict(0.0, "no answer in the expected form")


def test_partial_credit_can_be_scaled_or_refused():
    name = "reasoning_gym/letter_counting"
    cfg = TaskConfig(name=name, size=3, held_out=0)
    half = TaskConfig(name=name, size=3, held_out=0, partial_credit=0.5)
    strict = TaskConfig(name=name, size=3, held_out=0, partial_credit=0.0)
    tasks = (build_task(c).train for c in (cfg, half, strict))
    for some, less, none in zip(*tasks, strict=True):
        wordy = f"it is {some.answer}"
        assert 0.0 < score(some, wordy).score < 1.0
        assert score(less, wordy).score == 0.5 * score(some, wordy).score
        assert score(less, less.answer).score == 1.0
        assert score(none, wordy).score == 0.0
        assert score(none, none.answer).score == 1.0


def test_lowercase_is_what_the_model_reads_and_learns():
    cfg = TaskConfig(name="reasoning_gym/spell_backward", size=200, held_out=0)
    plain = build_task(cfg).train
    lower = build_task(dataclasses.replace(cfg, lowercase=True)).train
    assert any(p.solution != p.solution.lower() for p in plain)
    for problem, small in zip(plain, lower, strict=True):
        assert small.prompt == problem.prompt.lower()
        assert small.solution == problem.solution.lower()
        assert score(small, small.solution).score == 1.0


@pytest.mark.parametrize("name", ["boxnet", "game_of_life_halting", "list_functions"])
def test_unsound_generators_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"name: {name} is not to be trusted"):
        build_task(TaskConfig(name=f"reasoning_gym/{name}"))


def test_every_process_builds_the_same_task():
    # Some generators iterate over sets of strings, whose order is the process's own.
    code = (
        "from pr2jax.tasks.registry import *\n"
        "for name in ('chain_sum', 'spell_backward'):\n"
        "    t = build_task(TaskConfig(name=f'reasoning_gym/{name}', size=20, held_out=5))\n"
        "    print([p.prompt for p in t.held_out + t.train])"
    )
    outputs = set()
    for seed in ("0", "1"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, env=env, check=True
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_generators_that_follow_the_hash_seed_ask_for_one(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ConfigError, match="name: word_ladder .* PYTHONHASHSEED=0"):
        build_task(TaskConfig(name="reasoning_gym/word_ladder"))


def test_guard_flag_admits_them():
    cfg = TaskConfig(
        name="reasoning_gym/prime_factorization", size=3, held_out=0, allow_unsound=True
    )
    task = build_task(cfg)
    assert task.score(task.train[0], task.train[0].answer).score == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "reasoning_gym/chain_sums"}, "name: .*did you mean 'chain_sum'"),
        ({"name": "gsm8k"}, "name: 'gsm8k' is not"),
        ({"settings": "{"}, "settings: not JSON"),
        ({"settings": "[1]"}, "settings: not a JSON object"),
        ({"settings": '{"terms": 2}'}, "settings: chain_sum refuses"),
        ({"settings": '{"min_terms": 5, "max_terms": 2}'}, "settings: chain_sum refuses"),
        ({"settings": '{"seed": 2}'}, "settings: 'seed' is a key of the task"),
        ({"size": -1}, "size: -1"),
        ({"size": 0, "held_out": 0}, "held_out: 0"),
        ({"prompt_template": "?"}, "prompt_template: "),
        ({"answer_template": "?"}, "answer_template: "),
        ({"question_regex": "("}, "question_regex: not a regular"),
        ({"question_regex": "abc"}, "question_regex: 'abc' has no group"),
        ({"question_regex": "(xyz)"}, "question_regex: .* finds nothing in"),
        ({"name": "jsonl:x", "settings": '{"a": 1}'}, "settings: jsonl has none"),
        ({"max_bad_share": 2.0}, "max_bad_share: 2.0"),
    ],
)
def test_bad_settings_name_their_key(fields, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        build_task(TaskConfig(**fields))


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.5, float("inf"), "1", None, True])
def test_a_score_that_is_none_is_zero(value):
    verdict = checked(Verdict(value))
    assert verdict.score == 0.0
    assert verdict.reason.startswith("verifier gave")


def test_unknown_domain_is_named():
    with pytest.raises(ValueError, match="'chess__taco'"):
        verifier_for("chess__taco")
    with pytest.raises(ValueError, match="'chess'"):
        score(Problem("1", "?", "!", "chess"), "!")


def test_building_and_scoring_import_no_jax():
    code = (
        "import sys, pr2jax.tasks.pool, pr2jax.tasks.worker; from pr2jax.tasks import registry;"
        "t = registry.build_task(registry.TaskConfig(size=2, held_out=0));"
        "t.score(t.train[0], '1'); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", gym.EVALUATED)
def test_answers_that_are_code_reach_no_eval(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # this test does not need the same problems
    file = tmp_path / "made"
    cfg = TaskConfig(name=f"reasoning_gym/{name}", size=1, held_out=0, allow_unsound=True)
    task = build_task(cfg)
    make = f"open({str(file)!r}, 'w')"
    letters = "+".join(f"chr({ord(c)})" for c in make)
    attacks = (
        f"[{make}]",
        f"__import__('pathlib').Path({str(file)!r}).touch()",
        f"eval({letters})",
        f"exec({letters})",
        "x.__class__",
        "9" * 5000,
    )
    for attack in attacks:
        verdict = task.score(task.train[0], attack)
        assert verdict.score == 0.0
        assert verdict.reason.startswith("not in the form of an answer")
    assert not file.exists()


def test_an_integral_is_no_antiderivative():
    # reasoning-gym itself gives 1.0 for this.
    for name in ("simple_integration", "intermediate_integration"):
        # Of seed 1, the second one's first answer is a closed form, as all of the first one's are.
        cfg = TaskConfig(
            name=f"reasoning_gym/{name}", size=1, held_out=0, seed=1, allow_unsound=True
        )
        problem = build_task(cfg).train[0]
        metadata = problem.meta["entry"]["metadata"]
        cheat = f"Integral({metadata['integrand']}, {metadata['variable']})"
        assert score(problem, cheat).score == 0.0
        assert score(problem, problem.answer).score == 1.0


def test_every_generator_has_a_domain_or_a_reason():
    from reasoning_gym.factory import DATASETS

    assert len(DATASETS) == 106
    assert set(gym.DOMAIN) | {"composite"} == set(DATASETS)
    assert set(gym.UNSOUND) | set(gym.EVALUATED) | set(gym.HASH_SEEDED) <= set(DATASETS)
    assert set(gym.DOMAIN.values()) <= set(DOMAINS)
    for name in ("chain_sum", "spell_backward", "knights_knaves"):
        problem = build_task(TaskConfig(name=f"reasoning_gym/{name}", size=1, held_out=0)).train[0]
        assert domain_of(problem) == gym.DOMAIN[name]


def test_another_puzzles_numbers_do_not_count():
    with pytest.raises(ConfigError, match="name: puzzle24 .* numbers other than the puzzle's"):
        build_task(TaskConfig(name="reasoning_gym/puzzle24"))
