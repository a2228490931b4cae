"""A run's programs compiled for a TPU slice that is not there, and whether they fit it.

`--compile_only --topology=v5p:4x4x2`: with libtpu installed, this CPU runs the TPU's own compiler
on abstract arguments laid out over the slice. What comes out are sizes, precisions and collectives
of the very programs that the run would start, and never a time.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pr2jax.core import hlo
from pr2jax.core.device import resolve_dtype
from pr2jax.core.hardware import GB, Topology, absent_devices, parse_topology
from pr2jax.core.optim import build_optimizer
from pr2jax.core.sharding import ShardingError, make_mesh
from pr2jax.models.attention import resolve_impl
from pr2jax.models.config import num_moe_layers
from pr2jax.models.experts import BY_PLATFORM
from pr2jax.models.flops import forward_flops, head_flops, training_flops
from pr2jax.replay.modes import plan
from pr2jax.rl.scoring import make_scorer
from pr2jax.rl.types import policy_optim
from pr2jax.rl.update import make_mini_step
from pr2jax.sampler.decode import Admission
from pr2jax.sampler.programs import Programs
from pr2jax.sampler.sampling import make_draw
from pr2jax.sampler.schedule import MOVE_ROWS
from pr2jax.train import shapes
from pr2jax.train.compile_report import ProgramReport, Result, write_report
from pr2jax.train.config import Config
from pr2jax.train.precision import asked_products, by_scope, check_exact
from pr2jax.train.shapes import Setup
from pr2jax.train.supervised import make_packed_score, make_packed_step

log = logging.getLogger("pr2jax")


class Check:
    """Compiles programs one after the other; what one gives is what the next is given."""

    def __init__(self, setup: Setup, topology: Topology):
        self.setup, self.topology = setup, topology
        self.reports: list[ProgramReport] = []
        self.resident: dict[str, int] = {}
        self.kernels: dict[str, str] = {}

    # ----------------------------------------------------------------- one

    def compile(
        self,
        name: str,
        jitted: Callable[..., Any],
        *args: Any,
        flops: tuple[float, float] = (0.0, 0.0),
        unknown: int = 1,
        kept: bool = False,
        **static: Any,
    ) -> Any:
        """Compiles `jitted(*args, **static)` and reports it; returns its abstract outputs, with
        the compiler's layouts, or None where it did not compile for want of memory."""
        start = time.monotonic()
        traced = jitted.trace(*args, **static)
        check_exact(name, asked_products(traced.jaxpr))
        lowered = traced.lower()
        try:
            compiled = lowered.compile()
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            self._report(ProgramReport(name, error=_reason(error), needed=_needed(error)))
            return None
        memory = compiled.memory_analysis()
        program = hlo.parse(compiled.as_text())
        products = hlo.products(program)
        check_exact(name, products, ("f32", "bf16"))
        self._report(
            ProgramReport(
                name,
                argument_bytes=memory.argument_size_in_bytes,
                output_bytes=memory.output_size_in_bytes,
                alias_bytes=memory.alias_size_in_bytes,
                temp_bytes=memory.temp_size_in_bytes,
                collectives=hlo.collectives(program, unknown),
                flops={"model": flops[0], "executed": flops[1]},
                precision=by_scope(products),
                kernels=hlo.kernels(program, unknown),
                untold_loops=tuple(hlo.executions(program, unknown)[1]),
                kept=kept,
                seconds=time.monotonic() - start,
            )
        )
        place = lambda out, sharding: jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=sharding)
        return jax.tree.map(place, lowered.out_info, compiled.output_shardings)

    def _report(self, report: ProgramReport) -> None:
        self.reports.append(report)
        said = report.error or (
            f"{report.argument_bytes / GB:.3f} GB arguments + "
            f"{(report.output_bytes - report.alias_bytes) / GB:.3f} new outputs + "
            f"{report.temp_bytes / GB:.3f} temporaries a chip, in {report.seconds:.0f} s"
        )
        log.info("%s: %s", report.name, said)

    # -------------------------------------------------------------- stages

    def training(self, name: str, cfg: Any, score: bool, accumulate: int = 1) -> None:
        """The step of pre-training or SFT (`cfg`), and the scoring of held-out rows."""
        setup, model = self.setup, self.setup.cfg.model
        optimizer = build_optimizer(cfg.optim, setup.specs)
        state = shapes.training_state(setup, cfg.optim)
        batch = shapes.packed_rows(setup, cfg.batch, cfg.row_length)
        self.resident[f"{name} state"] = shapes.device_bytes(state)
        self.resident[f"{name} batch"] = shapes.device_bytes(batch)
        fixed = {"dtype": setup.dtype, "mesh": setup.mesh}
        tokens = cfg.batch * cfg.row_length
        self.compile(
            f"{name} step",
            make_packed_step(model, cfg, optimizer, accumulate=accumulate, **fixed),
            state,
            batch,
            flops=self._training_flops(tokens, cfg.row_length),
        )
        if score:
            batch = shapes.packed_rows(setup, cfg.batch // accumulate, cfg.row_length)
            forward = forward_flops(model, tokens // accumulate, cfg.row_length / 2)
            scorer = make_packed_score(model, **fixed)
            self.compile("held-out score", scorer, state.params, batch, flops=(forward, forward))
        self._name_kernels(name, cfg.row_length)

    def learner(self) -> None:
        """A mini-step of RL, and the scoring pass where the run may take one."""
        setup, cfg = self.setup, self.setup.cfg
        optimizer = build_optimizer(policy_optim(cfg.rl.optim, cfg.model), setup.specs)
        fixed = {"dtype": setup.dtype, "mesh": setup.mesh}
        state = shapes.learner_state(setup)
        mini = shapes.learner_batch(setup, cfg.rl.mini_rows)
        length = shapes.row_length(cfg)
        self.resident["training state"] = shapes.device_bytes(state)
        if cfg.rl.kl_coef:
            self.resident["reference policy"] = shapes.device_bytes(state.params)
        self.resident |= shapes.learner_buffers(setup)
        step = make_mini_step(cfg.model, cfg.rl, cfg.replay, optimizer, **fixed)
        flops = self._training_flops(cfg.rl.mini_rows * length, length)
        micros = cfg.rl.num_micro
        self.compile("learner update", step, state, mini, True, flops=flops, unknown=micros)
        reason = scores_why(cfg)
        if reason:
            log.info("scoring pass: %s", reason)
            batch = shapes.learner_batch(setup, cfg.rl.rows, with_features=False)
            where = None
            if plan(cfg.replay).features and cfg.replay.features == "recomputed":
                found = shapes.learner_batch(setup, cfg.rl.rows).features
                where = (found.positions, found.mask)
            if plan(cfg.replay).recorder == "scoring":
                batch = batch.replace(routes=None)
            scorer = make_scorer(cfg.model, temperature=cfg.rl.sampling.temperature, **fixed)
            forward = forward_flops(cfg.model, cfg.rl.rows * length, length / 2)
            self.compile("scoring", scorer, state.params, batch, where, flops=(forward, forward))
        self._name_kernels("learner", length)

    def sampler(self, sampling, feature_rows: int) -> None:
        """Weights cast and laid out for decoding, prefill, fan-out and a chunk of decode steps,
        each at its longest; router features of `feature_rows` responses recorded (0: none)."""
        setup, cfg = self.setup, self.setup.cfg
        model, mesh = cfg.model, setup.mesh
        programs = Programs(model, cfg.sampler, setup.dtype, mesh)
        jitted = programs.jitted()
        params = self.compile("cast weights", jitted["cast"], setup.params(), kept=True)
        if params is None:
            return
        state = self._laid_out(jitted["init_slots"])
        features = None
        if feature_rows:
            features = self._laid_out(
                jitted["init_features"], feature_rows, shapes.feature_places(cfg)
            )
        shift = shapes.shift(setup) if feature_rows else None
        width, slots = cfg.sampler.max_prompt, cfg.sampler.slots
        small = lambda *shape: np.zeros(shape, np.int32)
        prompts = shapes.whole(
            (small(programs.prefill_rows, width), small(programs.prefill_rows)), mesh
        )
        rows, tokens = programs.prefill_rows, programs.prefill_rows * width
        prefill = [
            forward_flops(model, tokens, seen) - head_flops(model, tokens - rows)
            for seen in (width / 2, width)
        ]
        prefix = self.compile(
            "prefill", jitted["prefill"], params, *prompts, shift, flops=tuple(prefill), kept=True
        )
        draw = shapes.whole(make_draw(sampling), mesh)
        moved = min(MOVE_ROWS, slots)
        keys = np.zeros((moved, 2), np.uint32)
        ids = np.zeros(moved, np.uint32)
        entry = shapes.whole(Admission(small(moved), small(moved), keys, ids, small(moved)), mesh)
        if prefix is not None:
            limit = shapes.whole(np.int32(0), mesh)
            self.compile("fan-out", jitted["fan_out"], state, prefix, entry, limit, draw)
            self.resident["prompts prefilled"] = shapes.device_bytes(prefix)
        cancel = shapes.whole(np.zeros(slots, bool), mesh)
        longest = programs.read_lengths[-1]
        decode = forward_flops(model, slots * cfg.sampler.chunk, longest)
        self.compile(
            f"decode, {cfg.sampler.chunk} steps",
            jitted["decode"],
            params,
            state,
            features,
            draw,
            cancel,
            shift,
            flops=(decode, decode),
            unknown=cfg.sampler.chunk,
            read_length=longest,
        )
        self.resident["sampler weights"] = shapes.device_bytes(params)
        self.resident["sampler cache and slots"] = shapes.device_bytes(state)
        if features is not None:
            self.resident["router features, recorded"] = shapes.device_bytes(features)
        self.kernels["prefill and decode"] = f"attention einsum on the cache, {self._experts()}"

    # -------------------------------------------------------------- details

    def _laid_out(self, jitted: Callable[..., Any], *static: Any) -> Any:
        """What a program without arguments gives, as the compiler lays it out."""
        if self.setup.mesh.size == 1:
            return shapes.whole(jax.eval_shape(lambda: jitted(*static)), self.setup.mesh)
        lowered = jitted.lower(*static)
        place = lambda out, sharding: jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=sharding)
        return jax.tree.map(place, lowered.out_info, lowered.compile().output_shardings)

    def _attention(self, length: int) -> str:
        platform = self.setup.mesh.devices.flat[0].platform
        return resolve_impl(self.setup.cfg.model, platform, length, self.setup.dtype)

    def _experts(self) -> str:
        moe = self.setup.cfg.model.moe
        if not num_moe_layers(self.setup.cfg.model):
            return "no experts"
        platform = self.setup.mesh.devices.flat[0].platform
        impl = BY_PLATFORM[platform] if moe.impl == "auto" else moe.impl
        return f"experts {impl}, over {self.setup.mesh.shape['expert']} devices"

    def _name_kernels(self, name: str, length: int) -> None:
        self.kernels[name] = f"attention {self._attention(length)}, {self._experts()}"

    def _training_flops(self, tokens: int, length: int) -> tuple[float, float]:
        model, chips = self.setup.cfg.model, self.topology.size
        # What the mask hides is left out by the kernels that know it, block by block.
        sparse = self._attention(length) in ("splash", "blocked", "cudnn")
        return training_flops(
            model,
            tokens,
            length / 2,
            computed_context=length / 2 if sparse else length,
            head_again=tokens / chips > model.logprob_chunk,
        )


def scores_why(cfg: Config) -> str:
    """Why the run may take a scoring pass; "" where it never does."""
    todo = plan(cfg.replay)
    if todo.recorder == "scoring":
        return "r2 records its routes there"
    if todo.features and cfg.replay.features == "recomputed":
        return "features are recomputed there"
    if cfg.rl.kl_coef:
        return "the reference policy's log-probs"
    if cfg.rl.scoring_pass == "never":
        return ""
    return f"rl.scoring_pass={cfg.rl.scoring_pass}"


# How compilers say that a program needs more than there is: older and newer ones.
_TOO_LARGE = (
    r"Used ([\d.]+)([KMGT]?) of [\d.]+\w? \w+",
    r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \([\d.]+\w\)",
)


def _reason(error: Exception) -> str:
    text = str(error)
    told = next((found for p in _TOO_LARGE if (found := re.search(p, text))), None)
    return f"out of memory: {told[0] if told else ' '.join(text.split())[:200]}"


def _needed(error: Exception) -> int:
    """Bytes that the compiler says it would need; 0 where it does not say."""
    told = next((found for p in _TOO_LARGE if (found := re.search(p, str(error)))), None)
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return int(float(told[1]) * units[told[2]]) if told else 0


def check(cfg: Config, topology: Topology) -> Result:
    """Compiles the programs of `cfg` for `topology`.

    Raises ConfigError or ShardingError where libtpu is missing, the slice unknown, or the mesh
    does not fit it; PrecisionError.
    """
    devices = absent_devices(topology)
    cfg = shapes.resolved(cfg)
    try:
        mesh = make_mesh(cfg.mesh, devices)
    except (ShardingError, NotImplementedError, ValueError) as error:
        raise ShardingError(f"--topology: {topology.name}: {error}") from None
    dtype, reason = resolve_dtype(cfg.compute_dtype, devices[0])
    log.info("compiling for %d x %s; compute dtype %s", *(len(devices), topology.chip.name, reason))
    one = Check(shapes.make_setup(cfg, mesh, dtype), topology)
    rl = cfg.mode in ("rl", "sft_then_rl", "study")
    if cfg.mode == "pretrain":
        one.training("pretrain", cfg.pretrain, score=True, accumulate=cfg.pretrain.accumulate)
    if cfg.mode in ("sft", "sft_then_rl"):
        one.training("sft", cfg.sft, score=False)
    if rl:
        one.learner()
        recorded = cfg.replay.features == "recorded" and shapes.feature_places(cfg)
        one.sampler(cfg.rl.sampling, cfg.rl.rows if recorded else 0)
    elif cfg.mode != "pretrain":
        if cfg.mode == "generate":
            one.resident["parameters"] = shapes.device_bytes(one.setup.params())
        one.sampler(cfg.generate.sampling if cfg.mode == "generate" else cfg.eval.sampling, 0)
    return Result(topology, one.setup, one.reports, one.resident, one.kernels)


def run_compile_check(cfg: Config, workdir: str | os.PathLike, topology: str) -> bool:
    """Prints what was found and writes WORKDIR/compile.json; whether the run fits."""
    result = check(cfg, parse_topology(topology))
    write_report(result, workdir)
    return result.fits
