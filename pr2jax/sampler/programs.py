"""The sampler's compiled programs: few, counted and logged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pr2jax.core.sharding import batch_shards, param_shardings, replicated
from pr2jax.models.config import ModelConfig
from pr2jax.models.predictor import RouterFeatures
from pr2jax.models.transformer import param_specs, product_params
from pr2jax.sampler import decode
from pr2jax.sampler.sampling import Draw
from pr2jax.sampler.types import SamplerConfig

log = logging.getLogger("pr2jax")


def ladder(step: int, longest: int) -> list[int]:
    """Lengths step * (1, 2, 3, 4, 6, 8, 12, ...) below `longest`, then `longest`.

    About 2 log2(longest / step) lengths, so that many programs; reading up to the next length
    wastes at most half.
    """
    sizes, factor = [], 1
    while step * factor < longest:
        sizes.append(step * factor)
        if factor >= 2 and step * factor * 3 // 2 < longest:
            sizes.append(step * factor * 3 // 2)
        factor *= 2
    return [*sizes, longest]


class Programs:
    """`decode`'s functions, jitted for one model and one set of fixed shapes.

    State and features are donated: they are updated in place, and the old ones are gone.

    Attributes:
      capacity: S, tokens that a slot holds.
      prompt_lengths, read_lengths: the static lengths that prefill and decode are compiled for.
      prefill_rows: rows of a prefill; the config's, rounded up to a multiple of the data shards.
      stats: running counts of calls, steps, and `programs` compiled.
    """

    def __init__(self, cfg: ModelConfig, config: SamplerConfig, dtype, mesh: Mesh | None):
        self.cfg, self.config = cfg, config
        self.capacity = config.max_prompt + config.max_tokens
        self.prompt_lengths = ladder(config.bucket, config.max_prompt)
        self.read_lengths = ladder(config.bucket, self.capacity)
        shards = 1 if mesh is None else batch_shards(mesh)
        self.prefill_rows = -(-config.prefill_rows // shards) * shards
        names = ("prefills", "prefill_rows", "fan_outs", "decode_chunks", "decode_steps")
        self.stats = dict.fromkeys((*names, "requests", "tokens", "programs"), 0)
        self._seen: set[tuple] = set()
        init = partial(decode.init_slots, cfg, config.slots, self.capacity, dtype, mesh)
        self.init_slots = jax.jit(init)
        self._init_features = jax.jit(
            partial(decode.init_features, cfg, mesh=mesh), static_argnums=(0, 1)
        )
        shared = {"cfg": cfg, "dtype": dtype, "mesh": mesh}
        self._prefill = jax.jit(partial(decode.prefill, **shared))
        self._fan_out = jax.jit(partial(decode.fan_out, mesh=mesh), donate_argnums=0)
        fixed = {"steps": config.chunk, "unroll": config.unroll_layers}
        self._decode = jax.jit(
            partial(decode.decode_chunk, **fixed, **shared),
            static_argnames="read_length",
            donate_argnums=(1, 2),
        )
        whole = None if mesh is None else replicated(mesh)
        self._read_out = jax.jit(decode.read_out, out_shardings=whole)
        rules = decode.parameter_rules(cfg, mesh)
        self._placed = None if mesh is None else param_shardings(param_specs(cfg), mesh, rules)
        cast = partial(product_params, cfg=cfg, dtype=dtype)
        self._cast = jax.jit(cast, out_shardings=self._placed)
        self._dtype = dtype

    def jitted(self) -> dict[str, Callable[..., Any]]:
        """The jitted functions by name, for who compiles them without running them."""
        return {
            "init_slots": self.init_slots,
            "init_features": self._init_features,
            "cast": self._cast,
            "prefill": self._prefill,
            "fan_out": self._fan_out,
            "decode": self._decode,
        }

    def bound(self) -> int:
        """Most programs for one kind of draw, one size of features, with or without a shift."""
        return 2 * len(self.prompt_lengths) + len(self.read_lengths) + 1

    def _count(self, name: str, **signature) -> None:
        key = (name, *signature.values())
        if key in self._seen:
            return
        self._seen.add(key)
        self.stats["programs"] += 1
        told = ", ".join(f"{k} {v}" for k, v in signature.items())
        log.info(
            "sampler: program %d is %s (%s); at most %d for one kind of draw",
            self.stats["programs"],
            name,
            told,
            self.bound(),
        )

    @staticmethod
    def _kind(draw: Draw) -> dict:
        kinds = {"greedy": draw.greedy, "truncated": draw.truncate}
        told = " ".join(name for name, on in kinds.items() if on)
        return {"draw": told or "plain", "stop ids": len(draw.stop_ids)}

    def prepare(self, params):
        """What `prefill` and `decode` take for `params`: weights of products cast once, and laid
        out over the mesh for steps of few tokens, on the devices and in one program."""
        same = all(leaf.dtype == self._dtype for leaf in jax.tree.leaves(params))
        if same and self._placed is None:
            return params
        self._count("cast")
        return self._cast(params)

    def init_features(self, rows: int, capacity: int) -> RouterFeatures | None:
        """Empty features of `rows` responses, or None for no capacity."""
        return self._init_features(rows, capacity) if capacity else None

    def prefill(self, params, prompts: list[tuple[int, ...]], width: int, shift) -> decode.Prefix:
        """At most `prefill_rows` prompts, none longer than `width`."""
        tokens = np.zeros((self.prefill_rows, width), np.int32)
        lengths = np.zeros(self.prefill_rows, np.int32)
        for i, prompt in enumerate(prompts):
            tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
        self._count("prefill", width=width, shifted=shift is not None)
        self.stats["prefills"] += 1
        self.stats["prefill_rows"] += len(prompts)
        return self._prefill(params, tokens, lengths, shift)

    def fan_out(self, state, prefix, entry: decode.Admission, max_tokens: int, draw: Draw):
        """`decode.fan_out`."""
        self._count("fan_out", width=prefix.tokens.shape[1], **self._kind(draw))
        self.stats["fan_outs"] += 1
        return self._fan_out(state, prefix, entry, np.int32(max_tokens), draw)

    def decode(self, params, state, features, draw: Draw, cancel, shift, longest: int):
        """`decode.decode_chunk` reading at least `longest` of the cache; status as numpy."""
        read = next(r for r in self.read_lengths if r >= longest)
        size = (0, 0) if features is None else features.positions.shape
        self._count(
            "decode",
            reads=read,
            **self._kind(draw),
            features=f"{size[0]} x {size[1]}",
            shifted=shift is not None,
        )
        state, features, status = self._decode(
            params, state, features, draw, cancel, shift, read_length=read
        )
        status = np.asarray(status)
        self.stats["decode_chunks"] += 1
        self.stats["decode_steps"] += int(status[3, 0])
        return state, features, status

    def read_out(self, state, slots):
        """`decode.read_out`, as numpy."""
        self._count("read_out", slots=len(slots))
        return jax.device_get(self._read_out(state, slots))
