"""`generate` of transformers: sampling at temperature 1 for a fixed number of new tokens.

Caches and experts' implementations that its documentation offers for CPU are tried, and the
fastest is measured. (On CPU `generate` compiles nothing by itself, static cache or not.)
"""

import torch
from torch_common import (
    DTYPES,
    EXPERTS,
    fastest,
    load_model,
    matmul_peak,
    timed,
    use_all_cores,
    versions,
)


def serve(channel, params):
    """params: checkpoint, prompts [rows, prompt], new, dtype, steps."""
    use_all_cores()
    model = load_model(params["checkpoint"], DTYPES[params["dtype"]]).eval()
    prompts = torch.tensor(params["prompts"])
    mask = torch.ones_like(prompts)
    chosen = {}
    torch.manual_seed(0)

    def prepare(candidate):
        experts, chosen["cache"] = candidate
        model.set_experts_implementation(experts)

    @torch.inference_mode()
    def generate():
        done = model.generate(
            prompts,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=params["new"],
            eos_token_id=None,
            cache_implementation=chosen["cache"],
        )
        count = done.shape[1] - prompts.shape[1]
        if count != params["new"]:
            raise RuntimeError(f"generate made {count} tokens, not {params['new']}")

    candidates = [(experts, cache) for experts in EXPERTS for cache in ("dynamic", "static")]
    prepare(candidates[0])
    start, _ = timed(generate)
    best, tried = fastest(candidates, prepare, generate, tries=1)
    settings = {"experts": best[0], "cache": best[1], "attention": "sdpa"}

    def measure(message):
        seconds = [timed(generate)[0] for _ in range(params["steps"])]
        return {"seconds": seconds, "peak_flops": matmul_peak(DTYPES[params["dtype"]])}

    ready = {
        "settings": settings,
        "tries": tried,
        "compile_seconds": start,
        "peak_flops": matmul_peak(DTYPES[params["dtype"]]),
        "versions": versions(),
    }
    channel.loop(ready, measure)
