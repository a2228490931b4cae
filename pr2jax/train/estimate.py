"""What a run needs of a chip's memory, by arithmetic: for any chip, without compiling.

What stays on the chip is counted array by array, in the layouts of `core.sharding`. Temporaries
are counted by what must be there at once: gradients, what rematerialisation keeps of each layer,
one layer's own values, and a chunk of the LM head's logits. Compilers add copies of their own:
`--compile_only` says what they make of it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from pr2jax.core.device import resolve_dtype
from pr2jax.core.hardware import GB, GIB, Chip, local_chip, parse_topology
from pr2jax.core.metrics import write_json
from pr2jax.core.params import map_with_path
from pr2jax.core.sharding import batch_shards, mesh_sizes, param_shardings
from pr2jax.core.store import as_path
from pr2jax.models.attention import resolve_impl
from pr2jax.models.config import BlockSpec, ModelConfig, block_specs
from pr2jax.models.transformer import product_params
from pr2jax.replay.modes import plan
from pr2jax.sampler.decode import init_slots, parameter_rules
from pr2jax.train import shapes
from pr2jax.train.compile_report import table
from pr2jax.train.config import Config
from pr2jax.train.shapes import Setup

log = logging.getLogger("pr2jax")

ESTIMATE_JSON = "estimate.json"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes a chip. `temporaries`: of each stage of the run; they do not add up over stages."""

    chip: Chip
    chips: int
    resident: dict[str, int]
    temporaries: dict[str, dict[str, int]]

    @property
    def need(self) -> int:
        """All that is resident, and the stage with the largest temporaries."""
        largest = max((sum(t.values()) for t in self.temporaries.values()), default=0)
        return sum(self.resident.values()) + largest

    @property
    def verdict(self) -> str:
        """One line."""
        fits = "fits, by estimate" if self.need <= self.chip.memory else "does not fit, by estimate"
        told = f"{self.need / GB:.1f} of {self.chip.memory / GB:.1f} GB a chip"
        size = f"{self.chip.memory / GIB:.2f} GiB"
        return f"{fits}: {told} ({self.chips} x {self.chip.name}; {size}; GB = 1e9 bytes)"

    def text(self) -> str:
        """The table, and the verdict as its last line."""
        gb = lambda size: f"{size / GB:.3f}"
        rows = [["resident, GB a chip", ""]]
        rows += [[name, gb(size)] for name, size in self.resident.items()]
        for stage, parts in self.temporaries.items():
            rows += [["", ""], [f"temporaries while {stage}", gb(sum(parts.values()))]]
            rows += [[f"  {name}", gb(size)] for name, size in parts.items()]
        return f"{table(rows)}\n\n{self.verdict}"


def _size(dtype: Any) -> int:
    return jnp.dtype(dtype).itemsize


def _attention_values(model: ModelConfig) -> tuple[int, int]:
    """Numbers a token in queries and outputs, and in keys and values."""
    heads, out = model.num_heads, model.head_dim if model.mla is None else model.mla.v_head_dim
    kv_heads = model.num_kv_heads if model.mla is None else heads
    return heads * (model.qk_dim + out), kv_heads * (model.qk_dim + out)


def _layer_values(model: ModelConfig, block: BlockSpec, length: int, impl: str) -> int:
    """Numbers a token that one layer's backward pass reads."""
    count = 4 * model.d_model + sum(_attention_values(model))
    if impl == "einsum":
        count += 2 * model.num_heads * length
    if not block.moe:
        return count + 3 * model.dense_dim
    moe = model.moe
    return count + moe.top_k * (2 * model.d_model + 3 * moe.expert_dim) + 3 * moe.shared_dim


def _layer_weights(setup: Setup) -> int:
    """Bytes of one layer's weights as its products take them (the largest layer's): whole but for
    the expert and tensor axes."""
    mesh, layers = setup.mesh, collections.Counter()

    def count(path, spec):
        segment, _, rest = path.partition("/")
        if segment.startswith("segment_"):
            shared = mesh.shape["expert"] if "/moe/experts/" in path else 1
            layers[segment, rest.split("/")[0]] += math.prod(spec.shape[1:]) // shared

    map_with_path(count, setup.specs)
    return max(layers.values()) // mesh.shape["tensor"] * _size(setup.dtype)


