"""Sparse upcycling: a dense model becomes a Mixture-of-Experts that computes the same function.

Komatsuzaki et al. 2023 (2212.05055): every expert starts as a copy of the dense feed-forward, the
router at random, and everything else as it was.  He et al. 2024 (2410.07524): with granularity G
each copy is cut into G slices of its hidden units that are experts of their own, G times as many
are used, and a token at first uses whole copies ("virtual groups"), whose outputs must be scaled.

When is it exact?  The gates of the used experts are normalised, they add up to 1.
  granularity 1: copies c with gates g_c give sum_c g_c FFN(x) = FFN(x), whatever the router chose:
    exact up to the rounding of the sum.
  granularity G > 1: slices s of the hidden units give FFN(x) = sum_s FFN_s(x).  The router's
    columns are the same for all slices of a copy, so their logits tie, top-k takes k whole copies,
    each slice's gate is g_c / G, and the down-projections are multiplied by G:
    sum_c sum_s (g_c / G) G FFN_s(x) = FFN(x).  Exact up to rounding (with G a power of two the
    scale itself rounds nothing) while whole copies are used: at first, but for a token whose k-th
    and next copies' logits differ by less than their rounding, where slices of both may be taken.
    Training parts the columns of a copy, and with that the slices.
  noise > 0: not exact; the copies are perturbed so that they part sooner.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from pr2jax.core import rng
from pr2jax.core.config import ConfigError
from pr2jax.core.params import Tree
from pr2jax.models.config import ModelConfig, MoEConfig, num_moe_layers, segments


@dataclass(frozen=True)
class UpcycleConfig:
    """How a dense model becomes sparse.

    Attributes:
      experts: copies of each feed-forward (0: the model stays as it is).
      top_k: copies that a token uses.
      granularity: slices that each copy is cut into; the model has experts * granularity experts
        of which a token uses top_k * granularity.
      noise: standard deviation of what is added to every expert's weights, as a share of the
        root mean square of the weights it is added to (0: exact copies).
      every: layer i becomes sparse where i + 1 is a multiple of it.
      router_stddev: of the router's random kernel.
    """

    experts: int = 0
    top_k: int = 2
    granularity: int = 1
    noise: float = 0.0
    every: int = 1
    router_stddev: float = 0.02

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        if self.experts < 0:
            raise ConfigError(f"experts: must be >= 0, got {self.experts}")
        if self.experts and not 1 <= self.top_k <= self.experts:
            raise ConfigError(
                f"top_k: must lie between 1 and experts={self.experts}, got {self.top_k}"
            )
        for key in ("granularity", "every"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: must be at least 1, got {getattr(self, key)}")
        for key in ("noise", "router_stddev"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key}: must be >= 0, got {getattr(self, key)}")


def upcycled_config(cfg: ModelConfig, options: UpcycleConfig) -> ModelConfig:
    """The sparse model that `upcycle` makes of a dense one.

    Raises ConfigError("key: why"): it is sparse already, its feed-forward cannot be cut so, or no
    layer would become sparse.
    """
    if num_moe_layers(cfg):
        raise ConfigError("experts: the model to upcycle has experts already; set it to 0")
    if cfg.dense_dim % options.granularity:
        raise ConfigError(
            f"granularity: {options.granularity} does not divide the feed-forward's width, "
            f"{cfg.dense_dim}"
        )
    moe = MoEConfig(
        num_experts=options.experts * options.granularity,
        top_k=options.top_k * options.granularity,
        expert_dim=cfg.dense_dim // options.granularity,
        normalize="post",
    )
    wide = dataclasses.replace(
        cfg, moe=moe, first_dense=0, moe_every=options.every, dense_layers=()
    )
    if not num_moe_layers(wide):
        raise ConfigError(f"every: {options.every}, and the model has {cfg.num_layers} layers")
    return wide


def upcycle(
    params: Tree,
    cfg: ModelConfig,
    options: UpcycleConfig,
    key: Key[Array, ""],
    *,
    predictor: bool = True,
) -> Tree:
    """Parameters of `upcycled_config(cfg, options)` out of those of the dense `cfg`.

    A pure function of arrays, to be run under jit (with out_shardings, on a mesh). Expert
    c * granularity + s is slice s of copy c. The route predictor, where there is one, is zero.

    Raises ConfigError as `upcycled_config`.
    """
    wide = upcycled_config(cfg, options)
    layers = _in_depth_order(params, cfg)
    make = jax.vmap(lambda layer, n: _sparse(layer, options, rng.named(key, "layer", n), predictor))
    out = {name: params[name] for name in params if not name.startswith("segment_")}
    for i, segment in enumerate(segments(wide)):
        step, blocks = len(segment.pattern), {}
        for j, spec in enumerate(segment.pattern):
            first = segment.first_layer + j
            numbers = slice(first, first + step * (segment.repeats - 1) + 1, step)
            block = jax.tree.map(lambda a: a[numbers], layers)  # noqa: B023
            if spec.moe:
                block = make(block, jnp.arange(cfg.num_layers)[numbers])
            blocks[f"block_{j}"] = block
        out[f"segment_{i}"] = blocks
    return out


def _in_depth_order(params: Tree, cfg: ModelConfig) -> Tree:
    """The layers of a dense model, stacked: all alike but for their windows."""
    parts = []
    for i, segment in enumerate(segments(cfg)):
        blocks = [params[f"segment_{i}"][f"block_{j}"] for j in range(len(segment.pattern))]
        interleave = lambda *a: jnp.stack(a, axis=1).reshape(-1, *a[0].shape[1:])
        parts.append(jax.tree.map(interleave, *blocks))
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


def _sparse(layer: Tree, options: UpcycleConfig, key: Key[Array, ""], predictor: bool) -> Tree:
    """One dense layer with its feed-forward as experts."""
    ffn, slices = layer["ffn"], options.granularity
    width = ffn["gate"].shape[0]
    cut = lambda w: w.reshape(width, slices, -1).swapaxes(0, 1)  # [D, F] -> [G, D, F / G]
    experts = {
        "gate": cut(ffn["gate"]),
        "up": cut(ffn["up"]),
        "down": ffn["down"].reshape(slices, -1, width) * slices,
    }
    experts = {
        name: _copies(w, options, rng.named(key, "noise", name)) for name, w in experts.items()
    }
    shape = (width, options.experts)
    columns = options.router_stddev * jax.random.normal(rng.named(key, "router"), shape)
    kernel = jnp.repeat(columns, slices, axis=1)
    moe = {"router": {"kernel": kernel}, "experts": experts}
    if predictor:
        moe["predictor"] = {"kernel": jnp.zeros_like(kernel)}
    return {name: leaf for name, leaf in layer.items() if name != "ffn"} | {"moe": moe}


def _copies(
    slices: Float[Array, "G A B"], options: UpcycleConfig, key: Key[Array, ""]
) -> Float[Array, "E A B"]:
    """All experts' weights out of one copy's slices."""
    whole = jnp.tile(slices, (options.experts, 1, 1))
    if not options.noise:
        return whole
    scale = options.noise * jnp.sqrt(jnp.mean(jnp.square(slices)))
    return whole + scale * jax.random.normal(key, whole.shape, whole.dtype)
