"""Token log-probabilities against float64; what the compiled program multiplies, and keeps."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.models import logprobs
from pr2jax.models.config import ModelConfig
from tests.models import oracle

V, D, B, T = 29, 8, 3, 7
RNG = np.random.default_rng(0)
TIED = ModelConfig(vocab_size=V, d_model=D)
UNTIED = dataclasses.replace(TIED, tie_embeddings=False)
PARAMS = {
    "embed": {"table": RNG.normal(size=(V, D)).astype(np.float32)},
    "lm_head": {"kernel": RNG.normal(size=(D, V)).astype(np.float32)},
}
HIDDEN = RNG.normal(size=(B, T, D)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, T))


@pytest.mark.parametrize(
    "cfg,temperature,chunk", [(TIED, 1.0, None), (UNTIED, 0.7, 4), (TIED, 2.5, 21), (TIED, 1.0, 1)]
)
def test_values_against_float64(cfg, temperature, chunk):
    logp, entropy = oracle.compiled(
        lambda h: logprobs.token_logprobs(
            PARAMS, h, TARGETS, cfg=cfg, temperature=temperature, entropy=True, chunk=chunk
        )
    )(HIDDEN)
    expected, expected_entropy = oracle.logprobs(PARAMS, HIDDEN, TARGETS, cfg, temperature)
    np.testing.assert_allclose(logp, expected, atol=2e-5)
    np.testing.assert_allclose(entropy, expected_entropy, atol=2e-5)


def test_gradients_in_chunks_against_the_closed_form():
    weight = RNG.normal(size=(B, T))

    def loss(hidden, table):
        logp, _ = logprobs.token_logprobs(
            {"embed": {"table": table}}, hidden, TARGETS, cfg=TIED, temperature=0.5, chunk=4
        )
        return jnp.sum(logp * weight)

    table = PARAMS["embed"]["table"]
    dh, dtable = oracle.compiled(jax.grad(loss, (0, 1)))(HIDDEN, table)
    # d logp[t] / d logits = (onehot - softmax) / temperature.
    p = oracle.softmax(np.float64(HIDDEN) @ np.float64(table).T / 0.5)
    dlogits = weight[..., None] * (np.eye(V)[TARGETS] - p) / 0.5
    np.testing.assert_allclose(dh, dlogits @ np.float64(table), atol=1e-4)
    np.testing.assert_allclose(
        dtable, np.einsum("btv,btd->vd", dlogits, np.float64(HIDDEN)), atol=1e-4
    )


def test_without_entropy_none_is_returned():
    logp, entropy = logprobs.token_logprobs(PARAMS, HIDDEN, TARGETS, cfg=TIED)
    assert entropy is None
    assert logp.shape == (B, T)


def test_head_is_fp32_at_highest_precision_from_bf16():
    hidden = jnp.asarray(HIDDEN, jnp.bfloat16)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), PARAMS)
    loss = lambda h: logprobs.token_logprobs(params, h, TARGETS, cfg=UNTIED, chunk=4)[0].sum()
    for fn in (jax.jit(lambda h: logprobs.logits(params, h, UNTIED)), jax.jit(jax.grad(loss))):
        dots = [x for x in fn.lower(hidden).as_text().splitlines() if "dot_general" in x]
        assert dots
        for line in dots:
            assert "precision = [HIGHEST, HIGHEST]" in line
            assert "bf16" not in line
    assert logprobs.logits(params, hidden, UNTIED).dtype == jnp.float32


def test_whole_logits_are_never_made_when_chunked():
    def fn(chunk):
        loss = lambda h: logprobs.token_logprobs(
            PARAMS, h, TARGETS, cfg=TIED, entropy=True, chunk=chunk
        )[0].sum()
        return jax.jit(jax.value_and_grad(loss), compiler_options=oracle.QUICK)

    def largest(chunk):
        """Rows of the widest [rows, V] array in the compiled forward and backward pass."""
        text = fn(chunk).lower(HIDDEN).compile().as_text()
        sizes = [
            np.prod([int(d) for d in m.split(",")]) // V
            for m in re.findall(rf"f32\[((?:\d+,)*{V})\]", text)
        ]
        return max(sizes)

    assert largest(B * T) == B * T  # the measure sees them where they are
    assert largest(4) < B * T
    assert largest(4) <= max(4, D)
