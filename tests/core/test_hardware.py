"""Names of chips and slices, and what is told of bad ones."""

import importlib.util

import pytest

from pr2jax.core import hardware
from pr2jax.core.config import ConfigError
from pr2jax.core.hardware import peak_flops


@pytest.mark.parametrize(
    ("name", "chips", "accelerator"),
    [
        ("v5p:4x4x2", 32, "v5p-64"),  # counted in cores, two a chip
        ("v4:2x2x1", 4, "v4-8"),
        ("v5e:2x4", 8, "v5litepod-8"),
        ("V6E:16x16", 256, "v6e-256"),
    ],
)
def test_slices(name, chips, accelerator):
    found = hardware.parse_topology(name)
    assert found.size == chips
    environment = hardware.compiler_environment(found)
    assert environment["TPU_ACCELERATOR_TYPE"] == accelerator
    assert environment["JAX_PLATFORMS"] == "cpu"


def test_other_chips():
    assert hardware.parse_topology("h100").size == 1
    assert hardware.parse_topology("h100:8").size == 8
    # Vendors' figures are GiB less what compiler or driver keep.
    for name, vendor in {"v5e": 16, "v5p": 96, "v6e": 32, "v4": 32, "h100": 80}.items():
        assert 0.95 * vendor * hardware.GIB < hardware.CHIPS[name].memory <= vendor * hardware.GIB


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9:2x2", "no chip 'v9' is known; there are v4, v5e, v5p"),
        ("v5p:4x4", "a v5p slice has 3 dimensions, like v5p:2x2x2"),
        ("v5e:2x4x2", "has 2 dimensions"),
        ("v5e:2x", "is not like"),
        ("v5e:", "is not like"),
        ("v5e:0x4", "is not like"),
        ("h100:2x4", "have no shape"),
        ("v5p", "3 dimensions"),
    ],
)
def test_bad_names(name, said):
    with pytest.raises(ConfigError, match="--topology: ") as told:
        hardware.parse_topology(name)
    assert said in str(told.value)


def test_programs_are_not_compiled_for_a_gpu_that_is_not_there():
    with pytest.raises(ConfigError, match="compiled for TPUs only; --estimate"):
        hardware.absent_devices(hardware.parse_topology("h100:8"))


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "jax\[tpu\]"'):
        hardware.absent_devices(hardware.parse_topology("v5e:2x4"))


def test_peaks_by_the_names_that_jax_gives():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") == peak_flops() == 0.0


def test_this_machine_has_memory():
    chip, count = hardware.local_chip()
    assert chip.memory > hardware.GIB / 2
    assert count >= 1
