"""A GRPO step of TRL: generate, reward, one update. Its Trainer runs, and waits between steps.

Settings: generation by transformers (no vLLM on CPU), no reference model (beta 0), no gradient
checkpointing (it saves memory that is there), fused AdamW; the faster experts' implementation.
"""

import contextlib
import logging
import tempfile
import time

import torch
from torch_common import DTYPES, EXPERTS, load_model, matmul_peak, use_all_cores, versions
from transformers import AutoTokenizer, TrainerCallback


def reward(completion_ids, **_):
    """The share of even token ids: it varies, and costs nothing."""
    return [sum(1 for i in ids if i % 2 == 0) / max(len(ids), 1) for ids in completion_ids]


class Paced(TrainerCallback):
    """Tries each experts' implementation, then makes a step for each message of the channel."""

    def __init__(self, channel, params, model):
        self.channel, self.params, self.model = channel, params, model
        self.generate_s = self.began = 0.0
        self.plan = [e for e in EXPERTS for _ in range(3)]  # a warm-up and two that count
        self.tried = {e: [] for e in EXPERTS}
        self.first = None
        self.told = []
        self.left = 0

    def wrap(self, trainer):
        """Times the generating half of a step; scoring of rewards included."""
        inner = trainer._generate_and_score_completions

        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            self.generate_s += time.perf_counter() - start
            return result

        trainer._generate_and_score_completions = timed

    def on_step_begin(self, args, state, control, **_):
        """Waits for the next message where steps are no longer tries."""
        if self.plan:
            self.model.set_experts_implementation(self.plan[0])
        elif self.left == 0:
            if self.channel.next() is None:
                raise EOFError
            self.left = self.params["steps"]
        self.generate_s, self.began = 0.0, time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        """Keeps the step's times; answers when the round, or the tries, are done."""
        seconds = time.perf_counter() - self.began
        if self.plan:
            self.first = self.first or seconds
            experts = self.plan.pop(0)
            self.tried[experts].append(seconds)
            others = [min(s) for e, s in self.tried.items() if e != experts and s]
            if others and seconds > 4 * min(others):
                self.plan.clear()  # out with its warm-up: they differ by ten and more
            if not self.plan:
                self._ready()
            return
        self.told.append((seconds, self.generate_s))
        self.left -= 1
        if self.left == 0:
            answer = {
                "seconds": [s for s, _ in self.told],
                "parts": {
                    "generate": [g for _, g in self.told],
                    "update": [s - g for s, g in self.told],
                },
                "peak_flops": matmul_peak(DTYPES[self.params["dtype"]]),
            }
            self.told = []
            self.channel.reply(answer)

    def _ready(self):
        import trl

        seconds = {e: min(s[1:] or s) for e, s in self.tried.items()}
        best = min(seconds, key=seconds.get)
        self.model.set_experts_implementation(best)
        self.channel.reply(
            {
                "settings": {"experts": best, "attention": "sdpa", "loss": "dapo", "beta": 0.0},
                "tries": seconds,
                "compile_seconds": self.first,
                "peak_flops": matmul_peak(DTYPES[self.params["dtype"]]),
                "versions": versions() | {"trl": trl.__version__},
            }
        )


def serve(channel, params):
    """params: checkpoint, texts (prompts), samples, completion, prompts, dtype, learning_rate,
    clip_norm, steps."""
    from datasets import Dataset
    from datasets.utils import logging as quiet
    from trl import GRPOConfig, GRPOTrainer

    quiet.disable_progress_bar()
    logging.disable(logging.WARNING)
    use_all_cores()
    model = load_model(params["checkpoint"], torch.float32)
    paced = Paced(channel, params, model)
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=params["dtype"] == "bfloat16",
            gradient_checkpointing=False,
            per_device_train_batch_size=params["prompts"] * params["samples"],
            gradient_accumulation_steps=1,
            num_generations=params["samples"],
            max_completion_length=params["completion"],
            temperature=1.0,
            beta=0.0,
            loss_type="dapo",
            learning_rate=params["learning_rate"],
            lr_scheduler_type="constant",
            max_grad_norm=params["clip_norm"],
            max_steps=1_000_000,
            logging_steps=1_000_000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": params["texts"]}),
            processing_class=AutoTokenizer.from_pretrained(params["checkpoint"]),
            callbacks=[paced],
        )
        paced.wrap(trainer)
        with contextlib.suppress(EOFError):  # no more rounds are wanted
            trainer.train()
