"""The project's own sampler as a judge, and problems that cannot be scored told at the start."""

import pytest

from pr2jax.core.config import ConfigError
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.sampler.types import SamplerConfig
from pr2jax.tasks.base import Problem
from pr2jax.tasks.judge import UNPARSED, JudgeConfig
from pr2jax.tasks.sandbox import SandboxConfig
from pr2jax.train.pipeline import run_sft
from pr2jax.train.session import open_session
from pr2jax.train.verifier_config import VerifierConfig
from tests.train import tiny

BYTES = TokenizerConfig(kind="byte")
ESSAY = Problem("s", "Why is the sky blue?", "Rayleigh scattering", "stem_web")
PROGRAM = Problem("c", "?", '{"inputs": ["1"], "outputs": ["1"]}', "codegen__x")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    run_sft(tiny.config(mode="sft", tokenizer=BYTES), str(folder))
    return str(folder)


@pytest.mark.slow
def test_a_run_of_ones_own_judges(trained, tmp_path):
    judge = JudgeConfig(
        kind="sampler", max_tokens=4, template="{question}{reference}{answer}", max_chars=20
    )
    room = SamplerConfig(slots=8, chunk=4, max_prompt=256, max_tokens=4)
    verifier = VerifierConfig(workers=1, judge=judge, judge_from=trained, judge_sampler=room)
    with open_session(tiny.config(verifier=verifier), tmp_path) as session:
        session.check_verifiers([ESSAY])
        # Four steps of sums teach no grades.
        verdicts = session.pool.score_batch([(ESSAY, r"\boxed{it scatters}")] * 2)
        assert [(v.score, v.reason) for v in verdicts] == [(0.0, UNPARSED)] * 2
        assert session.pool.stats["judged"] == 2
        assert session.judge.stats["asked"] == 2  # one prompt for both, and once more


def test_what_cannot_be_scored_is_told_at_the_start(tmp_path):
    with open_session(tiny.config(), tmp_path) as session:
        with pytest.raises(ConfigError, match=r"verifier\.judge\.kind: problem s \(stem_web\)"):
            session.check_verifiers([ESSAY])
        session.check_verifiers([PROGRAM])
    hidden = SandboxConfig(isolation="landlock", packages=("no_such_package",))
    cfg = tiny.config(verifier=VerifierConfig(sandbox=hidden))
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
