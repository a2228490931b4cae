"""Compute dtype by device, the compilation cache, and what is counted."""

from __future__ import annotations

import platform
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pr2jax.core import device
from pr2jax.core.config import ConfigError


def fake(platform, **more):
    return types.SimpleNamespace(platform=platform, device_kind="a chip", **more)


@pytest.mark.parametrize(
    "chip, flags, jax_version, expected",
    [
        (fake("tpu"), "", "0.10.2", "bfloat16"),
        (fake("gpu", compute_capability="9.0"), "", "0.10.2", "bfloat16"),
        (fake("gpu", compute_capability="10.0"), "", "0.12.0", "bfloat16"),
        (fake("gpu", compute_capability="7.5"), "", "0.12.0", "float32"),
        (fake("gpu", compute_capability="gfx90a"), "", "0.12.0", "float32"),
        (fake("cpu"), "avx512f amx_bf16", "0.12.0.1", "bfloat16"),
        (fake("cpu"), "avx512f amx_bf16", "0.10.2", "float32"),
        (fake("cpu"), "avx512f avx512_bf16", "0.12.0", "float32"),
        (fake("quantum"), "", "0.12.0", "float32"),
    ],
)
def test_auto_dtype(monkeypatch, chip, flags, jax_version, expected):
    monkeypatch.setattr(device.jax, "devices", lambda: [chip])
    monkeypatch.setattr(device.jax, "__version__", jax_version)
    monkeypatch.setattr(device, "cpu_flags", lambda: frozenset(flags.split()))
    dtype, reason = device.resolve_dtype("auto")
    assert dtype == jnp.dtype(expected)
    assert reason.startswith(expected + ": ")


def test_named_dtypes():
    assert device.resolve_dtype("bfloat16")[0] == jnp.bfloat16
    assert device.resolve_dtype("float32")[0] == jnp.float32
    with pytest.raises(ConfigError, match="compute_dtype: .*'float16'"):
        device.resolve_dtype("float16")


def test_compilations_and_cache_hits_are_told_apart(tmp_path):
    jax.jit(lambda a: a - 1)(jnp.ones(3))  # a cache of the environment is open by now
    before = {
        k: getattr(jax.config, k)
        for k in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    x = jax.block_until_ready(jnp.ones((3, 5)))
    try:
        assert device.setup_compilation_cache(tmp_path / "cache") == tmp_path / "cache"
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        with device.CompilationCounter() as counter:
            jax.jit(lambda a: a * 3 + 1)(x)
            assert (counter.compilations, counter.cache_hits) == (1, 0)
            jax.jit(lambda a: a * 3 + 1)(x)
            assert counter.compilations + counter.cache_hits == 2
            jax.jit(lambda a: a * 5 + 1)(x)
        total = counter.compilations + counter.cache_hits
        assert total == 3
        assert counter.cache_hits == 1
        assert counter.snapshot()["seconds"] == pytest.approx(counter.seconds, abs=1e-3)
        jax.jit(lambda a: a * 7 + 1)(x)
        assert counter.compilations + counter.cache_hits == total, "closed counters count on"
        assert device.setup_compilation_cache("off") is None
    finally:
        compilation_cache.reset_cache()
        for key, value in before.items():
            jax.config.update(key, value)


def test_default_cache_is_the_users_and_the_machines(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = device._default_cache()
    assert tmp_path in here.parents
    monkeypatch.setattr(device, "cpu_flags", lambda: frozenset({"another", "cpu"}))
    assert device._default_cache() != here


def test_versions_name_the_machine():
    found = device.versions()
    assert found["jax"] == jax.__version__
    assert found["devices"] == 8
    assert found["platform"] == "cpu"
    assert found["cpu_cores"] >= 1
    assert "not installed" not in found.values()


def test_profile_writes_a_trace(tmp_path):
    with device.profile(None):
        pass
    with device.profile(tmp_path):
        jax.block_until_ready(jnp.ones(4) + 1)
    assert any(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_kept():
    code = (
        "import resource, numpy as np\n"
        "from pr2jax.core.device import reuse_freed_memory\n"
        "assert reuse_freed_memory()\n"
        "np.ones(2**24)\n"  # 128 MiB
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(4): np.ones(2**24)\n"
        "faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "assert faults < 1000, faults\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
