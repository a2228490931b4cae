"""Our generators against other ways to the answer: brute force, other algorithms, the texts run."""

import collections
import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
from fractions import Fraction

import pytest

from pr2jax.core.config import ConfigError
from pr2jax.tasks import base, generated
from pr2jax.tasks.base import TaskConfig
from pr2jax.tasks.generated import logic, solutions, steps
from pr2jax.tasks.generated.items import LEVELS
from pr2jax.tasks.registry import build_task


def problems(name, size=40, level="easy", form="bare", **settings):
    text = json.dumps({"level": level, "form": form} | settings)
    cfg = TaskConfig(name=f"generated/{name}", settings=text, size=size, held_out=0)
    return build_task(cfg).train


# --- All of them -------------------------------------------------------------------------------


def test_every_domain_has_a_generator():
    domains = {g.domain for g in generated.GENERATORS.values()}
    assert domains == set(base.DOMAINS)
    for name, generator in generated.GENERATORS.items():
        assert base.domain_of(problems(name, 1)[0]) == generator.domain


@pytest.mark.parametrize("name", generated.GENERATORS)
def test_levels_forms_and_wrong_answers(name):
    for level, form in itertools.product(LEVELS, ("full", "unasked", "bare")):
        for problem in problems(name, 8, level, form):
            wrapped = problem.meta["wrap"].partition("{}")
            bare = problem.solution.removeprefix(wrapped[0]).removesuffix(wrapped[2])
            assert (bare == problem.solution) == (form == "bare")
            assert problem.prompt.endswith("\n")
            response, expected = generated.wrong(problem, random.Random(0))
            assert response != problem.solution
            assert 0.0 <= expected < 1.0
            if level == "tiny" and form != "full" and name != "zebra":
                assert len(problem.prompt) <= 81
                assert len(bare) <= 18


def test_tiny_prompts_use_a_small_alphabet():
    for name in ("numbers", "programs", "science", "ordering", "graph", "cruxeval", "tables"):
        texts = [p.prompt + p.solution for p in problems(name, 200, "tiny")]
        assert len(set("".join(texts))) <= 45, name


def test_every_process_makes_the_same_items():
    code = (
        "import json; from pr2jax.tasks import generated as g\n"
        "for name in g.GENERATORS:\n"
        "    for level in ('tiny', 'hard'):\n"
        "        for i in range(3):\n"
        "            print(g.item(name, 5, i, g.parse_settings(name, {'level': level})))"
    )
    outputs = set()
    for seed in ("0", "1"):
        env = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
        assert not done.returncode, done.stderr
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_item_is_a_function_of_seed_index_and_settings():
    settings = generated.parse_settings("tables", {"level": "medium"})
    made = [generated.item("tables", seed, i, settings) for seed in (0, 1) for i in range(20)]
    again = [generated.item("tables", seed, i, settings) for seed in (0, 1) for i in range(20)]
    assert made == again
    assert len({item.question for item in made}) == 40


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("table", {}, "name: no generator generated/table; did you mean 'tables'"),
        ("tables", {"level": "huge"}, "settings.level: must be one of"),
        ("tables", {"rows": 3}, "settings.rows: unknown key"),
        ("tables", {"families": ["sums"]}, "settings.families: 'sums' is not one of lookup, sum"),
        ("zebra", {"families": ["x"]}, "settings.families: 'x' is not one of all"),
        ("science", {"choices": 2.0}, "settings.choices: 2.0 is not in"),
        ("programs", {"io": "file"}, "settings.io: must be one of"),
    ],
)
def test_bad_settings_name_their_key(name, settings, message):
    cfg = TaskConfig(name=f"generated/{name}", settings=json.dumps(settings), size=3, held_out=0)
    with pytest.raises(ConfigError, match=f"^{message}"):
        build_task(cfg)


