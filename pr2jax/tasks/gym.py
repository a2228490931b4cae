"""Problems of reasoning-gym: any of its generators, by name and settings.

Item seeds are seed + index there, so datasets of different seeds share items, and small spaces
repeat: everything here is told apart by question text.
"""

import functools
import json
import os
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from pr2jax.core.config import ConfigError
from pr2jax.tasks import base, draw
from pr2jax.tasks.base import Problem, TaskConfig, Verdict

# Found with reasoning-gym 0.1.25.
_NO_ANSWER = "its stored answer does not score 1"
_UNSTEADY = "the same seed does not give the same problems"
UNSOUND = {
    "boxnet": _NO_ANSWER,
    "graph_color": _NO_ANSWER,
    "propositional_logic": _NO_ANSWER,
    "rubiks_cube": _NO_ANSWER,
    "rush_hour": _NO_ANSWER,
    "game_of_life_halting": "a wrong answer scores 1",
    "prime_factorization": "its verifier raises on an answer that is no list of numbers",
    "list_functions": _UNSTEADY,
    "codeio": _UNSTEADY,
    "knight_swap": _UNSTEADY,
    "puzzle24": "it accepts numbers other than the puzzle's",
    "intermediate_integration": "1 in 22 of its stored answers is the integral, not its value",
    "composite": "its items are other generators'; name 'mixture' mixes them",
}
# These give the answer to Python's `eval`, or to sympy's `parse_expr`, which is one too: they see
# only answers that match as a whole. (A function name outside of the list would also let
# "Integral(...)" pass as the solution of an integration.)
_WORDS = "sin|cos|tan|sec|csc|cot|a(?:sin|cos|tan)|sinh|cosh|tanh|exp|log|ln|sqrt|pi|Abs"
_EXPRESSION = rf"(?:[\d\s+\-*/(),]|(?<=\d)\.|(?<!\w)(?:[A-Za-z]|{_WORDS})(?!\w))*"
EVALUATED = {
    "binary_matrix": r"[\d\s,\[\]-]*",
    "countdown": r"(?:[\d\s+\-/()]|(?<!\*)\*(?!\*))*",  # no powers
    "intermediate_integration": _EXPRESSION,
    "n_queens": r"[Q_\s,\[\]'\"]*",
    "polynomial_multiplication": _EXPRESSION,
    "simple_integration": _EXPRESSION,
    "spiral_matrix": r"[\d\s,\[\]-]*",
    "string_insertion": r"[A-E\s,\[\]'\"]*",
}
_EVALUATED_LENGTH = 4000
# These iterate over sets of strings: their problems depend on the process's hash seed, and a
# resumed run would train on other problems, held-out ones among them.
HASH_SEEDED = ("isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder")
# The domain whose skill a generator trains (base.DOMAINS). None asks for a program, for knowledge
# of nature, or about a table: `generated` and `packaged` have those.
_BY_DOMAIN = {
    "math": """
        advanced_geometry base_conversion basic_arithmetic bitwise_arithmetic calendar_arithmetic
        chain_sum coin_flip complex_arithmetic count_bits count_primes countdown
        decimal_arithmetic decimal_chain_sum dice fraction_simplification gcd gsm_symbolic
        intermediate_integration lcm leg_counting modulo_grid number_filtering number_format
        number_sequence number_sorting polynomial_equations polynomial_multiplication
        power_function prime_factorization products puzzle24 simple_equations simple_geometry
        simple_integration time_intervals
    """,
    "logic": """
        acre aiw arc_1d arc_agi boxnet circuit_logic color_cube_rotation course_schedule
        cryptarithm emoji_mystery family_relationships figlet_font futoshiki graph_color
        jugs kakurasu knight_swap knights_knaves largest_island letter_jumble list_functions
        mahjong_puzzle maze mini_sudoku n_queens needle_haystack palindrome_partitioning
        path_star propositional_logic quantum_lock rearc rectangle_count rubiks_cube rush_hour
        self_reference shortest_path sokoban sudoku survo syllogism tower_of_hanoi tsumego
        word_ladder zebra_puzzles
    """,
    "simulation": """
        ab bf binary_alternation binary_matrix caesar_cipher codeio game_of_life
        game_of_life_halting group_anagrams isomorphic_strings letter_counting manipulate_matrix
        palindrome_generation pool_matrix ransom_note rotate_matrix rotten_oranges
        sentence_reordering spell_backward spiral_matrix string_insertion string_manipulation
        string_splitting string_synthesis word_sequence_reversal word_sorting
    """,
}
DOMAIN = {name: domain for domain, names in _BY_DOMAIN.items() for name in names.split()}
_CHUNK = 512


