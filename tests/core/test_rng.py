"""Named keys: stable, distinct, and the same whether names are traced or not."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pr2jax.core import rng


def bits(key):
    return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_fold_is_crc32_and_plain_fold():
    key = rng.root(7)
    # 0xCBF43926 is the published check value of CRC-32 for "123456789".
    assert bits(rng.named(key, "123456789")) == bits(jax.random.fold_in(key, 0xCBF43926))
    assert bits(rng.named(key, 5, 6)) == bits(jax.random.fold_in(jax.random.fold_in(key, 5), 6))


def test_names_are_distinct_and_ordered():
    key = rng.root(0)
    keys = [rng.named(key, *n) for n in (("a",), ("b",), ("a", "b"), ("b", "a"), (0,), (1,), ())]
    assert len({bits(k) for k in keys}) == len(keys)
    assert bits(rng.root(0)) != bits(rng.root(1))


def test_traced_ints_equal_python_ints():
    key = rng.root(1)
    positions = jnp.arange(5)
    traced = jax.jit(jax.vmap(lambda p: jax.random.key_data(rng.named(key, "draw", 3, p))))(
        positions
    )
    for p in range(5):
        assert bits(rng.named(key, "draw", 3, p)) == tuple(np.asarray(traced[p]).tolist())


def test_stable_across_processes():
    code = (
        "import jax; from pr2jax.core import rng;"
        "print(jax.random.key_data(rng.named(rng.root(2), 'shuffle', 9)).tolist())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=None
    ).stdout
    assert out.strip() == str(list(bits(rng.named(rng.root(2), "shuffle", 9))))
