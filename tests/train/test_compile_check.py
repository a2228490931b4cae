"""The compile check on devices that are here, on a TPU slice that is not, and the estimate."""

import dataclasses
import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core import hlo
from pr2jax.core.config import ConfigError
from pr2jax.core.hardware import CHIPS, Chip, Topology, parse_topology
from pr2jax.core.sharding import MeshConfig, ShardingError, make_mesh
from pr2jax.core.state import create
from pr2jax.models.flops import forward_flops, head_flops, training_flops
from pr2jax.rl.batch import put_batch
from pr2jax.sampler.programs import Programs
from pr2jax.train import compile_check, compile_report, estimate, shapes
from pr2jax.train.precision import PrecisionError, asked_products, by_scope, check_exact
from tests.train import tiny

ROOT = Path(__file__).resolve().parents[2]
MESH = MeshConfig(data=1, fsdp=2, expert=4)
HERE = Topology("eight CPU devices", Chip("cpu", 10**9, "cpu"), (8,))


def resolved(**changes):
    return shapes.resolved(tiny.config(mesh=MESH, **changes))


@pytest.fixture(scope="module")
def setup():
    cfg = resolved()
    return shapes.make_setup(cfg, make_mesh(cfg.mesh, jax.devices()[:8]), jnp.dtype("float32"))


