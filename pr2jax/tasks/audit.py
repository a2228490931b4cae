"""Do verifiers agree with oracle answers? `python -m pr2jax.tasks.audit [NAME...] [--items=200]`.

For each task the reference answers of some problems, and answers known to be wrong, are scored
by the real verifiers in a VerifierPool. Known to be wrong: for our own generators and packaged
sets by construction (see their `wrong`), with the score they must get, partial credit included;
for reasoning-gym another problem's answer, where partial credit is off and only a full score is
a fault. NAME is a task's name ("generated/tables") or its start ("generated"); none means all.
Prints a table and ends with status 1 where a task in use is off; --json=FILE has the figures.
"""

import argparse
import collections
import dataclasses
import json
import random
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from pr2jax.core.config import ConfigError
from pr2jax.tasks import audit_rules, base, generated, gym, packaged
from pr2jax.tasks.base import Problem, TaskConfig, Verdict
from pr2jax.tasks.generated.items import LEVELS
from pr2jax.tasks.pool import VerifierPool

_SHOWN = 3
_MISSES = 2000  # draws in a row without a new question: the space is taken as exhausted
_DRAW_S = 300.0  # seconds after which a slow generator has drawn enough
_SEED = 7


@dataclasses.dataclass(frozen=True)
class Case:
    """A response, and the score that it must get. kind: "oracle" or "wrong"."""

    kind: str
    problem: Problem
    response: str
    expected: float


@dataclasses.dataclass
class Row:
    """One task's figures.

    oracle, wrong: numbers of answers scored; oracle_right, wrong_right: of those that got the score
    they must get. partial: wrong answers that must get more than 0. excluded: why the task is not
    in use, empty where it is. examples: some that did not fit.
    """

    name: str
    domain: str
    oracle: int = 0
    oracle_right: int = 0
    wrong: int = 0
    wrong_right: int = 0
    partial: int = 0
    seconds: float = 0.0
    excluded: str = ""
    error: str = ""
    examples: list[str] = dataclasses.field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether every answer got the score it must get, and there were any of both kinds."""
        every = (self.oracle, self.wrong) == (self.oracle_right, self.wrong_right)
        return every and min(self.oracle, self.wrong) > 0 and not self.error


def task_names() -> list[str]:
    """Every task the audit knows: each level of our generators, packaged sets, reasoning-gym."""
    ours = [f"generated/{name}:{level}" for name in generated.GENERATORS for level in LEVELS]
    sets = [f"packaged/{name}" for name in packaged.SETS]
    return ours + sets + [f"reasoning_gym/{name}" for name in sorted(gym.DOMAIN)]


def cases(name: str, items: int) -> list[Case]:
    """Oracle answers of `items` problems with distinct questions (fewer where there are no more).

    Each has a wrong one beside it, where reasoning-gym has one. Raises ConfigError.
    """
    kind, _, rest = name.partition("/")
    rng = random.Random(_SEED)
    if kind == "reasoning_gym":
        return _swapped(_distinct(gym.problems(_config(name, partial_credit=0.0)), items), rng)
    if kind == "packaged":
        problems = _distinct(packaged.SETS[rest](_config(name)), None)
        problems = rng.sample(problems, min(items, len(problems)))
        wrong = packaged.wrong
    else:
        # Half of them with the form that Guru asks for, half bare.
        generator, _, level = rest.partition(":")
        problems = []
        for form, share in (("full", items - items // 2), ("bare", items // 2)):
            settings = json.dumps({"level": level, "form": form})
            stream = generated.problems(_config(f"generated/{generator}", settings=settings))
            problems += _distinct(stream, share)
        wrong = generated.wrong
    found = []
    for problem in problems:
        found.append(Case("oracle", problem, problem.solution, 1.0))
        found.append(Case("wrong", problem, *wrong(problem, rng)))
    return found


def _config(name: str, **fields) -> TaskConfig:
    return TaskConfig(name=name, seed=_SEED, allow_unsound=name.startswith("reason"), **fields)


def _distinct(stream: Iterator[Problem], count: int | None) -> list[Problem]:
    """The first `count` problems (None: all) whose questions differ, fewer after _DRAW_S."""
    seen, found, misses = base.SeenQuestions(), [], 0
    end = time.monotonic() + _DRAW_S
    for problem in stream:
        misses = 0 if (new := seen.add(problem)) else misses + 1
        if new:
            found.append(problem)
        if len(found) == count or misses > _MISSES or time.monotonic() > end:
            break
    if isinstance(stream, Generator):
        stream.close()  # reasoning-gym's gives Python's global random state back
    return found


def _swapped(problems: Sequence[Problem], rng: random.Random) -> list[Case]:
    """Stored answers, and each problem with the answer of another whose answer reads otherwise.

    Where that happens to be right too, by the puzzle's own rules, a third one's is taken.
    """
    found = []
    for problem in problems:
        found.append(Case("oracle", problem, problem.solution, 1.0))
        own = base.normalise(problem.answer)
        for other in rng.sample(problems, min(len(problems), 20)):
            if base.normalise(other.answer) == own:
                continue
            if not audit_rules.also_right(problem, other.answer):
                found.append(Case("wrong", problem, other.solution, 0.0))
                break
    return found


def audit(name: str, items: int, pool: VerifierPool) -> Row:
    """Scores a task's cases."""
    started = time.monotonic()
    kind, _, rest = name.partition("/")
    row = Row(name, "other")
    row.excluded = gym.UNSOUND.get(rest, "") if kind == "reasoning_gym" else ""
    try:
        found = cases(name, items)
    except Exception as error:  # a generator's own failure is a finding
        row.error = f"{type(error).__name__}: {error}"[:300]
        return row
    row.domain = base.domain_of(found[0].problem)
    verdicts = pool.score_batch([(case.problem, case.response) for case in found])
    wanted = collections.Counter(case.kind for case in found)
    row.oracle, row.wrong = wanted["oracle"], wanted["wrong"]
    row.partial = sum(case.kind == "wrong" and case.expected > 0 for case in found)
    right: collections.Counter[str] = collections.Counter()
    for case, verdict in zip(found, verdicts, strict=True):
        if _fits(case, verdict):
            right[case.kind] += 1
        elif len(row.examples) < _SHOWN:
            row.examples.append(
                f"{case.kind} {case.problem.id}: {case.response[:80]!r} got {verdict.score:g}, "
                f"not {case.expected:g} ({verdict.reason[:120]}); reference "
                f"{case.problem.answer[:80]!r}"
            )
    row.oracle_right, row.wrong_right = right["oracle"], right["wrong"]
    row.seconds = time.monotonic() - started
    return row


