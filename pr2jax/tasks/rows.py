"""Problems from JSONL or parquet files of the Guru schema (arXiv 2506.14965).

A row has `prompt` ([{role, content}] or a string; where it is empty, `raw_prompt`),
`data_source` ("domain__name"), and `reward_model.ground_truth`: a text, a number, or an object or
list, which becomes `Problem.answer` as JSON. Of `extra_info` the keys in `_KEPT` go into the
problem's meta, "question" as meta["judge_question"], and columns "NAME_pass_rate" as
meta["pass_rates"]["NAME"]. The SFT target is made of the ground truth by `answer_template`.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pr2jax.core.config import ConfigError
from pr2jax.core.fetch import fetched
from pr2jax.data.chat import render_messages
from pr2jax.tasks import base, draw
from pr2jax.tasks.base import Problem, TaskConfig

log = logging.getLogger(__name__)
_REPORTED = 20
_RATE = "_pass_rate"
# What verifiers read of `extra_info`.
_KEPT = (
    "index", "prefix", "original_prompt", "entry_point", "answer_type", "unit", "tolerance",
    "choices", "code", "input", "output",
)  # fmt: skip


class RowError(ValueError):
    """Malformed rows beyond what is allowed; the message names file and line."""


def read_rows(path: str) -> Iterator[tuple[int, dict[str, Any] | Exception]]:
    """(line from 1, row) for each row of a .jsonl or .parquet file; an unreadable one is its error.

    Raises ConfigError if there is no such file or it is no parquet file.
    """
    path = fetched(path)
    if not os.path.isfile(path):
        raise ConfigError(f"name: no file {path}")
    if path.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ConfigError(f"name: {path} is not a parquet file ({error})") from None
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
        return
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
                yield number, row if isinstance(row, dict) else ValueError("not a JSON object")
            except ValueError as error:  # of the encoding or of the JSON
                yield number, error


def parse_row(cfg: TaskConfig, ident: str, row: dict[str, Any]) -> Problem:
    """One Guru row as a Problem. Raises ValueError naming the field at fault."""
    source = row.get("data_source")
    if not isinstance(source, str) or not source:
        raise ValueError("data_source is not a text")
    extra = row.get("extra_info")
    extra = extra if isinstance(extra, dict) else {}
    meta = {key: extra[key] for key in _KEPT if extra.get(key) is not None}
    raw = row.get("raw_prompt")
    asked = extra.get("question") or (raw if row.get("prompt") else None)
    if isinstance(asked, str) and asked.strip():
        meta["judge_question"] = asked.strip()
    rates = {
        key.removesuffix(_RATE): float(value)
        for key, value in row.items()
        if key.endswith(_RATE) and isinstance(value, int | float)
    }
    if rates:
        meta["pass_rates"] = rates
    return base.finish_problem(cfg, ident, _question(row), _truth(row), source, meta)


def _question(row: dict[str, Any]) -> str:
    """The text of `prompt`, or of `raw_prompt` where that is empty, as for base models."""
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt:
        return render_messages(prompt)
    for text in (prompt, row.get("raw_prompt")):
        if isinstance(text, str) and text.strip():
            return text.strip()
    raise ValueError("prompt is neither a text nor a list of messages")


def _truth(row: dict[str, Any]) -> str:
    """The ground truth as text; objects and lists as JSON, without the keys that are None."""
    reward = row.get("reward_model")
    truth = reward.get("ground_truth") if isinstance(reward, dict) else None
    if isinstance(truth, dict):
        # A parquet column of objects gives each row the keys of all.
        truth = {key: value for key, value in truth.items() if value is not None}
    if isinstance(truth, dict | list) and truth:
        try:
            return json.dumps(truth, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward_model.ground_truth is no JSON data ({error})") from None
    if isinstance(truth, bool) or not isinstance(truth, str | int | float) or truth == "":
        raise ValueError(f"reward_model.ground_truth is {truth!r}")
    return str(truth)


def load_problems(
    cfg: TaskConfig, path: str, check: Callable[[str], Any]
) -> tuple[list[Problem], dict[str, int]]:
    """Every well-formed row of a file; the others are reported by file and line, and counted.

    check: raises for a `data_source` that nobody verifies; that is an error of the run, not of
    the row, since dropping a domain in silence would change the mixture.
    Raises RowError when more than `cfg.max_bad_share` of the rows are malformed.
    """
    problems, bad, total = [], [], 0
    for number, row in read_rows(path):
        total += 1
        where = f"{path}:{number}"
        try:
            if isinstance(row, Exception):
                raise row
            problem = parse_row(cfg, where, row)
        except ConfigError:
            raise
        except ValueError as error:
            bad.append(f"{where}: {error}")
            if len(bad) <= _REPORTED:
                log.warning("malformed row %s", bad[-1])
            continue
        try:
            check(problem.data_source)
        except ValueError as error:
            raise RowError(f"{where}: {error}") from None
        problems.append(problem)
    if total == 0:
        raise RowError(f"{path}: no rows")
    if len(bad) > cfg.max_bad_share * total:
        raise RowError(
            f"{path}: {len(bad)} of {total} rows are malformed, more than "
            f"max_bad_share={cfg.max_bad_share}; first: {bad[0]}"
        )
    return problems, {"rows": total, "malformed": len(bad)}


def build(
    cfg: TaskConfig, exclude: Iterable[Problem], check: Callable[[str], Any]
) -> tuple[list[Problem], list[Problem], dict[str, int]]:
    """Distinct questions of a file, in an order given by seed and question, held-out first.

    The order does not depend on where a row stands, so a file with added rows keeps most of its
    split. Raises ConfigError where there are too few.
    """
    problems, stats = load_problems(cfg, cfg.name.partition(":")[2], check)
    train, held_out, repeats = draw.split(cfg, problems, exclude)
    return train, held_out, stats | repeats
