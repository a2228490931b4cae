"""XLA's flags by platform: merged under the user's, and known to the XLA that is installed."""

import os
import subprocess
import sys

import pytest

from pr2jax.core import xla_flags


def test_the_user_has_the_last_word():
    mine = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/tmp/x"
    environ = {"XLA_FLAGS": mine}
    assert xla_flags.apply("gpu", environ) == "gpu"
    assert environ == {"XLA_FLAGS": mine}


def test_flags_are_added_once_and_to_the_platforms_variable():
    environ = {"LIBTPU_INIT_ARGS": "--a=1"}
    for _ in range(2):
        xla_flags.apply("tpu", environ)
    words = environ["LIBTPU_INIT_ARGS"].split()
    assert words[0] == "--a=1"
    assert words[1:] == [f"--{n}={v}" for n, v in xla_flags.xla_flags("tpu").items()]
    assert "XLA_FLAGS" not in environ
    environ = {}
    xla_flags.apply("cpu", environ)
    assert environ == {}


@pytest.mark.parametrize(
    "named, platform",
    [("cpu", "cpu"), ("cuda", "gpu"), ("gpu,cpu", "gpu"), ("tpu", "tpu"), ("tpu,cpu", "tpu")],
)
def test_the_platform_that_is_named(named, platform):
    assert xla_flags.platform_here({"JAX_PLATFORMS": named}) == platform


def test_another_platform_is_an_error():
    with pytest.raises(ValueError, match="platform: 'abacus'"):
        xla_flags.xla_flags("abacus")


def test_a_shell_can_read_them():
    script = 'eval "$("$0" -m pr2jax.core.xla_flags gpu)" && printf %s "$XLA_FLAGS"'
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        ["bash", "-c", script, sys.executable], env=environment, capture_output=True, text=True
    )
    assert done.stdout == xla_flags.merged("gpu", "")
    assert "latency_hiding" in done.stdout


def test_this_xla_knows_the_gpu_flags():
    """A flag that it does not know ends the process, whatever the device."""
    code = "import jax; print(int(jax.jit(lambda x: x + 1)(1)))"
    for flags, ends in ((xla_flags.merged("gpu", ""), True), ("--xla_gpu_no_such=1", False)):
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
        assert (done.returncode == 0) is ends, done.stderr[-500:]
