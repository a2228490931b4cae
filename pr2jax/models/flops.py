"""How many parameters a model has and uses, and how many operations a forward takes."""

from __future__ import annotations

from pr2jax.core.params import count_params, map_with_path
from pr2jax.models.config import ModelConfig, block_specs
from pr2jax.models.transformer import param_specs


def total_params(cfg: ModelConfig) -> int:
    """Scalars in the parameter tree: embeddings and route predictors included."""
    return count_params(param_specs(cfg))


def active_params(cfg: ModelConfig) -> int:
    """Scalars that one token's forward may touch: of the routed experts, top_k of num_experts."""
    sizes: list[int] = []

    def count(path, spec):
        size = count_params(spec)
        if "/moe/experts/" in path:
            size = size // cfg.moe.num_experts * cfg.moe.top_k
        sizes.append(size)

    map_with_path(count, param_specs(cfg))
    return sum(sizes)


def _attention_flops(cfg: ModelConfig) -> tuple[int, int]:
    """Of one layer: operations of a token's projections, and of each position it attends to."""
    d, h, mla = cfg.d_model, cfg.num_heads, cfg.mla
    if mla is None:
        width = h * cfg.head_dim
        return 2 * d * (2 * width + 2 * cfg.num_kv_heads * cfg.head_dim), 4 * width
    inner = mla.q_lora_rank
    queries = inner * (d + h * mla.qk_head_dim) if inner else d * h * mla.qk_head_dim
    latents = d * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    expansion = mla.kv_lora_rank * h * (mla.qk_nope_head_dim + mla.v_head_dim)
    out = h * mla.v_head_dim * d
    return 2 * (queries + latents + expansion + out), 2 * h * (mla.qk_head_dim + mla.v_head_dim)


def forward_flops(cfg: ModelConfig, tokens: int, context: float) -> float:
    """Floating-point operations of a forward over `tokens` tokens, LM head included.

    Two for each multiply-add of the matrix products; norms, softmaxes and look-ups are left out.
    `context` is the mean number of positions a token attends to (about T / 2 for a causal row of
    T tokens); sliding windows cap it. A training step takes three times as many (Kaplan et al.
    2020, Section 2.1), without rematerialisation. Latent attention is counted expanded; absorbed,
    as a decode step has it, a position takes 2 H (2 c + r) in place of 2 H (n + r + v).
    """
    d = cfg.d_model
    projections, position = _attention_flops(cfg)
    per_token: float = 2 * d * cfg.vocab_size
    for block in block_specs(cfg):
        seen = min(context, block.window) if block.window else context
        per_token += projections + position * seen
        if block.moe:
            moe = cfg.moe
            per_token += 2 * d * moe.num_experts
            per_token += 6 * d * (moe.top_k * moe.expert_dim + moe.shared_dim)
        else:
            per_token += 6 * d * cfg.dense_dim
    return tokens * per_token


def head_flops(cfg: ModelConfig, tokens: int) -> float:
    """The LM head's part of `forward_flops`."""
    return 2.0 * tokens * cfg.d_model * cfg.vocab_size


def training_flops(
    cfg: ModelConfig,
    tokens: int,
    context: float,
    *,
    computed_context: float | None = None,
    head_again: bool = False,
) -> tuple[float, float]:
    """(model, executed) operations of a training step: the forward three times, and with what is
    computed again or in vain.

    Executed is with all of a layer's forward repeated in the backward pass (remat "full"), or of
    it attention's two products and the experts (remat "dots"): at most, since what the backward
    pass does not read is left out by the compiler.

    Args:
      computed_context: positions that a token's attention computes, masked ones among them
        (default: `context`).
      head_again: whether the head is rematerialised (log-probs in more than one chunk).
    """
    seen = context if computed_context is None else computed_context
    forward = forward_flops(cfg, tokens, seen)
    executed = 3 * forward
    if cfg.remat == "full":
        executed += forward - head_flops(cfg, tokens)
    elif cfg.remat == "dots":
        experts = 0 if cfg.moe is None else 6 * cfg.d_model * cfg.moe.top_k * cfg.moe.expert_dim
        layers = sum(block.moe for block in block_specs(cfg))
        executed += forward - forward_flops(cfg, tokens, 0) + tokens * layers * experts
    if head_again:
        executed += head_flops(cfg, tokens)
    return 3 * forward_flops(cfg, tokens, context), executed
