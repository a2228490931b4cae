"""What a decoder-only transformer is, as frozen dataclasses; how its layers fold into segments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pr2jax.core.config import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies.

    `linear` divides positions by `factor` (Chen et al. 2023); `llama3` interpolates the low
    frequencies only (Llama 3.1); `yarn` blends by wavelength and scales attention by
    `attention_factor` (Peng et al. 2023), 0 meaning 0.1 ln(factor) + 1.

    Attributes:
      kind: which; `none` leaves the frequencies.
      original_max_position: positions that the model was trained on before.
      low_freq_factor, high_freq_factor: of llama3: wavelengths above original_max_position over the
        first are divided, below it over the second are kept, between them blended.
      beta_fast, beta_slow: of yarn: turns within the trained positions from which on a frequency is
        kept, and up to which it is divided.
      truncate: of yarn: the bounds of the blend are rounded to whole dimensions.
    """

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_max_position: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        if self.kind != "none" and self.factor < 1.0:
            raise ConfigError(f"factor: must be >= 1 when kind is {self.kind!r}, got {self.factor}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError("high_freq_factor: must be above low_freq_factor")


@dataclass(frozen=True)
class MoEConfig:
    """A Mixture-of-Experts feed-forward layer and its router.

    Scores are `softmax` over all experts or `sigmoid` of each logit; the chosen scores are used
    as they are (`normalize="none"`), or divided by their sum (`"post"`); `"pre"` takes the
    softmax over the chosen logits only. Gates are multiplied by `routed_scaling`.
    `selection_bias` adds a bias to the scores for selection alone (auxiliary-loss-free
    balancing); `num_groups`/`top_groups` restrict selection to the best groups of experts
    (DeepSeek-V3). `shared_dim` is the hidden width of the always-on shared expert (0: none).
    `predictor` adds the zero-initialised route predictor W_p (PR2, Eq. 4). `masked` of the last
    experts have weights but take no part: no selection, softmax, loss or statistic knows them
    (emo/expansion.py). `impl` is the grouped matmul (`auto`: by platform, experts.py) and
    `block_size` its rows a block (0: by the load).

    Attributes:
      num_experts: E, of each MoE layer.
      top_k: k, experts that a token uses.
      expert_dim: hidden width of an expert.
      score: what the router makes of its logits.
    """

    num_experts: int = 16
    top_k: int = 2
    expert_dim: int = 128
    shared_dim: int = 0
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: Literal["none", "pre", "post"] = "post"
    selection_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    routed_scaling: float = 1.0
    predictor: bool = True
    masked: int = 0
    impl: Literal["auto", "blocks", "batched", "ragged", "dense"] = "auto"
    block_size: int = 0

    @property
    def live(self) -> int:
        """Experts that the router knows: the first ones."""
        return self.num_experts - self.masked

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"top_k: must lie between 1 and num_experts={self.num_experts}, got {self.top_k}"
            )
        if not 0 <= self.masked <= self.num_experts - self.top_k:
            raise ConfigError(
                f"masked: {self.masked} of {self.num_experts} experts leave fewer than "
                f"top_k={self.top_k}"
            )
        if self.masked and self.num_groups > 1:
            raise ConfigError("masked: groups of experts cannot be masked in part")
        if self.num_experts % self.num_groups:
            raise ConfigError(
                f"num_groups: {self.num_groups} does not divide num_experts={self.num_experts}"
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ConfigError(f"top_groups: must lie between 1 and num_groups={self.num_groups}")
        if self.top_groups * (self.num_experts // self.num_groups) < self.top_k:
            raise ConfigError("top_groups: the chosen groups hold fewer experts than top_k")
        if self.score == "sigmoid" and self.normalize == "pre":
            raise ConfigError("normalize: 'pre' is a softmax over chosen logits; score is sigmoid")


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, Section 2.1).

    Keys and values are expanded from one latent of `kv_lora_rank` a position, which is what the
    cache holds, beside one rotated key of `qk_rope_head_dim` that all heads share. A head's query
    and key are `qk_nope_head_dim` not rotated, then the rotated part; its value is `v_head_dim`.
    `q_lora_rank` is the queries' own latent (0: projected directly). `norm_eps` is that of the
    latents' norms. With yarn, the softmax scale is also multiplied by
    (0.1 yarn_mscale_all_dim ln(factor) + 1)^2, as DeepSeek-V3's is (0: not).
    """

    kv_lora_rank: int = 64
    q_lora_rank: int = 0
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    norm_eps: float = 1e-6
    yarn_mscale_all_dim: float = 0.0

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query, and of its key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.q_lora_rank < 0:
            raise ConfigError(f"q_lora_rank: must be >= 0, got {self.q_lora_rank}")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                "qk_rope_head_dim: rotary embeddings need an even width, "
                f"got {self.qk_rope_head_dim}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, dense or MoE.

    Layer i is MoE when `moe` is set, i >= `first_dense`, i is not in `dense_layers`, and
    (i + 1) is a multiple of `moe_every`; else it is a dense SwiGLU of width `dense_dim`.
    `sliding_window` (tokens; 0: full attention) applies to layer i when
    `window_pattern[i % len(window_pattern)]`. `qk_norm` is an RMSNorm of queries and keys per
    head (`head`, Qwen3) or over all heads (`full`, OLMoE). `clip_qkv` clamps the projections
    (0: off). With `mla`, attention is over latents: `num_kv_heads` and `head_dim` are not read,
    `attention_bias` is that of the projections into latents, and the norms are its own
    (`qk_norm="none"`).

    Attributes:
      vocab_size: embeddings (0 in a run: as many as the tokenizer has ids).
      d_model: width of the residual stream.
      num_layers, num_heads, num_kv_heads, head_dim: layers, query heads, key and value heads, and
        their width.
      attention_bias, attention_out_bias: biases of the projections to queries, keys and values, and
        of the one back.
      rope_theta: base of the rotary frequencies.
      norm_eps: of every RMSNorm.
      tie_embeddings: the head is the embedding's table.
      init_stddev: of random embeddings.
      attention_impl: kernel of full rows (`auto`: by platform and shape, attention.py).
      remat: what the backward pass computes again instead of keeping: nothing, whole layers, or all
        but the products.
      scan_layers: layers as one scanned program (compiles faster), or as straight code.
      logprob_chunk: tokens whose logits are in memory at a time.
    """

    vocab_size: int = 256
    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    dense_dim: int = 256
    moe: MoEConfig | None = field(default_factory=MoEConfig)
    mla: MLAConfig | None = None
    first_dense: int = 0
    moe_every: int = 1
    dense_layers: tuple[int, ...] = ()
    qk_norm: Literal["none", "head", "full"] = "head"
    attention_bias: bool = False
    attention_out_bias: bool = False
    clip_qkv: float = 0.0
    sliding_window: int = 0
    window_pattern: tuple[bool, ...] = (True,)
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    init_stddev: float = 0.02
    attention_impl: Literal["auto", "einsum", "blocked", "splash", "cudnn"] = "auto"
    remat: Literal["none", "full", "dots"] = "none"
    scan_layers: bool = True
    logprob_chunk: int = 4096

    @property
    def qk_dim(self) -> int:
        """Width of a head's query and key."""
        return self.head_dim if self.mla is None else self.mla.qk_head_dim

    @property
    def rope_dim(self) -> int:
        """How much of it is rotated."""
        return self.head_dim if self.mla is None else self.mla.qk_rope_head_dim

    def validate(self) -> None:
        """Raises ConfigError("key: why")."""
        for name in ("d_model", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.vocab_size < 0:
            raise ConfigError(f"vocab_size: must be >= 0, got {self.vocab_size}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads: {self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim: rotary embeddings need an even width, got {self.head_dim}"
            )
        if self.mla is not None:
            for name, off in (("qk_norm", "none"), ("clip_qkv", 0.0)):
                if getattr(self, name) != off:
                    raise ConfigError(
                        f"{name}: must be {off!r} with mla, got {getattr(self, name)!r}"
                    )
            if self.mla.yarn_mscale_all_dim and self.rope_scaling.kind != "yarn":
                raise ConfigError(
                    "mla.yarn_mscale_all_dim: only with rope_scaling.kind='yarn', "
                    f"and it is {self.rope_scaling.kind!r}"
                )
        if self.moe_every < 1:
            raise ConfigError(f"moe_every: must be at least 1, got {self.moe_every}")
        if not self.window_pattern:
            raise ConfigError("window_pattern: must not be empty")
        if self.sliding_window < 0:
            raise ConfigError(f"sliding_window: must be >= 0, got {self.sliding_window}")
        bad = [i for i in self.dense_layers if not 0 <= i < self.num_layers]
        if bad:
            raise ConfigError(f"dense_layers: no layer {bad[0]} among {self.num_layers}")
        if self.logprob_chunk < 1:
            raise ConfigError(f"logprob_chunk: must be at least 1, got {self.logprob_chunk}")


@dataclass(frozen=True)
class BlockSpec:
    """One layer's kind: MoE or dense, and its attention window (0: full)."""

    moe: bool
    window: int


@dataclass(frozen=True)
class Segment:
    """`repeats` copies of a pattern of blocks; layers and MoE layers counted from the bottom."""

    pattern: tuple[BlockSpec, ...]
    repeats: int
    first_layer: int
    first_moe: int

    @property
    def moe_per_repeat(self) -> int:
        """MoE layers in one repeat of the pattern."""
        return sum(b.moe for b in self.pattern)

    @property
    def num_moe(self) -> int:
        """MoE layers in the whole segment."""
        return self.moe_per_repeat * self.repeats


def block_specs(cfg: ModelConfig) -> tuple[BlockSpec, ...]:
    """The kind of every layer, bottom first."""
    specs = []
    for i in range(cfg.num_layers):
        moe = (
            cfg.moe is not None
            and i >= cfg.first_dense
            and i not in cfg.dense_layers
            and (i + 1) % cfg.moe_every == 0
        )
        windowed = cfg.window_pattern[i % len(cfg.window_pattern)]
        specs.append(BlockSpec(moe, cfg.sliding_window if windowed else 0))
    return tuple(specs)


def segments(cfg: ModelConfig) -> tuple[Segment, ...]:
    """Folds the layers into (pattern, repeats), greedily: the pattern that covers most layers.

    A pattern longer than one is taken only when it repeats, so a stack of equal layers is one
    segment and `first_dense` layers stand in a segment of their own.
    """
    specs = block_specs(cfg)
    out: list[Segment] = []
    start = moe_seen = 0
    while start < len(specs):
        best_len, best_rep = 1, 1
        for length in range(1, (len(specs) - start) // 2 + 1):
            pattern = specs[start : start + length]
            reps = 1
            while specs[start + reps * length : start + (reps + 1) * length] == pattern:
                reps += 1
            if reps > 1 and reps * length > best_len * best_rep:
                best_len, best_rep = length, reps
        segment = Segment(specs[start : start + best_len], best_rep, start, moe_seen)
        out.append(segment)
        start += best_len * best_rep
        moe_seen += segment.num_moe
    return tuple(out)


def num_moe_layers(cfg: ModelConfig) -> int:
    """L of the routes array [L, B, T, K]."""
    return sum(s.moe for s in block_specs(cfg))
