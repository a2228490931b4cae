"""Members of the GRPO family by their names in configs/grpo.py."""

import re

import pytest

from pr2jax.core.metrics import read_jsonl
from tests.train.test_configs import ROOT, load, main

HEADER = (ROOT / "configs" / "grpo.py").read_text(encoding="utf-8").split('"""')[1]
NAMES = re.findall(r"`:(\w+)`", HEADER.partition("Replay modes")[0])


def test_presets_are_valid_and_differ():
    assert NAMES == ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"]
    full = [load("grpo", name).rl for name in ("", *NAMES)]
    assert len({repr(rl) for rl in full}) == len(full)
    assert load("grpo", "gspo,smoke").rl.steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_smoke(name, tmp_path):
    # Random parameters solve nothing, and a batch without a signal would run no program.
    done = main(
        f"--config=configs/grpo.py:{name},smoke",
        f"--workdir={tmp_path}",
        "--config.rl.filter_zero_variance=False",
        "--config.rl.dynamic_sampling=False",
    )
    assert done.returncode == 0, done.stderr
    rows = read_jsonl(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all(row["skipped"] == 0.0 for row in rows if "loss" in row)


def test_an_unknown_name_is_one_line(tmp_path):
    done = main("--config=configs/grpo.py:dapoo", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "ConfigError: --config: 'dapoo' is not one of grpo, dr_grpo, dapo" in done.stderr
    assert "Traceback" not in done.stderr
