"""Our GRPO step: `RLTrainer.step` as a run takes it, verifiers and all, one update a batch."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from typing import Any

import jax

from pr2jax.benchmark.jobs.common import Bench, rounds, start, timed
from pr2jax.benchmark.jobs.decode import decode_flops
from pr2jax.benchmark.serve import Channel
from pr2jax.core.metrics import reduce
from pr2jax.core.optim import OptimConfig
from pr2jax.data.tokenizer import TokenizerConfig
from pr2jax.models.flops import forward_flops
from pr2jax.replay.modes import ReplayConfig
from pr2jax.rl.types import PREDICTOR_GROUP, RLConfig, predictor_group
from pr2jax.sampler.types import SamplingParams
from pr2jax.tasks.base import Problem, TaskConfig
from pr2jax.tasks.registry import build_task
from pr2jax.train.config import Config, EvalConfig, LoopConfig, VerifierConfig
from pr2jax.train.rl import RLTrainer
from pr2jax.train.session import Session, open_session


def run_config(bench: Bench, mini_steps: int) -> Config:
    """The run whose steps are timed; every group is learned from, as TRL does."""
    sizes, params = bench.sizes, bench.params
    prompts = sizes.prompts * mini_steps
    sampling = SamplingParams(max_tokens=sizes.completion)
    return Config(
        mode="rl",
        compute_dtype=bench.dtype.name,
        init_from=bench.checkpoint,
        model=bench.model,
        tokenizer=TokenizerConfig(kind="hf", path=bench.checkpoint)
        if bench.checkpoint
        else TokenizerConfig(),
        rl=RLConfig(
            prompts_per_batch=prompts,
            samples_per_prompt=sizes.samples,
            mini_steps=mini_steps,
            micro_batch=sizes.prompts * sizes.samples,
            filter_zero_variance=False,
            sampling=sampling,
            optim=OptimConfig(
                learning_rate=params["learning_rate"],
                clip_norm=params["clip_norm"],
                groups={PREDICTOR_GROUP: predictor_group()},
            ),
        ),
        rl_task=TaskConfig(),
        replay=ReplayConfig(mode=bench.mode, feature_tokens=sizes.feature_tokens),
        sampler=bench.sampler(prompts * sizes.samples, sizes.completion),
        eval=EvalConfig(sampling=sampling),
        verifier=VerifierConfig(workers=1),
        loop=LoopConfig(tensorboard=False),
    )


def problems(texts: list[str], prompt: int, tokenized: bool) -> list[Problem]:
    """Sums, whose verifier is quick, put as the given prompts (as bytes where not tokenized)."""
    task = build_task(TaskConfig(size=len(texts), held_out=0))
    put = lambda text: text if tokenized else (text * prompt)[:prompt]
    return [
        dataclasses.replace(problem, prompt=put(text))
        for problem, text in zip(task.train, texts, strict=True)
    ]


def step_flops(bench: Bench, mini_steps: int) -> float:
    """Of sampling and of as many updates as there are mini-steps."""
    s = bench.sizes
    rows = s.prompts * s.samples * mini_steps
    length = s.prompt + s.completion
    sampled = decode_flops(bench.model, rows, s.prompts * mini_steps, s.prompt, s.completion)
    return sampled + 3 * forward_flops(bench.model, rows * length, (length + 1) / 2)


def trainer_of(bench: Bench, session: Session) -> RLTrainer:
    """A trainer on prompts of exactly `prompt` tokens."""
    made = problems(bench.params["texts"], bench.sizes.prompt, bool(bench.checkpoint))
    lengths = {len(session.encode(problem)) for problem in made}
    if lengths != {bench.sizes.prompt}:
        raise RuntimeError(f"prompts of {sorted(lengths)} tokens, not {bench.sizes.prompt}")
    return RLTrainer(session, made, evaluator=None)


def serve(channel: Channel, params: dict[str, Any]) -> None:
    """params: those of `start`; texts, mode, mini_steps, learning_rate, clip_norm."""
    bench = start(params)
    mini_steps = params["mini_steps"]
    with (
        tempfile.TemporaryDirectory() as folder,
        # One device, as in the other workloads: parallelism is not what is compared.
        open_session(run_config(bench, mini_steps), folder, jax.devices()[:1]) as session,
    ):
        trainer = trainer_of(bench, session)
        state = trainer.initial_state(session.initial_params())
        index = 0

        def one() -> dict[str, float]:
            nonlocal state, index
            begin = time.perf_counter()
            state, metrics = trainer.step(state, index)
            jax.block_until_ready(state)
            seconds = time.perf_counter() - begin
            index += 1
            figures = reduce(metrics)
            # The verifiers' time counts as TRL's rewards do, with generating.
            generate = figures["time/sample"] + figures["time/verify"]
            return {"generate": generate, "update": seconds - generate}

        first, _ = timed(one)
        one()
        ready = bench.ready(
            first_step_seconds=first,
            flops=step_flops(bench, mini_steps),
            settings={"mode": bench.mode, "mini_steps": mini_steps},
        )
        channel.loop(ready, rounds(bench, one))
