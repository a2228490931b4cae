"""The runner against a sampler whose responses are scripted."""

import json

import numpy as np
import pytest

from pr2jax.data.tokenizer import TokenizerConfig, build_tokenizer
from pr2jax.evaluation import runner
from pr2jax.sampler.types import FINISH_LENGTH, FINISH_STOP, Rollout, SamplingParams
from pr2jax.tasks.base import Problem, Verdict

TOKENIZER = build_tokenizer(TokenizerConfig(kind="char", alphabet="0123456789+=x"))
PROBLEMS = [Problem(f"p{i}", f"{i}+{i}=", str(2 * i), "test") for i in range(3)]
# Of problem i, sample j: all right; one of four right; none right and one cut off.
SCRIPT = [["0", "0", "0", "0"], ["2", "x", "3", ""], ["5", "x", "x", "4444444"]]


class ScriptedSampler:
    """Returns SCRIPT as a Rollout; 7 tokens are the limit."""

    def rollout(self, prompts, n, sampling, *, params, key):
        assert (params, key) == ("params", "key")
        rows = []
        for prompt, texts in zip(prompts, SCRIPT, strict=True):
            for text in texts[:n]:
                stop = len(text) < 7
                rows.append((prompt, TOKENIZER.encode(text) + [TOKENIZER.eos_id] * stop, stop))
        # Rows are filled with the end token, as where pad equals end: only lengths may count.
        tokens = np.full((len(rows), 16), TOKENIZER.eos_id, np.int32)
        for b, (prompt, response, _) in enumerate(rows):
            tokens[b, : len(prompt) + len(response)] = prompt + response
        zeros = np.zeros(tokens.shape, np.float32)
        return Rollout(
            tokens=tokens,
            prompt_lengths=np.array([len(p) for p, _, _ in rows], np.int32),
            lengths=np.array([len(p) + len(r) for p, r, _ in rows], np.int32),
            loss_mask=zeros,
            behavior_logprobs=zeros,
            routes=None,
            prompt_ids=np.repeat(np.arange(len(prompts)), n),
            group_ids=np.repeat(np.arange(len(prompts)), n),
            policy_version=zeros.astype(np.int32),
            finish=np.array([FINISH_STOP if s else FINISH_LENGTH for _, _, s in rows], np.int8),
            rewards=np.zeros(len(rows), np.float32),
            sampling=sampling,
        ), None


class ExactPool:
    def score_batch(self, items):
        return [
            Verdict(1.0)
            if r == p.answer
            else Verdict(0.25 if r == "x" else 0.0, f"{p.id} got {r!r}")
            for p, r in items
        ]


def run(n=4, ks=(1, 2, 4), problems=PROBLEMS):
    return runner.evaluate(
        ScriptedSampler(),
        "params",
        TOKENIZER,
        problems,
        ExactPool(),
        SamplingParams(),
        n,
        ks,
        "key",
    )


def test_figures_by_hand():
    result = run()
    assert result.per_problem["avg@4"].tolist() == [1.0, 1.25 / 4, 0.5 / 4]
    assert result.per_problem["pass@1"].tolist() == [1.0, 0.25, 0.0]
    assert result.per_problem["pass@2"].tolist() == [1.0, 0.5, 0.0]  # 3 of the 6 pairs
    assert result.per_problem["pass@4"].tolist() == [1.0, 1.0, 0.0]
    assert result.per_problem["best@2"].tolist() == pytest.approx([1.0, 3.5 / 6, 1.25 / 6])
    assert result.per_problem["worst@2"].tolist() == pytest.approx([1.0, 0.25 / 6, 0.25 / 6])
    assert result.per_problem["truncated"].tolist() == [0.0, 0.0, 0.25]
    assert result.per_problem["length"].tolist() == [2.0, 7 / 4, 13 / 4]
    assert result.metrics["pass@1"].mean == pytest.approx(1.25 / 3)
    flat = result.flat("eval/")
    assert flat["eval/pass@1/low"] <= flat["eval/pass@1"] <= flat["eval/pass@1/high"]


def test_samples_hold_texts_scores_and_reasons():
    samples = run().samples
    assert [list(s.responses) for s in samples] == SCRIPT
    assert samples[1].scores == (1.0, 0.25, 0.0, 0.0)
    assert samples[1].reasons == ("", "p1 got 'x'", "p1 got '3'", "p1 got ''")
    assert json.loads(json.dumps(samples[2].to_json()))["answer"] == "4"


def test_impossible_requests_are_errors():
    with pytest.raises(ValueError, match="k must be 1..2"):
        run(n=2, ks=(1, 4))
    with pytest.raises(ValueError, match="no problems"):
        run(problems=[])
    rollout, _ = ScriptedSampler().rollout(
        [[2]] * 3, 4, SamplingParams(), params="params", key="key"
    )
    with pytest.raises(ValueError, match="12 rows, not 3 problems x 3"):
        runner.score_rollout(rollout, PROBLEMS, 3, TOKENIZER, ExactPool())
