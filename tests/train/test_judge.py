"""The project's own sampler as a judge, and problems that cannot be scored told at the start."""

import dataclasses

import pytest

from pr2jax.core.config import ConfigError
from pr2jax.sampler.types import SamplerConfig
from pr2jax.tasks.base import Problem
from pr2jax.tasks.judge import UNPARSED, JudgeConfig
from pr2jax.tasks.sandbox import SandboxConfig
from pr2jax.train.pipeline import run_sft
from pr2jax.train.session import open_session
from pr2jax.train.verifier_config import VerifierConfig
from tests.train import tiny

ESSAY = Problem("s", "Why is the sky blue?", "Rayleigh scattering", "stem_web")
PROGRAM = Problem("c", "?", '{"inputs": ["1"], "outputs": ["1"]}', "codegen__x")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    run_sft(dataclasses.replace(tiny.config(), mode="sft"), str(folder))
    return str(folder)


@pytest.mark.slow
def test_a_run_of_ones_own_judges(trained, tmp_path):
    judge = JudgeConfig(
        kind="sampler", max_tokens=4, template="{question}{reference}{answer}", max_chars=20
    )
    room = SamplerConfig(slots=4, chunk=4, max_prompt=128, max_tokens=4)
    verifier = VerifierConfig(workers=1, judge=judge, judge_from=trained, judge_sampler=room)
    cfg = dataclasses.replace(tiny.config(), verifier=verifier)
    numbers = Problem("n", "1 + 1", "2 - 1 = a", "stem_web", meta={"kind": "text"})
    numbers = dataclasses.replace(numbers, answer="2 = 2")
    with open_session(cfg, tmp_path) as session:
        session.check_verifiers([numbers])
        # The alphabet of this model has no words, let alone a grade.
        verdicts = session.pool.score_batch([(numbers, r"\boxed{3 = 3}")] * 2)
        assert [(v.score, v.reason) for v in verdicts] == [(0.0, UNPARSED)] * 2
        assert session.pool.stats["judged"] == 2
        assert session.judge.stats["asked"] == 2  # one prompt for both, and once more


def test_what_cannot_be_scored_is_told_at_the_start(tmp_path):
    cfg = tiny.config()
    with open_session(cfg, tmp_path) as session:
        with pytest.raises(ConfigError, match=r"verifier\.judge\.kind: problem s \(stem_web\)"):
            session.check_verifiers([ESSAY])
        session.check_verifiers([PROGRAM])
    hidden = SandboxConfig(isolation="landlock", packages=("no_such_package",))
    cfg = dataclasses.replace(cfg, verifier=VerifierConfig(sandbox=hidden))
    with open_session(cfg, tmp_path) as session:
        broken = pytest.raises(ConfigError, match=r"verifier\.sandbox\.isolation: no isolation")
        with broken:
            session.check_verifiers([PROGRAM])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge_from": "x"}, "judge_from: judge.kind='none'"),
        ({"judge": JudgeConfig(kind="sampler")}, "judge_from: judge.kind='sampler'"),
        (
            {"judge": JudgeConfig(kind="sampler", max_tokens=9999), "judge_from": "x"},
            "judge_sampler.max_tokens: 1024",
        ),
        ({"workers": 0}, "workers: must be above 0"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        VerifierConfig(**settings).validate()
