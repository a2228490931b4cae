"""Logits and routes of `transformers` for checkpoints on disk, which it then saves again."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM


def forward(model, tokens):
    """Logits, and (router logits, chosen experts) of each MoE layer as its router gave them."""
    seen = []

    def keep(module, inputs, outputs):
        seen.append((outputs[0], outputs[2]))

    for module in model.modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(keep)
    with torch.no_grad():
        return model.eval()(tokens, use_cache=False).logits, seen


def run(arrays, params):
    """For each of params["cases"] {name, folder, resave, shard}: loads `folder` in fp32, runs
    arrays["NAME/tokens"] [B, T], saves it to `resave` in shards of at most `shard` bytes.

    Returns NAME/logits [B, T, V] and, of a model with MoE layers, NAME/routes [L, B, T, K] (sorted
    by score, but for DeepSeek-V3) and NAME/router_logits [L, B, T, E].
    """
    torch.set_num_threads(2)
    out = {}
    for case in params["cases"]:
        name, tokens = case["name"], torch.tensor(arrays[case["name"] + "/tokens"]).long()
        config = AutoConfig.from_pretrained(case["folder"])
        model, info = AutoModelForCausalLM.from_pretrained(
            case["folder"],
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
        wrong = {k: v for k, v in info.items() if v and k != "error_msgs"}
        if wrong or info.get("error_msgs"):
            raise ValueError(f"{name}: loading says {info}")
        logits, seen = forward(model, tokens)
        out[name + "/logits"] = logits.numpy()
        if seen:
            shape = (len(seen), *tokens.shape, -1)
            out[name + "/router_logits"] = np.stack([p.numpy() for p, _ in seen]).reshape(shape)
            out[name + "/routes"] = np.stack([r.numpy() for _, r in seen]).reshape(shape)
        model.save_pretrained(case["resave"], max_shard_size=case["shard"])
    return out
