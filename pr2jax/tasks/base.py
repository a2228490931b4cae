"""What a task is: problems, verdicts, configuration, and how problems are told apart."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from pr2jax.core.config import ConfigError
from pr2jax.data.chat import render, render_prompt

MIXTURE = "mixture"  # the task name that stands for `parts`
_KINDS = {
    "reasoning_gym": "reasoning_gym/GENERATOR",
    "generated": "generated/GENERATOR",
    "packaged": "packaged/NAME",
    "jsonl": "jsonl:PATH",
    "parquet": "parquet:PATH",
    MIXTURE: MIXTURE,
}
CHAT = "chat"  # the prompt_template that stands for the tokenizer's own

# Guru's six (arXiv 2506.14965), and what its files call them before the "__" of a data source.
DOMAINS = ("math", "code", "science", "logic", "simulation", "tabular")
_PREFIXES = {"codegen": "code", "stem": "science", "table": "tabular"}
_BARE_SOURCES = {
    "zebra_puzzle_dataset": "logic",
    "ordering_puzzle_dataset": "logic",
    "graph_logical_dataset": "logic",
    "stem_web": "science",
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    id: unique within its task. prompt: what the model reads. answer: reference answer, for
    reports. data_source: says who verifies it: "reasoning_gym/NAME", or a Guru
    "domain__name". solution: target text for SFT, None where there is none. meta: what the
    verifier needs, and "question", the question itself before any template. messages: the
    conversation that a chat template puts around the prompt, empty where none does.
    """

    id: str
    prompt: str
    answer: str
    data_source: str
    solution: str | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    messages: tuple[dict[str, str], ...] = ()

    @property
    def input(self) -> str | tuple[dict[str, str], ...]:
        """What the tokenizer encodes: the messages where there are any, else the prompt."""
        return self.messages or self.prompt


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Score in [0, 1] of one response, and why."""

    score: float
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class JudgeRequest:
    """What a verifier returns where a model must judge `answer` against `reference`."""

    question: str
    reference: str
    answer: str


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Where problems come from and how they are put.

    name: "reasoning_gym/GENERATOR"; "generated/GENERATOR", one of our own (`tasks.generated`);
        "packaged/NAME", a set that comes with a package (`tasks.packaged`); "jsonl:PATH" or
        "parquet:PATH" (rows of the Guru schema); or "mixture" of `parts`.
    parts: mixture: tasks by name. Sizes and templates are the parts' own; of the keys below only
        `seed`, which chooses the order, is the mixture's.
    settings: a JSON object of the generator's own settings.
    size, held_out: numbers of training and of held-out problems. Rows, packaged: size -1 takes
        all.
    seed: chooses the problems and the split.
    prompt_template, answer_template: with {question} and {answer}; the second makes the SFT
        target. prompt_template "chat" puts the question by the tokenizer's own chat template.
    system_prompt: system message before the question, for "chat" (empty: none).
    question_regex: what the model sees of the question is group 1 of its first match; empty
        leaves the question whole. The verifier always works on the whole.
    lowercase: put question and solution in lower case (a smaller alphabet for small models; for
        verifiers that ignore case).
    response_regex: the answer is group 1 of its last match in the response (no match: score 0);
        empty takes the whole response, or for math the last \\boxed{}.
    partial_credit: in [0, 1]: what a score below 1 is multiplied by; 0 makes it all or nothing.
    allow_unsound: True admits generators whose verifier is known to be wrong.
    max_bad_share: rows: share of malformed rows above which reading stops.
    """

    name: str = "reasoning_gym/chain_sum"
    parts: dict[str, "TaskConfig"] = dataclasses.field(default_factory=dict)
    settings: str = "{}"
    size: int = 1000
    held_out: int = 100
    seed: int = 0
    prompt_template: str = "{question}\n"
    system_prompt: str = ""
    answer_template: str = "{answer}"
    question_regex: str = ""
    lowercase: bool = False
    response_regex: str = ""
    partial_credit: float = 1.0
    allow_unsound: bool = False
    max_bad_share: float = 0.01

    def validate(self) -> None:
        """Raises ConfigError naming the key, also one that does not apply to this kind of task."""
        kind = self.kind
        start = re.match("[a-z_]+[:/]?", _KINDS.get(kind, "-"))
        whole = self.name == MIXTURE if kind == MIXTURE else len(self.name) > len(kind) + 1
        if not start or not whole or not self.name.startswith(start.group()):
            raise ConfigError(f"name: {self.name!r} is not one of {', '.join(_KINDS.values())}")
        if kind == MIXTURE:
            self._validate_mixture()
            return
        if self.parts:
            raise ConfigError(f"parts: {kind} has none; only name 'mixture' has")
        if self.settings_dict() and kind not in ("reasoning_gym", "generated"):
            raise ConfigError(f"settings: {kind} has none")
        if self.allow_unsound and kind != "reasoning_gym":
            raise ConfigError(f"allow_unsound: only for reasoning_gym, not for {kind}")
        if self.lowercase and kind in ("generated", "packaged"):
            raise ConfigError(f"lowercase: {kind} problems are scored with their case")
        if self.size < (0 if kind in ("reasoning_gym", "generated") else -1):
            raise ConfigError(f"size: {self.size} problems")
        if self.held_out < 0 or (self.size == 0 and self.held_out == 0):
            raise ConfigError(f"held_out: {self.held_out} problems, with size {self.size}")
        for key, field in (("prompt_template", "question"), ("answer_template", "answer")):
            if (key, self.prompt_template) == ("prompt_template", CHAT):
                continue
            if f"{{{field}}}" not in getattr(self, key):
                raise ConfigError(f"{key}: {getattr(self, key)!r} has no {{{field}}}")
        if self.system_prompt and self.prompt_template != CHAT:
            raise ConfigError("system_prompt: only for prompt_template 'chat'")
        for key in ("question_regex", "response_regex"):
            try:
                pattern = re.compile(getattr(self, key))
            except re.error as error:
                raise ConfigError(f"{key}: not a regular expression ({error})") from None
            if getattr(self, key) and pattern.groups < 1:
                raise ConfigError(f"{key}: {getattr(self, key)!r} has no group to take")
        for key in ("max_bad_share", "partial_credit"):
            if not 0.0 <= getattr(self, key) <= 1.0:
                raise ConfigError(f"{key}: {getattr(self, key)} is not in [0, 1]")

    @property
    def held_out_size(self) -> int:
        """Held-out problems this asks for, over all parts."""
        if self.kind != MIXTURE:
            return self.held_out
        return sum(part.held_out_size for part in self.parts.values())

    def _validate_mixture(self) -> None:
        if not self.parts:
            raise ConfigError("parts: a mixture needs at least one")
        for field in dataclasses.fields(self):
            own = field.name in ("name", "parts", "seed")
            if not own and getattr(self, field.name) != field.default:
                raise ConfigError(f"{field.name}: set it on the parts of a mixture, not on it")
        for name, part in self.parts.items():
            if not name or "/" in name:
                raise ConfigError(f"parts: {name!r} is not a name (it has to go into problem ids)")
            try:
                part.validate()
            except ConfigError as error:
                raise ConfigError(f"parts.{name}.{error}") from None

    @property
    def kind(self) -> str:
        """What stands before the ":" or "/" of `name`."""
        return self.name.partition(":" if ":" in self.name else "/")[0]

    @property
    def train_size(self) -> int:
        """Training problems this asks for, over all parts; -1 where that depends on a file."""
        if self.kind != MIXTURE:
            return self.size
        sizes = [part.train_size for part in self.parts.values()]
        return -1 if -1 in sizes else sum(sizes)

    def settings_dict(self) -> dict[str, Any]:
        """`settings` parsed. Raises ConfigError if it is not a JSON object."""
        try:
            value = json.loads(self.settings)
        except json.JSONDecodeError as error:
            raise ConfigError(f"settings: not JSON ({error}): {self.settings!r}") from None
        if not isinstance(value, dict):
            raise ConfigError(f"settings: not a JSON object: {self.settings!r}")
        return value


