"""A full training step of transformers: forward, backward, clipping, fused AdamW.

In bfloat16 both documented ways are tried, autocast over fp32 weights and a model in bf16, and
the faster is measured; so with the experts' implementations, in either precision.
"""

import contextlib

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


class Trainer:
    """One model and its optimizer, set up for one candidate at a time."""

    def __init__(self, params):
        self.params = params
        self.tokens = torch.tensor(params["tokens"])
        self.key = None

    def prepare(self, candidate):
        """candidate: (experts implementation, "autocast" or dtype of the weights)."""
        experts, precision = candidate
        if self.key != precision:
            weights = DTYPES.get(precision, torch.float32)
            self.model = self.optimizer = None  # before the next one is made
            self.model = load_model(self.params["checkpoint"], weights).train()
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(),
                lr=self.params["learning_rate"],
                betas=(self.params["b1"], self.params["b2"]),
                eps=self.params["eps"],
                weight_decay=0.0,
                fused=True,
            )
            self.key = precision
        self.model.set_experts_implementation(experts)

    def step(self):
        """One step; its loss."""
        half = self.key == "autocast"
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.params["clip_norm"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def serve(channel, params):
    """params: checkpoint, tokens, dtype, learning_rate, b1, b2, eps, clip_norm, steps."""
    use_all_cores()
    trainer = Trainer(params)
    precisions = ("autocast", "bfloat16") if params["dtype"] == "bfloat16" else ("float32",)
    candidates = [(experts, p) for p in precisions for experts in EXPERTS]
    losses = []
    start, _ = timed(lambda: (trainer.prepare(candidates[0]), losses.append(trainer.step())))
    losses.append(trainer.step())
    best, tried = fastest(candidates, trainer.prepare, trainer.step)
    settings = {"experts": best[0], "weights": best[1], "attention": "sdpa", "optimizer": "fused"}

    def measure(message):
        seconds = [timed(trainer.step)[0] for _ in range(params["steps"])]
        return {"seconds": seconds, "peak_flops": matmul_peak(DTYPES[params["dtype"]])}

    ready = {
        "losses": losses,
        "settings": settings,
        "tries": tried,
        "compile_seconds": start,
        "peak_flops": matmul_peak(DTYPES[params["dtype"]]),
        "versions": versions(),
    }
    channel.loop(ready, measure)