def _fits(case: Case, verdict: Verdict) -> bool:
    """A judge is never needed here, and an error of the verifier is no verdict."""
    if verdict.reason.startswith(("verifier", "time limit", "memory limit")):
        return case.kind == "wrong" and case.problem.data_source.startswith("reasoning_gym/")
    return abs(verdict.score - case.expected) < 1e-9


def table(rows: Sequence[Row]) -> str:
    """A markdown table."""
    lines = ["| task | domain | oracle 1.0 | wrong as expected | of these partial | |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        note = "" if row.good else "OFF"
        if row.excluded:
            note = f"excluded: {row.excluded}"
        elif row.error:
            note = f"OFF: {row.error}"
        lines.append(
            f"| {row.name} | {row.domain} | {row.oracle_right}/{row.oracle} | "
            f"{row.wrong_right}/{row.wrong} | {row.partial} | {note} |"
        )
    return "\n".join(lines)


def select(wanted: Sequence[str]) -> list[str]:
    """Names that are `wanted` or begin with it. Raises ConfigError for one that fits none."""
    known = task_names()
    chosen = []
    for start in wanted:
        fit = [n for n in known if n == start or n.startswith((f"{start}/", f"{start}:"))]
        if not fit:
            raise ConfigError(f"NAME: {start!r} is no task's name or the start of one")
        chosen += fit
    return list(dict.fromkeys(chosen)) if wanted else known


def main(argv: Sequence[str] | None = None) -> int:
    """0 where all fits, 1 where a task in use is off, 2 for a wrong command line."""
    from pr2jax.core.metrics import Progress, write_json

    parser = argparse.ArgumentParser(prog="pr2jax.tasks.audit", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--items", type=int, default=200, help="problems a task (default 200)")
    parser.add_argument("--workers", type=int, default=2, help="verifier processes (default 2)")
    parser.add_argument("--timeout_s", type=float, default=30.0, help="of one verdict")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(argv)
    try:
        names = select(options.names)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    rows: list[Row] = []
    progress = Progress("audit", len(names), stream=sys.stderr)
    with VerifierPool(options.workers, options.timeout_s) as pool:
        for done, name in enumerate(names, start=1):
            rows.append(audit(name, options.items, pool))
            off = sum(not row.good and not row.excluded for row in rows)
            progress.update(done, {"task": name, "off": off})
    progress.close()
    print(table(rows))
    bad = [row for row in rows if not row.good and not row.excluded]
    for row in rows:
        for example in row.examples:
            print(f"{row.name}: {example}")
    used = [row for row in rows if not row.excluded]
    totals = {
        "tasks": len(used),
        "excluded": len(rows) - len(used),
        "oracle": sum(row.oracle for row in used),
        "oracle_right": sum(row.oracle_right for row in used),
        "wrong": sum(row.wrong for row in used),
        "wrong_right": sum(row.wrong_right for row in used),
        "off": len(bad),
    }
    print(json.dumps(totals))
    if options.json:
        figures = {"items": options.items, "totals": totals}
        write_json(options.json, figures | {"rows": [dataclasses.asdict(row) for row in rows]})
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
