"""A cell's files: whole batches, resumed where they end, and figures out of them."""

import json

import numpy as np
import pytest

from pr2jax.core.config import ConfigError
from pr2jax.evaluation.cells import CellFiles, digest, rollout_rows
from pr2jax.sampler.types import FINISH_LENGTH, FINISH_STOP, Rollout
from pr2jax.tasks.base import Problem

PROBLEMS = [Problem(f"p{i}", f"{i} + 1 =", str(i + 1), "reasoning_gym/x") for i in range(4)]
TEXTS = [["1", "1", "2"], ["2", "3", "3"], ["5", "6", "\ud800"], ["4", "4", "9"]]


def rollout(texts, problems):
    flat = [t for row in texts for t in row]
    right = [t == p.answer for p, row in zip(problems, texts, strict=True) for t in row]
    count = len(flat)
    zeros = np.zeros((count, 8), np.float32)
    return Rollout(
        tokens=zeros.astype(np.int32),
        prompt_lengths=np.full(count, 2),
        lengths=np.arange(count) % 3 + 3,
        loss_mask=zeros,
        behavior_logprobs=zeros,
        routes=None,
        prompt_ids=np.arange(count),
        group_ids=np.arange(count),
        policy_version=zeros,
        finish=np.where(np.arange(count) % 3 == 2, FINISH_LENGTH, FINISH_STOP),
        rewards=np.array(right, np.float32),
        reasons=tuple("" if r else "wrong" for r in right),
    ), flat


def add(files, first, last, **failures):
    made, texts = rollout(TEXTS[first:last], PROBLEMS[first:last])
    rows = rollout_rows(PROBLEMS[first:last], made, texts, 3)
    files.append(rows, failures, 1.5, last=last == len(PROBLEMS))


def open_files(folder, **made_of):
    return CellFiles(folder, "ckpt", "sums", 3, {"seed": 0} | made_of)


def test_figures_by_hand(tmp_path):
    files = open_files(tmp_path)
    assert (files.done, files.complete) == (0, False)
    add(files, 0, 3, timeouts=1)
    add(files, 3, 4, timeouts=2, errors=1)
    cell = open_files(tmp_path).read((1, 3))
    assert cell.per_problem["avg@3"].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 2 / 3])
    assert cell.per_problem["pass@3"].tolist() == [1, 1, 0, 1]
    assert cell.per_problem["maj@3"].tolist() == pytest.approx([1, 0, 0, 1])
    assert cell.per_problem["length"].tolist() == [2, 2, 2, 2]
    assert cell.per_problem["truncated"].tolist() == pytest.approx([1 / 3] * 4)
    assert cell.failures == {"timeouts": 3, "errors": 1}
    assert cell.seconds == 3.0
    assert cell.samples[1].reasons == ("", "wrong", "wrong; cut off at 3 tokens")
    rows = [json.loads(line) for line in files.rows.read_text(encoding="utf-8").splitlines()]
    assert rows[4] == {
        "checkpoint": "ckpt",
        "suite": "sums",
        "id": "p1",
        "domain": "other",
        "sample": 1,
        "prompt": "1 + 1 =",
        "reference": "2",
        "response": "3",
        "answer": "3",
        "score": 0.0,
        "reason": "wrong",
        "tokens": 2,
        "finish": "stop",
    }


def test_a_killed_run_goes_on_from_its_last_whole_batch(tmp_path):
    add(open_files(tmp_path), 0, 2)
    with open(tmp_path / "sums.jsonl", "a", encoding="utf-8") as file:
        file.write('{"a row that was cut')
    files = open_files(tmp_path)
    assert (files.done, files.complete) == (2, False)
    with pytest.raises(ConfigError, match="sums.jsonl: Unterminated string"):
        files.read((1,))
    add(files, 2, 4)
    assert files.complete
    ids = [s.problem.id for s in open_files(tmp_path).read((1,)).samples]
    assert ids == ["p0", "p1", "p2", "p3"]


def test_other_settings_are_an_error_and_nothing_is_lost(tmp_path):
    add(open_files(tmp_path), 0, 4)
    before = (tmp_path / "sums.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"sums.json was made with another seed: 0, now 1"):
        open_files(tmp_path, seed=1)
    assert (tmp_path / "sums.jsonl").read_bytes() == before


def test_digest_tells_problems_apart():
    assert digest(PROBLEMS) == digest(list(PROBLEMS))
    assert digest(PROBLEMS) != digest(PROBLEMS[::-1])
    assert digest(PROBLEMS) != digest(PROBLEMS[:-1])
