"""The doctor on this machine: what it tells, and that it sees a device that computes wrongly."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from pr2jax import doctor
from pr2jax.core.config import ConfigError
from pr2jax.core.sharding import MeshConfig
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.train.config import Config


def test_all_is_well_here(tmp_path, capsys):
    out = tmp_path / "doctor.json"
    assert doctor.main([f"--json={out}", "--config=configs/quickstart.py"]) == 0
    told = capsys.readouterr().out
    assert told.rstrip().endswith("all well")
    found = json.loads(out.read_text())
    assert found["problems"] == []
    assert jax.__version__ in found["facts"]["versions"][0]
    assert len(found["facts"]["device"]) == jax.local_device_count()
    (line,) = found["facts"]["kernels"]
    assert line.startswith("layers 0 to 3: attention ")
    assert line.endswith("experts blocks")
    assert [row["what"] for row in found["parity"]] == ["forward", "gradient", "decode"]
    # Other kernels in other orders: not the bits of the reference compared with themselves.
    assert all(0 < row["error"] < row["tolerance"] for row in found["parity"])


def test_a_device_that_computes_wrongly_is_a_problem(monkeypatch):
    """The kernels' results are off by 5%, as of a device that drops a block of experts' rows."""
    right = doctor.forward

    def wrong(*args, cfg, **kwargs):
        out = right(*args, cfg=cfg, **kwargs)
        if cfg.moe.impl == "dense":
            return out
        return out.replace(hidden=out.hidden * jnp.asarray(1.05, out.hidden.dtype))

    monkeypatch.setattr(doctor, "forward", wrong)
    monkeypatch.setattr(doctor, "DECODED", 1)
    found = doctor.Findings()
    doctor.examine_parity(found)
    assert any(p.startswith("parity: the forward on") for p in found.problems)


def test_the_errors_measure():
    a, b = {"x": jnp.ones(4)}, {"x": jnp.ones(4) * 1.5}
    assert doctor._error(a, a) == 0.0
    assert doctor._error(b, a) == pytest.approx(0.5)
    assert doctor._error({"x": jnp.full(4, jnp.nan)}, a) == float("inf")


@pytest.mark.parametrize(
    "platform, expert, dtype, parts",
    [
        ("tpu", 1, "bfloat16", ["layers 1 to 3", "attention splash (pretrain, rows of 512)",
                                "experts ragged"]),
        ("gpu", 1, "bfloat16", ["attention cudnn", "experts batched"]),
        ("gpu", 1, "float32", ["attention einsum", "experts batched"]),
        ("gpu", 2, "bfloat16", ["attention cudnn", "experts blocks over 2 devices"]),
        ("cpu", 1, "float32", ["attention blocked", "experts blocks"]),
    ],
)  # fmt: skip
def test_kernels_by_platform(platform, expert, dtype, parts):
    model = ModelConfig(
        vocab_size=64, num_layers=4, head_dim=64, first_dense=1, moe=MoEConfig(num_experts=8)
    )
    cfg = Config(mode="pretrain", model=model, mesh=MeshConfig(expert=expert))
    cfg = dataclasses.replace(cfg, pretrain=dataclasses.replace(cfg.pretrain, row_length=512))
    dense, moe = doctor.kernels(cfg, platform, jnp.dtype(dtype))
    assert "layers 0 to 0" in dense
    assert "dense SwiGLU" in dense
    assert all(part in moe for part in parts), moe


@pytest.mark.parametrize("path", ["configs/no_such.py", "setup.cfg.py", "pyproject.toml"])
def test_a_config_that_is_none(path):
    with pytest.raises(ConfigError, match="^--config: "):
        doctor.load(path)


def test_a_bucket_is_written_to(store):
    found = doctor.Findings()
    doctor.machine(found, "gs://bucket/run", "cpu")
    assert found.facts["store"] == ["gs://bucket/run can be written to"]
    store.fault = lambda method, path: 403 if path.startswith("/upload") else None
    doctor.machine(found, "gs://bucket/run", "cpu")
    assert [p for p in found.problems if p.startswith("store: gs://bucket/run: cannot be written")]
    assert store.names() == []
