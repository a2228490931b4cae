"""Named PRNG keys: every draw says what it is for, so adding one never moves another."""

import zlib

import jax
from jaxtyping import Array, Int, Key

Name = str | int | Int[Array, ""]


def root(seed: int) -> Key[Array, ""]:
    """The run's root key (threefry, whatever the process default: runs must repeat)."""
    return jax.random.key(seed, impl="threefry2x32")


def named(key: Key[Array, ""], *names: Name) -> Key[Array, ""]:
    """Derive the key of `names`, one fold a name.

    Strings fold their CRC-32 (stable across processes, unlike `hash`); integers fold themselves
    (0 <= n < 2**32) and may be traced, so `named(key, request_id, position)` works in a decode
    loop and under `vmap`.
    """
    for name in names:
        data = zlib.crc32(name.encode()) if isinstance(name, str) else name
        key = jax.random.fold_in(key, data)
    return key
