"""DeepSeek-V3 (arXiv 2412.19437), which is also Moonlight's (2502.16982): latent attention, sigmoid
scores with a selection bias, shared experts, dense layers first.

A checkpoint with tensors of multi-token prediction (layers behind the last) is refused as any with
tensors that the model does not have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pr2jax.models.config import MLAConfig, ModelConfig, MoEConfig, block_specs
from pr2jax.models.importers.family import (
    DENSE,
    EXPERTS,
    TOP,
    Family,
    Row,
    read_common,
    write_common,
)
from pr2jax.models.importers.files import CheckpointFormatError, require
from pr2jax.models.importers.rope import read_mscale_all_dim


def _read(hf: Mapping[str, Any]) -> ModelConfig:
    for key, value in (
        ("scoring_func", "sigmoid"),
        ("topk_method", "noaux_tc"),
        ("moe_layer_freq", 1),
        ("rope_interleave", True),
        ("num_key_value_heads", hf["num_attention_heads"]),
    ):
        require(hf, key, value)
    mla = MLAConfig(
        kv_lora_rank=hf["kv_lora_rank"],
        q_lora_rank=hf.get("q_lora_rank", 0),
        qk_nope_head_dim=hf["qk_nope_head_dim"],
        qk_rope_head_dim=hf["qk_rope_head_dim"],
        v_head_dim=hf["v_head_dim"],
        yarn_mscale_all_dim=read_mscale_all_dim(hf),
    )
    moe = MoEConfig(
        num_experts=hf["n_routed_experts"],
        top_k=hf["num_experts_per_tok"],
        expert_dim=hf["moe_intermediate_size"],
        shared_dim=hf["n_shared_experts"] * hf["moe_intermediate_size"],
        score="sigmoid",
        normalize="post" if hf.get("norm_topk_prob", True) else "none",
        selection_bias=True,
        num_groups=hf["n_group"],
        top_groups=hf["topk_group"],
        routed_scaling=float(hf["routed_scaling_factor"]),
    )
    common = read_common(hf) | {"head_dim": mla.qk_head_dim}
    return ModelConfig(
        **common,
        moe=moe,
        mla=mla,
        first_dense=hf["first_k_dense_replace"],
        qk_norm="none",
        norm_eps=hf.get("rms_norm_eps", 1e-6),
    )


def _write(cfg: ModelConfig) -> dict[str, Any]:
    if cfg.mla is None or cfg.moe is None:
        missing = "mla" if cfg.mla is None else "moe"
        raise CheckpointFormatError(f"deepseek_v3 cannot express {missing}=None")
    moe, mla = cfg.moe, cfg.mla
    if not moe.shared_dim or moe.shared_dim % moe.expert_dim:
        raise CheckpointFormatError(
            f"deepseek_v3 cannot express moe.shared_dim={moe.shared_dim} with moe.expert_dim="
            f"{moe.expert_dim}: its shared experts are as wide as the others"
        )
    kinds = [block.moe for block in block_specs(cfg)]
    latents = {k: v for k, v in dataclasses.asdict(mla).items() if k in _LATENTS}
    return {
        **write_common(dataclasses.replace(cfg, num_kv_heads=cfg.num_heads)),
        **latents,
        "q_lora_rank": mla.q_lora_rank or None,
        "intermediate_size": cfg.dense_dim,
        "moe_intermediate_size": moe.expert_dim,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_dim // moe.expert_dim,
        "num_experts_per_tok": moe.top_k,
        "n_group": moe.num_groups,
        "topk_group": moe.top_groups,
        "norm_topk_prob": moe.normalize != "none",
        "routed_scaling_factor": moe.routed_scaling,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "first_k_dense_replace": kinds.index(True) if any(kinds) else cfg.num_layers,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    }


_LATENTS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

_ATTENTION = (
    Row("input_layernorm.weight", "attention_norm/scale"),
    Row("self_attn.q_proj.weight", "attention/q/kernel", inputs=1, rotary=True),
    Row("self_attn.q_a_proj.weight", "attention/q_down/kernel", inputs=1),
    Row("self_attn.q_a_proj.bias", "attention/q_down/bias"),
    Row("self_attn.q_a_layernorm.weight", "attention/q_norm/scale"),
    Row("self_attn.q_b_proj.weight", "attention/q_up/kernel", inputs=1, rotary=True),
    Row("self_attn.kv_a_proj_with_mqa.weight", "attention/kv_down/kernel", inputs=1, rotary=True),
    Row("self_attn.kv_a_proj_with_mqa.bias", "attention/kv_down/bias", rotary=True),
    Row("self_attn.kv_a_layernorm.weight", "attention/kv_norm/scale"),
    Row("self_attn.kv_b_proj.weight", "attention/kv_up/kernel", inputs=1),
    Row("self_attn.o_proj.weight", "attention/o/kernel", inputs=2),
    Row("self_attn.o_proj.bias", "attention/o/bias"),
    Row("post_attention_layernorm.weight", "ffn_norm/scale"),
)

_ROUTED = (
    Row("mlp.gate.e_score_correction_bias", "moe/router/selection_bias"),
    Row("mlp.shared_experts.gate_proj.weight", "moe/shared/gate", inputs=1),
    Row("mlp.shared_experts.up_proj.weight", "moe/shared/up", inputs=1),
    Row("mlp.shared_experts.down_proj.weight", "moe/shared/down", inputs=1),
)

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    top=TOP,
    layer=_ATTENTION + EXPERTS + _ROUTED + DENSE,
    read=_read,
    write=_write,
)
