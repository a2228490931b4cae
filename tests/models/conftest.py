"""What the tests of checkpoints share."""

import pytest

from pr2jax.models.importers.hf import export_checkpoint
from tests.models.checkpoints import QWEN, random_params


@pytest.fixture
def folder(tmp_path):
    """A small exported checkpoint to spoil, in one file."""
    export_checkpoint(QWEN, random_params(QWEN), tmp_path / "src", "qwen3_moe")
    return tmp_path / "src"
