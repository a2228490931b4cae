"""Suites: named sets of problems, with how many samples are drawn of each and how.

A suite file is a JSON object {NAME: suite}; a suite has the keys of `SuiteConfig`. The path of a
"parquet:" or "jsonl:" task may be a pattern (*, ?), within `evaluation.data`.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import re
from pathlib import Path
from typing import Any, Literal

from pr2jax.core.config import ConfigError, from_config_dict
from pr2jax.core.fetch import fetched
from pr2jax.sampler.types import SamplingParams
from pr2jax.tasks.base import CHAT, Problem, TaskConfig
from pr2jax.tasks.registry import build_task

_FILES = ("parquet:", "jsonl:")
# Where the published Guru data keeps its evaluation sets, below the folder that holds all.
_PUBLISHED = "offline_eval"
# In the place of a chat template that a tokenizer has not.
PLAIN_PROMPT = "{question}\n"


@dataclasses.dataclass(frozen=True)
class SuiteConfig:
    """One suite.

    task: its problems: the held-out ones where there are any, else all. With prompt_template
      "chat", a checkpoint whose tokenizer has no chat template reads the question and a newline.
    samples: responses a problem.
    ks: of pass@k, best@k, worst@k and maj@k.
    sampling: how responses are drawn.
    no_verifier: why nothing here can score it; it is then listed, and never run.
    note: where its settings come from.
    """

    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    samples: int = 1
    ks: tuple[int, ...] = (1,)
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    no_verifier: str = ""
    note: str = ""

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        if self.samples < 1:
            raise ConfigError(f"samples: must be at least 1, got {self.samples}")
        if not self.ks or min(self.ks) < 1 or max(self.ks) > self.samples:
            raise ConfigError(f"ks: {self.ks} must lie between 1 and samples={self.samples}")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Checkpoints x suites (mode `eval`).

    Attributes:
      checkpoints: what `init_from` takes, each; "random:SEED" is the configured model untrained.
        The first is the base that the others are compared with.
      suites: suite files (JSON).
      only: names of the suites to run (empty: all).
      data: folder of the suites' data files, or one that holds `offline_eval`.
      samples, max_tokens: in the place of every suite's own (0: its own). Of `ks`, those above
        `samples` are left out.
      limit: most problems a suite (0: all).
      batch: responses a call of the sampler, about: what is lost when a run is killed.
      long_prompts: what becomes of a problem whose prompt has more than sampler.max_prompt tokens:
        `error` stops before anything is sampled, `wrong` scores 0 with the reason, and is counted.
      transcripts: problems a suite whose responses the report shows.
    """

    checkpoints: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    data: str = ""
    samples: int = 0
    max_tokens: int = 0
    limit: int = 0
    batch: int = 256
    long_prompts: Literal["error", "wrong"] = "error"
    transcripts: int = 4

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        for key in ("samples", "max_tokens", "limit", "transcripts"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key}: must be >= 0, got {getattr(self, key)}")
        if self.batch < 1:
            raise ConfigError(f"batch: must be at least 1, got {self.batch}")
        for key in ("checkpoints", "suites", "only"):
            values = getattr(self, key)
            twice = sorted({v for v in values if values.count(v) > 1})
            if twice:
                raise ConfigError(f"{key}: {twice[0]!r} stands there more than once")
        for name in self.checkpoints:
            if not name or (name.startswith("random:") and not name[7:].isdecimal()):
                raise ConfigError(f"checkpoints: {name!r} is neither a checkpoint nor random:SEED")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Suites that can run, with overrides and paths in, and why the others cannot."""

    suites: dict[str, SuiteConfig]
    missing: dict[str, str]


def read_suites(path: str) -> dict[str, SuiteConfig]:
    """The suites of a file. Raises ConfigError naming file, suite and key."""
    path = fetched(path)
    if not Path(path).is_file():
        raise ConfigError(f"evaluation.suites: no file {path}")
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=_distinct)
    except ValueError as error:  # of the encoding, the JSON, or a key that stands there twice
        raise ConfigError(f"evaluation.suites: {path}: {error}") from None
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"evaluation.suites: {path}: not a JSON object of suites")
    for name in values:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(f"evaluation.suites: {path}: {name!r}: letters, digits, _ . - only")
    try:
        return {name: from_config_dict(SuiteConfig, own, name) for name, own in values.items()}
    except ConfigError as error:
        raise ConfigError(f"evaluation.suites: {path}: {error}") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found


def plan_suites(cfg: EvaluationConfig) -> Plan:
    """Reads the suite files and looks for their data.

    Raises ConfigError: a bad file, a name in two files, an unknown one in `only`, a pattern that
    several files match, or where nothing can run.
    """
    found: dict[str, SuiteConfig] = {}
    for path in cfg.suites:
        for name, suite in read_suites(path).items():
            if name in found:
                raise ConfigError(f"evaluation.suites: {path}: {name}: also in an earlier file")
            found[name] = suite
    unknown = [name for name in cfg.only if name not in found]
    if unknown:
        raise ConfigError(f"evaluation.only: no suite {unknown[0]!r}; there are {', '.join(found)}")
    plan = Plan({}, {})
    for name in cfg.only or found:
        suite = found[name]
        if suite.no_verifier:
            plan.missing[name] = f"no verifier: {suite.no_verifier}"
            continue
        path, why = _data(name, suite.task.name, cfg.data)
        if why:
            plan.missing[name] = why
            continue
        task = dataclasses.replace(suite.task, name=path)
        plan.suites[name] = _overridden(dataclasses.replace(suite, task=task), cfg)
    if not plan.suites:
        why = "; ".join(f"{name}: {reason}" for name, reason in plan.missing.items())
        raise ConfigError(f"evaluation.suites: none can run ({why or 'no suite file is given'})")
    return plan


def _data(name: str, task: str, folder: str) -> tuple[str, str]:
    """(task name with the file found, "") or ("", why there is none)."""
    kind = next((k for k in _FILES if task.startswith(k)), "")
    if not kind:
        return task, ""
    pattern = task.removeprefix(kind)
    if not folder:
        return "", f"its data {pattern} is looked for in evaluation.data, which is not given"
    folder = fetched(folder)
    if not Path(folder).is_dir():
        raise ConfigError(f"evaluation.data: no folder {folder}")
    below = Path(folder) / _PUBLISHED
    where = below if below.is_dir() else Path(folder)
    paths = sorted(glob.glob(pattern, root_dir=where))
    if len(paths) > 1:
        raise ConfigError(
            f"evaluation.suites: {name}: {pattern} matches {', '.join(paths)} in {where}: name one"
        )
    if not paths:
        return "", f"no file {pattern} in {where}"
    return f"{kind}{where / paths[0]}", ""


def _overridden(suite: SuiteConfig, cfg: EvaluationConfig) -> SuiteConfig:
    samples = cfg.samples or suite.samples
    sampling = suite.sampling
    if cfg.max_tokens:
        sampling = dataclasses.replace(sampling, max_tokens=cfg.max_tokens)
    ks = tuple(k for k in suite.ks if k <= samples) or (1,)
    return dataclasses.replace(suite, samples=samples, ks=ks, sampling=sampling)


def build_problems(
    suite: SuiteConfig, *, chat: bool, limit: int = 0
) -> tuple[list[Problem], dict[str, int]]:
    """(problems, what building them counted: malformed rows, repeats, ...).

    chat: whether the tokenizer has a chat template. Raises ConfigError, RowError.
    """
    built = build_task(suite.task if chat else _plain(suite.task))
    problems = built.held_out or built.train
    return (problems[:limit] if limit else problems), built.stats


def _plain(task: TaskConfig) -> TaskConfig:
    """`task` without chat templates."""
    parts = {name: _plain(part) for name, part in task.parts.items()}
    if task.prompt_template == CHAT:
        task = dataclasses.replace(task, prompt_template=PLAIN_PROMPT, system_prompt="")
    return dataclasses.replace(task, parts=parts)


def uses_chat(task: TaskConfig) -> bool:
    """Whether its prompts are put by a chat template where there is one."""
    return task.prompt_template == CHAT or any(map(uses_chat, task.parts.values()))