def _backward(
    setup: Setup, chip: Chip, rows: int, length: int, extra_gradients: int
) -> dict[str, int]:
    """Temporaries of a forward and backward pass over `rows` rows, and of the update."""
    model, mesh, item = setup.cfg.model, setup.mesh, _size(setup.dtype)
    tokens = -(-rows // batch_shards(mesh)) * length
    impl = resolve_impl(model, chip.platform, length, setup.dtype)
    blocks = block_specs(model)
    per_layer = [_layer_values(model, b, length, impl) * tokens * item for b in blocks]
    kept = sum(per_layer)
    if model.remat == "full":
        kept = len(blocks) * tokens * model.d_model * item
    elif model.remat == "dots":  # products outside attention and the experts
        width = 2 * model.d_model + sum(_attention_values(model))
        kept = len(blocks) * tokens * width * item
    gradients = shapes.device_bytes(setup.params())
    chunk = min(model.logprob_chunk, tokens)
    vocab = model.vocab_size // mesh.shape["tensor"]
    head = vocab * model.d_model * 4 * (1 if mesh.size == 1 else 2)
    return {
        "gradients": gradients * (1 + extra_gradients),
        f"kept of every layer (remat {model.remat})": kept,
        "one layer's values and their gradients": 2 * max(per_layer),
        "one layer's weights and their gradients": 3 * _layer_weights(setup),
        "log-probs: a chunk of logits and its gradient": 2 * chunk * vocab * 4,
        "log-probs: the head and its gradient": head,
    }


def _forward(setup: Setup, rows: int, length: int, logits: int) -> dict[str, int]:
    """Temporaries of a forward over `rows` rows that makes `logits` tokens' logits at once."""
    model = setup.cfg.model
    tokens = -(-rows // batch_shards(setup.mesh)) * length
    blocks = block_specs(model)
    values = max(_layer_values(model, b, length, "einsum") for b in blocks) * tokens
    vocab = model.vocab_size // setup.mesh.shape["tensor"]
    return {
        "one layer's values": values * _size(setup.dtype),
        "one layer's weights": _layer_weights(setup),
        "logits, scaled and drawn from": 3 * logits * vocab * 4,
    }


def sampler_weights(setup: Setup) -> Any:
    """The policy as the sampler holds it: cast, and in its own layout."""
    model = setup.cfg.model
    cast = functools.partial(product_params, cfg=model, dtype=setup.dtype)
    rules = parameter_rules(model, setup.mesh)
    layout = param_shardings(setup.specs, setup.mesh, rules)
    place = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    return jax.tree.map(place, jax.eval_shape(cast, setup.params()), layout)


def sampler_slots(setup: Setup) -> Any:
    """The sampler's cache, tokens and routes."""
    cfg = setup.cfg
    capacity = cfg.sampler.max_prompt + cfg.sampler.max_tokens
    make = lambda: init_slots(cfg.model, cfg.sampler.slots, capacity, setup.dtype, None)
    place = lambda a: shapes.by_rows(a, setup.mesh, 1 if a.ndim >= 4 else 0)
    return jax.tree.map(place, jax.eval_shape(make))


def _sampler(setup: Setup, found: Estimate) -> None:
    cfg, shards = setup.cfg, batch_shards(setup.mesh)
    found.resident["sampler weights"] = shapes.device_bytes(sampler_weights(setup))
    slots = shapes.device_bytes(sampler_slots(setup))
    found.resident["sampler cache and slots"] = slots
    rows = -(-cfg.sampler.prefill_rows // shards) * shards
    share = rows * cfg.sampler.max_prompt / cfg.sampler.slots
    share /= cfg.sampler.max_prompt + cfg.sampler.max_tokens
    found.resident["prompts prefilled"] = int(slots * share)
    own = rows // shards
    found.temporaries["prefilling"] = _forward(setup, rows, cfg.sampler.max_prompt, own)
    drawn = -(-cfg.sampler.slots // shards)
    found.temporaries["decoding"] = _forward(setup, cfg.sampler.slots, 1, drawn)


def _learner(setup: Setup, found: Estimate) -> None:
    cfg = setup.cfg
    state = shapes.learner_state(setup)
    found.resident["training state"] = shapes.device_bytes(state)
    if cfg.rl.kl_coef:
        found.resident["reference policy"] = shapes.device_bytes(state.params)
    found.resident.update(shapes.learner_buffers(setup))
    extra = 1 if cfg.rl.num_micro > 1 else 0
    length = shapes.row_length(cfg)
    found.temporaries["learning"] = _backward(setup, found.chip, cfg.rl.micro_batch, length, extra)
    if plan(cfg.replay).features and cfg.replay.features == "recorded":
        kept = shapes.features(setup, cfg.rl.rows)
        found.resident["router features, recorded"] = shapes.device_bytes(kept)


def estimate(cfg: Config, chip: Chip, chips: int, dtype: Any) -> Estimate:
    """The need of a run with a `shapes.resolved` config on `chips` chips.

    Raises ConfigError or ShardingError where the mesh does not fit them.
    """
    sizes = mesh_sizes(cfg.mesh, chips)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    setup = shapes.make_setup(cfg, mesh, dtype)
    found = Estimate(chip, chips, {}, {})
    for name, part in (("pretrain", cfg.pretrain), ("sft", cfg.sft)):
        if cfg.mode != name and not (cfg.mode == "sft_then_rl" and name == "sft"):
            continue
        state = shapes.training_state(setup, part.optim)
        found.resident[f"{name} state"] = shapes.device_bytes(state)
        batch = shapes.packed_rows(setup, part.batch, part.row_length)
        parts = cfg.pretrain.accumulate if name == "pretrain" else 1
        found.resident[f"{name} batch"] = shapes.device_bytes(batch)
        found.temporaries[f"in a step of {name}"] = _backward(
            setup, chip, part.batch // parts, part.row_length, 0
        )
    if cfg.mode in ("rl", "sft_then_rl", "study"):
        _learner(setup, found)
    if cfg.mode == "generate":
        found.resident["parameters"] = shapes.device_bytes(setup.params())
    if cfg.mode != "pretrain":
        _sampler(setup, found)
    return found


def run_estimate(cfg: Config, workdir: str | os.PathLike, topology: str | None) -> bool:
    """Prints the estimate for `topology` (None: this machine) and writes WORKDIR/estimate.json:
    the fields of `Estimate`, `need_bytes` and `verdict`. Returns whether it fits."""
    cfg = shapes.resolved(cfg)
    if topology:
        slice_ = parse_topology(topology)
        chip, chips = slice_.chip, slice_.size
        # All chips that are known by name multiply bfloat16 fast.
        name = "bfloat16" if cfg.compute_dtype == "auto" else cfg.compute_dtype
    else:
        (chip, chips), name = local_chip(), cfg.compute_dtype
    dtype, reason = resolve_dtype(name)
    log.info("compute dtype: %s", reason)
    found = estimate(cfg, chip, chips, dtype)
    extra = {"need_bytes": found.need, "verdict": found.verdict}
    write_json(as_path(workdir) / ESTIMATE_JSON, dataclasses.asdict(found) | extra)
    print(found.text(), flush=True)
    return found.need <= chip.memory
