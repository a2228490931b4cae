"""TRL's own loss, advantage and importance-weight code on given numbers.

Real trainers on a model of a few weights; only what would touch that model (sampling, and the
log-probs of a forward) is replaced, by the arrays that the test hands over.
"""

import tempfile
from types import MethodType

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment

VOCABULARY = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}


def make_trainer(kind, rewards, generations, **settings):
    """A trainer whose reward function hands out `rewards` in order."""
    table = Tokenizer(WordLevel(VOCABULARY, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=table, pad_token="<pad>", eos_token="<eos>"
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    trainer, config = {
        "grpo": (GRPOTrainer, GRPOConfig),
        "rloo": (RLOOTrainer, RLOOConfig),
    }[kind]

    def reward(completions, **_):
        return [float(r) for r in rewards]

    rows = len(rewards)
    args = config(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=rows,
        num_generations=generations,
        use_cpu=True,
        bf16=False,
        report_to=[],
        **settings,
    )
    made = trainer(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * (rows // generations)}),
        processing_class=tokenizer,
    )
    made.model.train()
    return made


def with_sampled(trainer, mask, logps, sampling_logps=None):
    """The trainer as if it had sampled rows of mask.sum(1) tokens with these log-probs."""
    lengths = mask.sum(1).astype(int)

    def generate(self, _):
        done = [[2] * (n - 1) + [1] for n in lengths]
        given = None
        if sampling_logps is not None:
            given = [list(map(float, r[:n])) for r, n in zip(sampling_logps, lengths, strict=True)]
        prompts, texts = [[2]] * len(done), ["a"] * len(done)
        if isinstance(self, RLOOTrainer):
            return prompts, done, texts
        return prompts, done, None, texts, given, {}, None, None

    def per_token(self, *_, **__):
        table = torch.tensor(logps)
        return table, torch.zeros_like(table), None

    trainer._generate = MethodType(generate, trainer)
    trainer._get_per_token_logps_and_entropies = MethodType(per_token, trainer)
    return trainer


def scored(trainer, rows):
    return trainer._generate_and_score_completions([{"prompt": "a"} for _ in range(rows)])


def loss_and_gradient(case, arrays):
    """`_compute_loss` on tables of log-probs, and its gradient by the current ones."""
    name = case["name"]
    get = lambda key: torch.tensor(arrays[f"{name}/{key}"], dtype=torch.float64)
    mask = get("mask")
    rows = len(mask)
    trainer = make_trainer("grpo", [0.0] * rows, 2, **case["settings"])
    new = get("new").requires_grad_()
    per_token = lambda *_, **__: (new, torch.zeros_like(new), None)
    trainer._get_per_token_logps_and_entropies = per_token
    trainer.current_gradient_accumulation_steps = 1
    trainer.beta = case["beta"]  # given at the start it would load a second model
    inputs = {
        "prompt_ids": torch.full((rows, 1), 2),
        "prompt_mask": torch.ones((rows, 1), dtype=torch.long),
        "completion_ids": torch.full(mask.shape, 2),
        "completion_mask": mask,
        "advantages": get("advantages"),
        "old_per_token_logps": get("old"),
        "ref_per_token_logps": get("ref"),
        "num_items_in_batch": mask.sum(),
    }
    if case.get("correction"):
        # Not asked for at the start, when it would look for a server.
        trainer.use_vllm = True
        inputs["importance_sampling_ratio"] = get("tis")
    loss = trainer._compute_loss(trainer.model, inputs)
    (grad,) = torch.autograd.grad(loss, new)
    return {f"{name}/loss": loss.detach().numpy(), f"{name}/grad": grad.numpy()}


def run(arrays, params):
    """Returns, by the NAME of each case: of params["losses"] {name, settings, beta, correction}
    NAME/loss and NAME/grad; of params["advantages"] {name, kind, generations, settings}
    NAME/advantages of arrays["rewards"]; of params["weights"] {name, mode, cap} NAME/tis; and
    `overlong`, the soft penalties of params["overlong"] {lengths, max_tokens, buffer}.
    """
    torch.set_num_threads(2)
    out = {}
    for case in params["losses"]:
        out |= loss_and_gradient(case, arrays)
    rewards = arrays["rewards"]
    for case in params["advantages"]:
        trainer = make_trainer(case["kind"], rewards, case["generations"], **case["settings"])
        mask = np.ones((len(rewards), 3))
        trainer = with_sampled(trainer, mask, np.zeros_like(mask))
        out[case["name"] + "/advantages"] = scored(trainer, len(rewards))["advantages"].numpy()
    for case in params["weights"]:
        mask = arrays["weights/mask"]
        trainer = make_trainer("grpo", [0.0] * len(mask), 2)
        trainer = with_sampled(trainer, mask, arrays["weights/old"], arrays["weights/behavior"])
        trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
        trainer.vllm_importance_sampling_mode = case["mode"]
        trainer.vllm_importance_sampling_clip_max = case["cap"]
        trainer.vllm_importance_sampling_clip_min = None
        found = scored(trainer, len(mask))
        out[case["name"] + "/tis"] = found["importance_sampling_ratio"].numpy()
    shape = params["overlong"]
    penalty = get_soft_overlong_punishment(shape["max_tokens"], shape["buffer"])
    out["overlong"] = np.array(penalty([[0] * n for n in shape["lengths"]]))
    return out