def test_keys_of_other_kinds_are_refused():
    for fields, message in (
        ({"lowercase": True}, "lowercase: generated"),
        ({"size": -1}, "size: -1"),
        ({"allow_unsound": True}, "allow_unsound: only for reasoning_gym"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            build_task(TaskConfig(name="generated/tables", **fields))


# --- Math --------------------------------------------------------------------------------------


def _solve(question):
    """Value of a question of `numbers` by other means."""
    if match := re.fullmatch(r"Solve (-?\d+)x(?: ([+-]) (\d+))? = (-?\d+) for x\.", question):
        a, sign, b, c = match.groups()
        b = int(b or 0) * (-1 if sign == "-" else 1)
        return next(
            Fraction(n, int(a)) for n in itertools.count(-999) if n + b == int(c)
        )  # n = a x
    if match := re.fullmatch(r"What is the remainder of (\d+)\^(\d+) divided .* (\d+)\?", question):
        a, n, m = map(int, match.groups())
        return Fraction(a**n % m)
    if match := re.fullmatch(r"What is the greatest .* of (\d+) and (\d+)\?", question):
        a, b = map(int, match.groups())
        return Fraction(max(d for d in range(1, a + 1) if a % d == b % d == 0))
    text = re.sub(r"Compute | as a fraction in lowest terms|[.=]$|\.$", "", question)
    return eval(re.sub(r"(\d+)", r"Fraction(\1)", text))  # our own text


@pytest.mark.parametrize("level", LEVELS)
def test_numbers(level):
    for problem in problems("numbers", 80, level):
        value = _solve(problem.meta["question"])
        text = problem.answer
        if match := re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", text):
            sign, top, bottom = match.groups()
            text = f"{sign}{top}/{bottom}"
        assert Fraction(text) == value, problem.meta["question"]
        wrong, expected = generated.wrong(problem, random.Random(problem.id))
        wrong = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", wrong)
        assert Fraction(wrong) != value
        assert expected == 0.0


# --- Tables ------------------------------------------------------------------------------------


def _read(question):
    """({(row, column): value}, the question below the table), of labels as the question says."""
    lines, rest = [], []
    for line in question.splitlines():
        (lines if line.startswith("|") else rest).append(line)
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    if len(cells[0]) > 1 and cells[0][:2] == ["", ""]:
        tops = list(itertools.accumulate(cells[0][2:], lambda old, new: new or old))
        columns = [f"{top}, {name}" for top, name in zip(tops, cells[2][2:], strict=True)]
        groups = list(itertools.accumulate([c[0] for c in cells[3:]], lambda o, n: n or o))
        rows = [f"{g}, {c[1]}" for g, c in zip(groups, cells[3:], strict=True)]
        values = [c[2:] for c in cells[3:]]
    else:
        columns, rows = cells[0][1:], [c[0] for c in cells[2:]]
        values = [c[1:] for c in cells[2:]]
    return {
        (row, column): int(value)
        for row, line in zip(rows, values, strict=True)
        for column, value in zip(columns, line, strict=True)
    }, " ".join(rest).strip()


def _tabular_answer(question):
    table, asked = _read(question)
    rows = list(dict.fromkeys(row for row, _ in table))

    def column(name):
        return {row: table[row, name] for row in rows}

    patterns = {
        r"What is the sum of (.+) over all rows\?": lambda c: sum(column(c).values()),
        r"What is the mean of (.+) over all rows\?": lambda c: statistics.mean(
            map(Fraction, column(c).values())
        ),
        r"What is the sum of (.+) over (.+)\?": lambda c, g: sum(
            v for r, v in column(c).items() if r.split(", ")[0] == g
        ),
        r"What is (.+) of (.+) divided by that of (.+)\? .*": lambda c, a, b: Fraction(
            table[a, c], table[b, c]
        ),
        r"What is (.+) of (.+)\?": lambda c, r: table[r, c],
        r"By how much is (.+) of (.+) above that of (.+)\? .*": lambda c, a, b: (
            table[a, c] - table[b, c]
        ),
        r"By how many percent of (.+) does (.+) of (.+) differ from it\? .*": lambda a, b, r: (
            (Fraction(table[r, b], table[r, a]) - 1) * 100
        ),
        r"Which row has the highest (.+)\?": lambda c: max(rows, key=column(c).get),
        r"Which row has the lowest (.+)\?": lambda c: min(rows, key=column(c).get),
        r"Which rows have (.+) above (\d+)\? .*": lambda c, bound: {
            r.split(", ")[-1] for r, v in column(c).items() if v > int(bound)
        },
    }
    for pattern, answer in patterns.items():
        if match := re.fullmatch(pattern, asked):
            return answer(*match.groups())
    raise AssertionError(asked)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_tables(level):
    met = collections.Counter()
    for problem in problems("tables", 120, level):
        met[problem.meta["family"]] += 1
        value = _tabular_answer(problem.meta["question"])
        if isinstance(value, set):
            assert set(problem.answer.split("|")) == value
            assert 0 < len(value) < len(problem.meta["labels"])
        elif isinstance(value, str):
            assert problem.answer == value.split(", ")[-1]
        else:
            assert math.isclose(float(problem.answer), value, rel_tol=1e-4, abs_tol=1e-6)
            wrong, _ = generated.wrong(problem, random.Random(problem.id))
            assert abs(float(wrong) - float(value)) > 0.02 * abs(value)
    assert len(met) == {"easy": 4, "medium": 8, "hard": 9}[level]


def test_tiny_tables():
    for problem in problems("tables", 100, "tiny"):
        names, values, asked = problem.meta["question"].splitlines()
        names, values = names.strip("|").split("|"), list(map(int, values.strip("|").split("|")))
        by_name = dict(zip(names, values, strict=True))
        want = {
            "sum?": str(sum(values)),
            "max?": max(names, key=by_name.get),
            "min?": min(names, key=by_name.get),
        } | {f"{n}?": str(v) for n, v in by_name.items()}
        assert problem.answer == want[asked]


# --- Science -----------------------------------------------------------------------------------

# Other ways to the same value, of the numbers in the question in their order.
_PHYSICS = {
    "distance": lambda v, t: v / (1 / t),
    "speed": lambda u, a, t: (u / t + a) * t,
    "force": lambda m, a: m / (1 / a),
    "kinetic": lambda m, v: (m * v) ** 2 / (2 * m),  # p^2 / 2m
    "ohm": lambda r, u: u / r,
    "power": lambda r, i: (r * i) ** 2 / r,  # U^2 / R
    "molarity": lambda n, v: n / v,
    "density": lambda m, v: m / v,
    "wave": lambda f, v: v * (1 / f),
    "lens": lambda d, f: 1 / (1 / f - 1 / d),
    "half_life": lambda m, h, t: m * math.exp(-math.log(2) * t / h),
    "dilution": lambda v, c, w: c * (v / w),
    "fall": lambda t, *_: 0.5 * 9.81 * t**2,
    "moles": lambda m, *_: m / 18.02,
    "heat": lambda m, d, *_: 4186 * d * m,
    "gas": lambda n, v, t, *_: 8.314 * n * t / v,
    "potential": lambda m, h, *_: 9.81 * m * h,
    # hc = 1239.84 eV nm, e = 1.60218e-19 C: CODATA.
    "photon": lambda w, *_: 1239.84 / w * 1.60218,
    "acid": lambda c: 3 - math.log10(c),
}


def test_science():
    met = collections.Counter()
    for problem in problems("science", 400, "hard"):
        question = problem.meta["question"].replace("m^3", "").replace("s^2", "")
        family = problem.meta["family"]
        met[family] += 1
        stem = question.partition("\n")[0]
        numbers = [float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\de])", stem)]
        names = {"lens": 2, "photon": 1, "fall": 1, "acid": 1}
        value = _PHYSICS[family](*numbers[: names.get(family, len(numbers))])
        if problem.meta["kind"] == "choice":
            choices = [float(c.split()[0]) for c in problem.meta["choices"]]
            near = [i for i, c in enumerate(choices) if abs(c - value) < 0.01 * abs(value)]
            assert near == ["ABCD".index(problem.answer)]
        else:
            assert math.isclose(float(problem.answer), value, rel_tol=1e-3), stem
            assert problem.solution == f"{problem.answer} {problem.meta['unit']}".strip()
    assert set(met) == set(_PHYSICS)


# --- Programs ----------------------------------------------------------------------------------


def _run(program, text):
    """Standard output of a program of ours."""
    out = io.StringIO()
    lines = iter(text.splitlines())
    with contextlib.redirect_stdout(out):
        exec(program, {"input": lambda: next(lines)})
    return out.getvalue()


@pytest.mark.parametrize("level", LEVELS)
def test_programs_pass_their_tests_and_wrong_ones_do_not(level):
    for problem in problems("programs", 60, level):
        tests = json.loads(problem.answer)
        prefix = problem.meta.get("prefix", "")
        right, wrong = prefix + problem.solution, prefix + generated.wrong(problem, None)[0]
        if "functional" in tests:
            space = {}
            exec(right, space)
            exec(tests["functional"], space)
            exec(wrong, space)
            with pytest.raises(AssertionError):
                exec(tests["functional"], space)
        else:
            pairs = list(zip(tests["inputs"], tests["outputs"], strict=True))
            assert all(_run(right, given) == wanted for given, wanted in pairs)
            assert any(_run(wrong, given) != wanted for given, wanted in pairs)


def _floyd(nodes, edges):
    far = {(a, b): 0 if a == b else 10**6 for a in range(nodes) for b in range(nodes)}
    for a, b in edges:
        far[a - 1, b - 1] = far[b - 1, a - 1] = 1
    for k, a, b in itertools.product(range(nodes), repeat=3):
        far[a, b] = min(far[a, b], far[a, k] + far[k, b])
    return far


def _sieve(low, high):
    numbers = set(range(2, high + 1))
    for n in range(2, high + 1):
        numbers -= set(range(2 * n, high + 1, n))
    return len([n for n in numbers if n >= low])


def _coins(coins, amount):
    reached, count = {0}, 0
    while reached:
        if amount in reached:
            return count
        reached = {r + c for r in reached for c in coins if r + c <= amount}
        count += 1
    return -1


_OTHERWISE = {
    "sum_above": lambda xs, b: sum(xs) - sum(x for x in xs if not x > b),
    "second_largest": lambda xs: max(x for x in xs if x != max(xs)),
    "sort_by_last_digit": lambda xs: [x for d in range(10) for x in sorted(xs) if x % 10 == d],
    "common_divisor": lambda xs: max(
        d for d in range(1, min(xs) + 1) if not any(x % d for x in xs)
    ),
    "count_primes": _sieve,
    "count_vowels": lambda s: len(re.findall("[aeiou]", s)),
    "is_palindrome": lambda s: all(s[i] == s[-1 - i] for i in range(len(s))),
    "run_lengths": lambda s: re.sub(r"(.)\1*", lambda m: m[1] + str(len(m[0])), s),
    "row_sums": lambda m: [math.fsum(row) for row in m],
    "trace_of_square": lambda m: sum(
        sum(a * b for a, b in zip(row, column, strict=True))
        for row, column in zip(m, zip(*m, strict=True), strict=True)
    ),
    "covered_length": lambda iv: len({x for a, b in iv for x in range(a, b)}),
    "distance": lambda n, e: d if (d := _floyd(n, e)[0, n - 1]) < 10**6 else -1,
    "components": lambda n, e: len(
        {
            frozenset(b for b in range(n) if far[a, b] < 10**6)
            for far in [_floyd(n, e)]
            for a in range(n)
        }
    ),
    "fewest_coins": _coins,
    "longest_rise": lambda xs: max(
        len(c)
        for k in range(1, len(xs) + 1)
        for c in itertools.combinations(xs, k)
        if list(c) == sorted(set(c))
    ),
    "best_stretch": lambda xs: max(
        sum(xs[i:j]) for i in range(len(xs)) for j in range(i + 1, len(xs) + 1)
    ),
}


def test_reference_solutions_agree_with_others():
    from pr2jax.tasks.generated.programs import _FAMILIES

    assert set(_OTHERWISE) == set(_FAMILIES)
    rng = random.Random(0)
    for family, other in _OTHERWISE.items():
        for _ in range(40):
            case = _FAMILIES[family].draw(rng, 10)
            assert getattr(solutions, family)(*case) == other(*case), (family, case)


# --- Simulation --------------------------------------------------------------------------------


def test_invertible_steps_are():
    for name, step in steps.INVERTIBLE.items():
        for size in (1, 2, 3, 4):
            inputs = list(itertools.product(range(-3, 4), repeat=size))
            outputs = {tuple(step(list(xs))) for xs in inputs}
            assert len(outputs) == len(inputs), name
            assert {len(ys) for ys in outputs} == {size}


@pytest.mark.parametrize("name", ["codeio", "cruxeval"])
@pytest.mark.parametrize("level", LEVELS)
def test_programs_do_what_the_answer_says(name, level):
    for problem in problems(name, 60, level):
        code = problem.meta.get("code")
        if code is None:
            question = problem.meta["question"].removeprefix("Given this program:\n\n")
            code = question.split("\n\nWhat does")[0].split("\n\nFor which")[0].split("\nf(")[0]
        space = {}
        exec(code, space)
        shown, asked = problem.meta, problem.meta["family"]
        given, result = shown["input"], shown["output"]
        if name == "cruxeval":
            given, result = json.loads(given), json.loads(result)
        assert space["f"](given) == result
        wrong, _ = generated.wrong(problem, random.Random(problem.id))
        if name == "cruxeval":
            assert json.loads(problem.answer) == (result if asked == "output" else given)
            other = json.loads(wrong)
        else:
            held = json.loads("{" + problem.answer + "}")
            key = "n" if level == "tiny" else "xs"
            assert held == ({"output": result} if asked == "output" else {"input": {key: given}})
            other = json.loads(wrong)[asked]
            other = other[key] if asked == "input" else other
        if asked == "output":
            assert other != result
        else:
            assert space["f"](other) != result


# --- Logic -------------------------------------------------------------------------------------

_RELATIONS = {
    "is also": lambda a, b: a == b,
    "is next to": lambda a, b: abs(a - b) == 1,
    "is directly left of": lambda a, b: b == a + 1,
    "is somewhere left of": lambda a, b: a < b,
}


@pytest.mark.parametrize("level", LEVELS)
def test_zebra_has_one_solution_by_its_words(level):
    for problem in problems("zebra", 3 if level == "hard" else 12, level):
        first, *clues = problem.meta["question"].splitlines()
        houses = int(first.split()[2])
        attributes = {
            name: values.split(", ")
            for name, values in re.findall(r"(\w+): ([\w, ]+)", first.split("the same. ")[1])
        }
        parsed = []
        for clue in clues:
            if match := re.fullmatch(r"\d+\. The house of \w+ (\w+) is number (\d)\.", clue):
                value, number = match.groups()
                parsed.append(lambda at, v=value, n=int(number): at[v] == n)
            else:
                match = re.fullmatch(
                    r"\d+\. The house of \w+ (\w+) (is .+) the house of \w+ (\w+)\.", clue
                )
                a, words, b = match.groups()
                holds = _RELATIONS[words]
                parsed.append(lambda at, a=a, b=b, holds=holds: holds(at[a], at[b]))
        found = []
        for orders in itertools.product(*map(itertools.permutations, attributes.values())):
            at = {v: n for order in orders for n, v in enumerate(order, start=1)}
            if all(holds(at) for holds in parsed):
                found.append(orders)
        assert len(found) == 1
        truth = json.loads(problem.answer)
        assert truth["header"] == ["House", *attributes]
        columns = [[str(n) for n in range(1, houses + 1)], *map(list, found[0])]
        assert truth["rows"] == [list(row) for row in zip(*columns, strict=True)]
        wrong, expected = generated.wrong(problem, random.Random(problem.id))
        given = json.loads(wrong)["rows"]
        right = sum(
            a == b
            for i, row in enumerate(given)
            for a, b in zip(row, truth["rows"][i], strict=True)
        )
        size = houses * (1 + len(attributes))
        assert expected == pytest.approx(right / size, abs=1e-12)
        assert right == (size - 2 if len(given) == houses else size - 1 - len(attributes))


@pytest.mark.parametrize("level", ["tiny", "easy", "medium"])
def test_orderings_have_one_solution(level):
    for problem in problems("ordering", 20, level):
        text = problem.meta["question"]
        pairs = re.findall(r"(\w+)(?:<| arrives before )(\w+)", text)
        pairs += [(b, a) for a, b in re.findall(r"(\w+)(?:>| arrives after )(\w+)", text)]
        names = sorted({name for pair in pairs for name in pair})
        fits = [
            list(order)
            for order in itertools.permutations(names)
            if all(order.index(a) < order.index(b) for a, b in pairs)
        ]
        assert fits == [json.loads(problem.answer)]
        wrong, _ = generated.wrong(problem, random.Random(problem.id))
        assert json.loads(wrong) != fits[0]


@pytest.mark.parametrize("level", LEVELS)
def test_graphs(level):
    for problem in problems("graph", 30, level):
        text = problem.meta["question"]
        arrows = dict(re.findall(r"(\w) ?-?> ?(\w)", text))
        if level == "tiny":
            start, count = re.search(r" (\w)\+(\d)\?", text).groups()
        else:
            start = re.search(r"Start at (\w)\.", text)[1]
            count = re.search(r"(\d+) arrows", text)[1]
        path = [start]
        for _ in range(int(count)):
            path.append(arrows[path[-1]])
        assert problem.answer == ("".join(path) if "word" in text else path[-1])


def test_arrangements_are_all():
    names = ("Name", "Colour", "Pet")
    assert len(logic.arrangements(names, 3)) == math.factorial(3) ** 3