def held(tree) -> int:
    """Bytes of real arrays on the first device."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


# -------------------------------------------------------------------- estimate


def test_what_is_counted_as_resident_is_what_a_run_holds(setup):
    cfg, mesh = setup.cfg, setup.mesh
    found = estimate.estimate(cfg, CHIPS["v5e"], 8, setup.dtype)
    zeros = lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding)
    params = jax.tree.map(zeros, setup.params())
    optimizer = shapes.build_optimizer(shapes.policy_optim(cfg.rl.optim, cfg.model), setup.specs)
    assert found.resident["training state"] == held(create(params, optimizer))
    programs = Programs(cfg.model, cfg.sampler, setup.dtype, mesh)
    assert found.resident["sampler weights"] == held(programs.prepare(params))
    assert found.resident["sampler cache and slots"] == held(programs.init_slots())
    features = programs.init_features(cfg.rl.rows, shapes.feature_places(cfg))
    assert found.resident["router features, recorded"] == held(features)
    abstract = shapes.learner_batch(setup, cfg.rl.mini_rows)
    numbers = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract)
    whole = dataclasses.replace(numbers, shift=None, lookahead=None)
    shift = jnp.zeros(abstract.shift.shape, abstract.shift.dtype)
    assert found.resident["mini-batch"] == held(put_batch(whole, mesh)) + shift.nbytes
    assert found.need == sum(found.resident.values()) + max(
        sum(parts.values()) for parts in found.temporaries.values()
    )


@pytest.mark.parametrize("mode", ["pretrain", "sft", "rl", "sft_then_rl"])
def test_estimate_of_every_mode(mode, tmp_path, capsys):
    cfg = dataclasses.replace(tiny.config(), mode=mode)
    assert estimate.run_estimate(cfg, tmp_path, "h100")
    printed = capsys.readouterr().out
    assert "fits, by estimate: 0.0 of 85.5 GB a chip (1 x h100; 79.65 GiB" in printed
    written = json.loads((tmp_path / "estimate.json").read_text())
    assert written["verdict"] == printed.strip().splitlines()[-1]
    assert written["need_bytes"] > sum(written["resident"].values())
    assert estimate.run_estimate(cfg, tmp_path, None)


def test_estimate_of_the_state_by_hand():
    """fp32 parameters and both moments, 12 bytes each, over a mesh that divides them all."""
    cfg = resolved(mode="pretrain")
    one = estimate.estimate(cfg, CHIPS["h100"], 8, jnp.dtype("bfloat16"))
    alone = dataclasses.replace(cfg, mesh=MeshConfig())
    whole = estimate.estimate(alone, CHIPS["h100"], 1, jnp.dtype("bfloat16"))
    count = sum(np.prod(s.shape) for s in jax.tree.leaves(shapes.param_specs(cfg.model)))
    counters = 5 * 4  # of the state, of the schedule, of Adam
    assert whole.resident["pretrain state"] == 12 * count + counters
    assert one.resident["pretrain state"] < 0.6 * whole.resident["pretrain state"]


def test_remat_keeps_less():
    model = resolved(mode="pretrain").model
    sizes = {}
    for remat in ("none", "dots", "full"):
        cfg = resolved(mode="pretrain", model=dataclasses.replace(model, remat=remat))
        found = estimate.estimate(cfg, CHIPS["h100"], 8, jnp.dtype("bfloat16"))
        sizes[remat] = found.temporaries["in a step of pretrain"][
            f"kept of every layer (remat {remat})"
        ]
    assert sizes["none"] > sizes["dots"] > sizes["full"]


def test_a_mesh_that_does_not_fit_the_chips():
    with pytest.raises(ShardingError, match="does not multiply to the 4 devices"):
        estimate.estimate(resolved(), CHIPS["v5e"], 4, jnp.dtype("float32"))


# ----------------------------------------------------------------------- flops


def test_what_rematerialisation_repeats():
    base = resolved().model
    for remat, head_again in (("none", False), ("full", False), ("full", True), ("dots", False)):
        cfg = dataclasses.replace(base, remat=remat)
        model, executed = training_flops(cfg, 64, 16, head_again=head_again)
        forward, head = forward_flops(cfg, 64, 16), head_flops(cfg, 64)
        attention = 64 * cfg.num_layers * 4 * cfg.num_heads * cfg.head_dim * 16
        experts = 64 * cfg.num_layers * 6 * cfg.d_model * cfg.moe.top_k * cfg.moe.expert_dim
        again = {"none": 0, "full": forward - head, "dots": attention + experts}[remat]
        assert model == 3 * forward
        assert executed == pytest.approx(3 * forward + again + (head if head_again else 0))
        assert executed / model <= 4 / 3


# ------------------------------------------------------------- on this machine


@pytest.mark.slow
def test_check_on_devices_that_are_here(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compile_check, "absent_devices", lambda topology: jax.devices()[:8])
    cfg = tiny.config(mode="pretrain", mesh=MESH)
    pretrain = dataclasses.replace(cfg.pretrain, batch=8, row_length=32)
    result = compile_check.check(dataclasses.replace(cfg, pretrain=pretrain), HERE)
    step, score = result.programs
    assert (step.name, score.name) == ("pretrain step", "held-out score")
    # Donated, so all of the new state lies where the old one was.
    state = result.resident["pretrain state"]
    assert step.argument_bytes == state + result.resident["pretrain batch"]
    assert step.alias_bytes == state
    assert step.temp_bytes > 0
    # The gather of tokens in each layer, forward and backward at least.
    assert step.collectives["all-gather"].count >= 2 * cfg.model.num_layers
    assert step.precision["router"].keys() == {"f32 x f32 highest"}
    assert step.precision["lm_head"].keys() == {"f32 x f32 highest"}
    assert result.fits
    compile_report.write_report(result, tmp_path)
    printed = capsys.readouterr().out
    assert "fits: 0.0 of 1.0 GB a chip" in printed
    written = json.loads((tmp_path / "compile.json").read_text())
    assert written["programs"][0]["temp_bytes"] == step.temp_bytes
    assert written["need_bytes"] == sum(result.resident.values()) + step.temp_bytes + (
        step.output_bytes - step.alias_bytes
    )
    small = dataclasses.replace(HERE, chip=Chip("cpu", result.need - 1, "cpu"))
    assert not dataclasses.replace(result, topology=small).fits


def test_what_does_not_compile_for_want_of_memory_is_told(setup):
    report = compile_report.ProgramReport("step", error="out of memory", needed=2 * 10**9)
    result = compile_report.Result(HERE, setup, [report], {"state": 10**8}, {})
    assert not result.fits
    assert result.verdict.startswith("does not fit: step did not compile; at least 2.0 of 1.0 GB")
    for told in ("Used 17.50G of 15.75G hbm", "(17.50G) exceeds available HBM (15.75G)"):
        error = RuntimeError(f"RESOURCE_EXHAUSTED: Ran out of memory. {told}. See more")
        assert compile_check._needed(error) == int(17.5 * 2**30)
        assert compile_check._reason(error).startswith("out of memory: ")
        assert "15.75G" in compile_check._reason(error)


@pytest.mark.parametrize("precision", [None, "high", "highest"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_router_in_fewer_bits_is_an_error(precision, dtype):
    def fn(x, w):
        def body(y, _):
            with jax.named_scope("moe"), jax.named_scope("router"):
                return jnp.dot(y, w, precision=precision), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, None, length=2)[0])

    arrays = jnp.zeros((4, 8), dtype), jnp.zeros((8, 8), dtype)
    products = asked_products(jax.jit(jax.grad(fn, 1)).trace(*arrays).jaxpr)
    assert by_scope(products).keys() == {"router"}
    if (dtype, precision) == ("float32", "highest"):
        return check_exact("step", products)
    with pytest.raises(PrecisionError, match="step: .*router.*not fp32 at highest"):
        check_exact("step", products)


def test_a_bfloat16_operand_that_the_compiler_kept_is_exact():
    kept = hlo.Product("jit(f)/jvp(router)/dot_general", ("bf16", "f32"), "highest")
    check_exact("step", [kept], ("f32", "bf16"))
    with pytest.raises(PrecisionError):
        check_exact("step", [kept])


def test_weights_that_are_not_here_are_not_needed(caplog):
    cfg = tiny.config(init_from="/nowhere/model")
    with caplog.at_level(logging.INFO, logger="pr2jax"):
        assert shapes.resolved(cfg).model.vocab_size > 0
    assert "/nowhere/model is not here" in caplog.text


# ------------------------------------------------------------------- on a TPU


def main(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, "-m", "pr2jax.main", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_what_the_command_line_refuses(tmp_path):
    config = "--config=configs/grpo.py:smoke"
    done = main(config, f"--workdir={tmp_path}", "--compile_only")
    assert done.returncode == 2
    assert "--topology: --compile_only needs one" in done.stderr
    assert "Traceback" not in done.stderr


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu, the TPU compiler, is not installed (pip install "jax[tpu]")',
)


@needs_libtpu
def test_pretraining_compiled_for_a_tpu_that_is_not_here(tmp_path):
    done = main(
        "--config=configs/qwen3_30b_a3b_train.py:smoke",
        f"--workdir={tmp_path}",
        "--compile_only",
        "--topology=v5e:2x4",
        "--config.mesh.fsdp=2",
        "--config.mesh.expert=4",
    )
    assert done.returncode == 0, done.stderr
    assert "fits: " in done.stdout.splitlines()[-1]
    written = json.loads((tmp_path / "compile.json").read_text())
    assert (written["chip"], written["chips"], written["compute_dtype"]) == ("v5e", 8, "bfloat16")
    step = written["programs"][0]
    for key in ("argument_bytes", "output_bytes", "alias_bytes", "temp_bytes"):
        assert step[key] > 0
    # Sums so small may be made whole and cut (all-reduce) instead of scattered.
    assert {"all-gather"} < step["collectives"].keys()
    assert step["collectives"].keys() & {"reduce-scatter", "all-reduce"}
    assert all(kind.endswith(" highest") for kind in step["precision"]["router"])
    assert all(kind.endswith(" highest") for kind in step["precision"]["lm_head"])
    # What multiplies in bfloat16 is there too: the assertion above is not of everything.
    assert "bf16 x bf16 default" in step["precision"]["attention"]
    assert step["flops"]["executed"] <= step["flops"]["model"] * 4 / 3 * 1.2


@needs_libtpu
@pytest.mark.slow
def test_rl_compiled_for_a_tpu_that_is_not_here(tmp_path):
    done = main(
        "--config=configs/grpo.py:smoke",
        f"--workdir={tmp_path}",
        "--compile_only",
        "--topology=v5e:2x4",
        "--config.mesh.fsdp=2",
        "--config.mesh.expert=4",
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "compile.json").read_text())
    names = [program["name"] for program in written["programs"]]
    assert names == [
        "learner update",
        "scoring",
        "cast weights",
        "prefill",
        "fan-out",
        "decode, 8 steps",
    ]
    learner = written["programs"][0]
    resident = written["resident"]
    assert learner["argument_bytes"] >= resident["training state"]
    assert learner["alias_bytes"] >= 0.99 * resident["training state"]
    assert written["need_bytes"] == written["resident_bytes"] + written["largest_transient_bytes"]


@needs_libtpu
@pytest.mark.slow
def test_a_program_too_large_for_the_chip_is_told_and_the_others_compiled(tmp_path):
    done = main(
        "--config=configs/qwen3_30b_a3b_train.py:smoke",
        f"--workdir={tmp_path}",
        "--compile_only",
        "--topology=v5e:2x4",
        "--config.mesh.fsdp=8",
        "--config.model.vocab_size=4000000",
        "--config.model.d_model=1024",
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1].startswith("does not fit: ")


@needs_libtpu
def test_a_slice_that_the_compiler_does_not_know():
    with pytest.raises(ConfigError, match="libtpu has no slice v5e:3x5"):
        compile_check.absent_devices(parse_topology("v5e:3x5"))