@functools.lru_cache(maxsize=64)
def _dataset(name: str, settings: str, seed: int, size: int) -> Any:
    """One reasoning-gym dataset. Raises ConfigError for a wrong name or setting."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        import difflib

        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"name: reasoning-gym has no generator {name!r}{hint}")
    values = json.loads(settings)
    for key in ("seed", "size"):
        if key in values:
            raise ConfigError(f"settings: {key!r} is a key of the task, not of the generator")
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **values)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"settings: {name} refuses {settings}: {error}") from None


def verify(problem: Problem, response: str) -> Verdict:
    """reasoning-gym's own score of the answer found in `response`."""
    answer = base.extract_response(problem, response)
    if answer is None:
        return Verdict(0.0, "no answer in the expected form")
    name = problem.data_source.removeprefix("reasoning_gym/")
    pattern = EVALUATED.get(name)
    if pattern and not (
        len(answer) <= _EVALUATED_LENGTH and re.fullmatch(pattern, answer, re.ASCII)
    ):
        return Verdict(0.0, f"not in the form of an answer: read {answer[:80]!r}")
    dataset = _dataset(name, problem.meta["settings"], 0, 1)
    score = base.credit(problem, dataset.score_answer(answer, problem.meta["entry"]))
    return Verdict(score, base.explain(score, answer, response))


def _entries(name: str, settings: str, seed: int) -> Iterator[dict[str, Any]]:
    """An endless stream of a generator's items; a function of (name, settings, seed)."""
    start = zlib.crc32(f"{name}/{seed}".encode()) % 2**31
    state = random.getstate()
    try:
        for chunk in range(0, 2**30, _CHUNK):
            random.seed(start + chunk)  # some generators also read Python's global state
            dataset = _dataset.__wrapped__(name, settings, (start + chunk) % 2**31, _CHUNK)
            for i in range(_CHUNK):
                yield dataset[i]
    finally:
        random.setstate(state)


def problems(cfg: TaskConfig) -> Iterator[Problem]:
    """The endless stream of a generator's problems, repeats included.

    Raises ConfigError where the generator is unknown or refuses the settings.
    """
    name = cfg.name.removeprefix("reasoning_gym/")
    settings = json.dumps(cfg.settings_dict(), sort_keys=True)
    entries = _entries(name, settings, cfg.seed)
    try:
        for i, entry in enumerate(entries):
            yield _problem(cfg, name, settings, f"{name}-{cfg.seed}-{i}", entry)
    finally:
        entries.close()


def build(
    cfg: TaskConfig, exclude: Iterable[Problem] = ()
) -> tuple[list[Problem], list[Problem], dict[str, int]]:
    """Draws distinct questions: the first `held_out` are held out, the next `size` train.

    Raises ConfigError where the generator is unknown or unsound, a setting is wrong, or it has
    too few distinct questions.
    """
    name = cfg.name.removeprefix("reasoning_gym/")
    if name in UNSOUND and not cfg.allow_unsound:
        raise ConfigError(
            f"name: {name} is not to be trusted: {UNSOUND[name]} (allow_unsound=True to use it)"
        )
    if name in HASH_SEEDED and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise ConfigError(
            f"name: {name} gives other problems in every process; set the environment variable "
            "PYTHONHASHSEED=0 to use it"
        )
    stream = problems(cfg)
    train, held_out, stats = draw.draw(cfg, f"{name} with {cfg.settings}", stream, exclude)
    stream.close()  # gives Python's global random state back
    if not cfg.allow_unsound:
        _check_sound(name, (held_out + train)[:4])
    return train, held_out, stats


def _problem(
    cfg: TaskConfig, name: str, settings: str, ident: str, entry: dict[str, Any]
) -> Problem:
    answer = entry["answer"]
    return base.finish_problem(
        cfg,
        ident=ident,
        question=entry["question"],
        answer="" if answer is None else str(answer),
        data_source=f"reasoning_gym/{name}",
        meta={"entry": entry, "settings": settings}
        # `composite` is whatever its settings name.
        | ({"domain": DOMAIN[name]} if name in DOMAIN else {}),
    )


def _check_sound(name: str, some: list[Problem]) -> None:
    """Refuses a generator whose stored answers its own verifier does not accept."""
    dataset = None
    for problem in some:
        dataset = dataset or _dataset(name, problem.meta["settings"], 0, 1)
        score = dataset.score_answer(problem.meta["entry"]["answer"], problem.meta["entry"])
        if score < 1.0:
            raise ConfigError(
                f"name: {name}: its stored answer scores {score} on {problem.id} "
                "(allow_unsound=True to use it)"
            )