@dataclasses.dataclass(frozen=True)
class Task:
    """Problems to train on and problems held out, no question in both.

    `stats` counts what building it met (draws, repeats, malformed rows...).
    """

    config: TaskConfig
    train: list[Problem]
    held_out: list[Problem]
    verifier: Callable[[Problem, str], Verdict]
    stats: dict[str, int] = dataclasses.field(default_factory=dict)

    def score(self, problem: Problem, response: str) -> Verdict | JudgeRequest:
        """Scores in this process, without limits: for tests. Elsewhere use a VerifierPool."""
        return checked(self.verifier(problem, response))


def checked(verdict: Verdict | JudgeRequest) -> Verdict | JudgeRequest:
    """The verdict, or score 0 with the reason where its score is no number in [0, 1].

    What a judge has to decide is passed on.
    """
    if isinstance(verdict, JudgeRequest):
        return verdict
    score = verdict.score
    if isinstance(score, bool) or not isinstance(score, int | float):
        return Verdict(0.0, f"verifier gave {score!r}, not a number")
    if math.isnan(score) or not 0.0 <= score <= 1.0:
        return Verdict(0.0, f"verifier gave {score}, outside [0, 1]")
    return Verdict(float(score), verdict.reason)


def domain_of(problem: Problem) -> str:
    """One of DOMAINS: `meta["domain"]` where it is set, else what the data source says.

    ARC grids count as logic, as in arXiv 2506.14965, though Guru's files put them under
    "simulation__". A source of no domain is "other".
    """
    if "domain" in problem.meta:
        return problem.meta["domain"]
    source = problem.data_source
    if source in _BARE_SOURCES:
        return _BARE_SOURCES[source]
    prefix, _, name = source.partition("__")
    if name.startswith(("arcagi", "barc")):
        return "logic"
    domain = _PREFIXES.get(prefix, prefix)
    return domain if domain in DOMAINS else "other"


