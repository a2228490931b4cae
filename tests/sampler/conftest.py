"""A small MoE policy, and oracles that know nothing of caches, slots or programs."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core import rng
from pr2jax.core.params import init_params
from pr2jax.models.config import ModelConfig, MoEConfig
from pr2jax.models.logprobs import logits
from pr2jax.models.transformer import Record, forward, param_specs
from pr2jax.sampler.engine import Sampler
from pr2jax.sampler.types import SamplerConfig

VOCAB = 24


class Letters:
    """One letter a token; the end-of-sequence id is also the pad id, and also letter 'a'."""

    vocab_size = VOCAB
    eos_id = pad_id = 0
    bos_id = None

    def encode(self, text):
        return [ord(c) - ord("a") for c in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids)


def truncated64(row, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """float64 log-probabilities of one row of logits, by the definitions, token by token."""
    z = np.asarray(row, np.float64) / temperature
    kept = sorted(range(len(z)), key=lambda i: (-z[i], i))
    kept = kept[:top_k] if top_k else kept

    def probs(ids):
        p = np.exp(z[ids] - z[ids].max())
        return p / p.sum()

    p = probs(kept)
    if top_p < 1:
        kept = kept[: int(np.searchsorted(np.cumsum(p), top_p)) + 1]
        p = probs(kept)
    kept = [t for t, q in zip(kept, p, strict=True) if q >= min_p * p[0]]
    out = np.full(len(z), -np.inf)
    out[kept] = np.log(probs(kept))
    return out


@pytest.fixture(scope="session")
def world():
    """cfg, params, prompts, samplers, and the full forward (no cache) over whole rows."""
    cfg = ModelConfig(
        vocab_size=VOCAB,
        d_model=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        dense_dim=32,
        first_dense=1,
        moe=MoEConfig(num_experts=8, top_k=2, expert_dim=16),
        tie_embeddings=False,
    )
    params = init_params(param_specs(cfg), rng.root(0))
    # Random weights give nearly flat logits; a head three times as large makes choices matter.
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"] * 3
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, VOCAB, size).tolist() for size in (5, 16, 1, 9, 12)]
    prompts[0][2] = 0  # the pad and stop id inside a prompt is a token as any other

    @jax.jit
    def full(tokens, lengths, routes=None, shift=None):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        real = (positions < lengths[:, None]).astype(jnp.int32)
        out = forward(
            params, tokens, positions, real, cfg=cfg, routes=routes, shift=shift, record=Record()
        )
        return logits(params, out.hidden, cfg), out.routes, out.router

    def sampler(tokenizer=None, **changes):
        base = {"slots": 8, "chunk": 4, "max_prompt": 16, "max_tokens": 12, "bucket": 28}
        config = SamplerConfig(**{**base, "prefill_rows": 2, "unroll_layers": False, **changes})
        return Sampler(cfg, config, tokenizer=tokenizer, params=params)

    return types.SimpleNamespace(
        cfg=cfg, params=params, prompts=prompts, full=full, sampler=sampler, one=sampler()
    )


@pytest.fixture(scope="session")
def oracle(world):
    """oracle(rollout) -> behaviour log-probs in float64 from a full forward on its routes."""

    def run(rollout):
        out, _, _ = world.full(rollout.tokens, rollout.lengths, rollout.routes.astype(np.int32))
        out = np.asarray(out)
        want = np.zeros(rollout.tokens.shape)
        s = rollout.sampling
        for b, t in zip(*np.nonzero(rollout.loss_mask), strict=True):
            logp = truncated64(out[b, t - 1], s.temperature, s.top_k, s.top_p, s.min_p)
            want[b, t] = logp[rollout.tokens[b, t]]
        return want

    run.truncated64 = truncated64
    return run


@pytest.fixture
def letters():
    return Letters()