def finish_problem(
    cfg: TaskConfig,
    ident: str,
    question: str,
    answer: str,
    data_source: str,
    meta: dict[str, Any],
    target: str | None = None,
) -> Problem:
    """A Problem with its templates filled in; what scoring needs of `cfg` goes into `meta`.

    target: the text SFT learns, in the form that the verifier reads (`answer` when None).

    Raises ConfigError if `question_regex` does not match.
    """
    target = answer if target is None else target
    shown = question
    if cfg.question_regex:
        match = re.search(cfg.question_regex, question)
        if match is None or match.group(1) is None:
            raise ConfigError(
                f"question_regex: {cfg.question_regex!r} finds nothing in {question[:200]!r}"
            )
        shown = match.group(1)
    if cfg.lowercase:
        shown, target = shown.lower(), target.lower()
    chat = cfg.prompt_template == CHAT
    return Problem(
        id=ident,
        prompt=shown if chat else render_prompt(cfg.prompt_template, shown),
        answer=answer,
        data_source=data_source,
        solution=render(cfg.answer_template, answer=target),
        meta={
            "question": question,
            "shown": shown,
            "response_regex": cfg.response_regex,
            "partial_credit": cfg.partial_credit,
            **meta,
        },
        messages=_messages(cfg.system_prompt, shown) if chat else (),
    )


def _messages(system: str, question: str) -> tuple[dict[str, str], ...]:
    before = ({"role": "system", "content": system},) if system else ()
    return (*before, {"role": "user", "content": question})


def extract_response(problem: Problem, response: str) -> str | None:
    """The answer within a response, by the problem's `response_regex`; None if not found."""
    pattern = problem.meta.get("response_regex", "")
    if not pattern:
        return response.strip()
    matches = list(re.finditer(pattern, response, re.DOTALL))
    return matches[-1].group(1).strip() if matches and matches[-1].group(1) is not None else None


def explain(score: float, answer: str, response: str) -> str:
    """Why a response got `score`: empty for a right one; says what was read as the answer."""
    if score >= 1.0:
        return ""
    kind = "partly right" if score > 0.0 else "wrong"
    return kind if answer == response.strip() else f"{kind}: read {answer[:80]!r}"


def credit(problem: Problem, score: float) -> float:
    """`score`; below 1 it counts as much as the problem gives partial credit."""
    return score if score >= 1.0 else score * problem.meta.get("partial_credit", 1.0)


def question_keys(problem: Problem) -> tuple[str, ...]:
    """What tells two problems apart: the question, whole and as shown, case and space ignored.

    meta["same_as"] has further keys, for questions that are the same in other words.
    """
    whole = problem.meta.get("question", problem.prompt)
    shown = problem.meta.get("shown", whole)
    first = normalise(whole)
    second = first if shown == whole else normalise(shown)
    return (first, second, *problem.meta.get("same_as", ()))


def normalise(text: str) -> str:
    """Lower case, single spaces."""
    return " ".join(text.lower().split())


class SeenQuestions:
    """Questions met so far. Two problems are the same if any of their keys is."""

    def __init__(self, problems: Iterable[Problem] = ()):
        self._keys: set[str] = set()
        for problem in problems:
            self.add(problem)

    def __contains__(self, problem: Problem) -> bool:
        return not self._keys.isdisjoint(question_keys(problem))

    def add(self, problem: Problem) -> bool:
        """Adds a problem; False if it was there."""
        keys = question_keys(problem)
        new = self._keys.isdisjoint(keys)
        self._keys.update(keys)
        return new
