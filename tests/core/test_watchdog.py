"""A step that takes far too long leaves stacks, once; nothing else happens."""

import logging
import threading
import time

import pytest

from pr2jax.core import goodput
from pr2jax.core.watchdog import Watchdog


def _steps(watchdog, seconds, first=1):
    for step, long in enumerate(seconds, first):
        watchdog.begin(step)
        _linger(long)
        watchdog.end()


def _linger(seconds):
    time.sleep(seconds)


def test_a_long_step_is_written_down_once_and_goes_on(tmp_path, caplog):
    with (
        caplog.at_level(logging.WARNING, "pr2jax"),
        goodput.recording(tmp_path),
        Watchdog(tmp_path, factor=5.0, least_s=0.2) as watchdog,
        goodput.during("verify"),
    ):
        # The first compiles, so to speak; then a slow one comes twice.
        _steps(watchdog, [0.4, 0.01, 0.01, 0.01, 0.6, 0.01, 0.5, 0.01])
    stacks = sorted((tmp_path / "stacks").iterdir())
    assert [p.name for p in stacks] == ["step_5.p0.txt", "step_7.p0.txt"]
    text = stacks[0].read_text()
    assert "during: verify" in text
    assert "in _linger" in text  # the main thread
    assert text.lower().count("thread 0x") >= 2
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 2
    assert f"{stacks[0]}" in told[0]
    assert "step 5 takes longer than 0.2 s (verify is going on)" in told[0]


def test_the_limit_is_of_the_median_of_earlier_steps(tmp_path):
    now = [0.0]
    watchdog = Watchdog(tmp_path, factor=10.0, least_s=60.0, clock=lambda: now[0])
    assert watchdog.limit() is None
    limits = []
    for step, seconds in enumerate((300.0, 2.0, 30.0, 30.0, 500.0), 1):
        watchdog.begin(step)
        now[0] += seconds
        watchdog.end()
        limits.append(watchdog.limit())
    # Without the first: medians of (2), (2, 30), (2, 30, 30), (2, 30, 30, 500).
    assert limits == [None, 60.0, 160.0, 300.0, 300.0]


def test_off_and_unwritable(tmp_path, caplog):
    before = threading.active_count()
    with Watchdog(tmp_path, factor=0.0, least_s=0.0) as watchdog:
        assert threading.active_count() == before
        _steps(watchdog, [0.01, 0.01, 0.05])
    (tmp_path / "stacks").write_text("a file is here")
    with (
        caplog.at_level(logging.WARNING, "pr2jax"),
        Watchdog(tmp_path, factor=2.0, least_s=0.05) as watchdog,
    ):
        _steps(watchdog, [0.01, 0.01, 0.3])
    assert "its stacks cannot be written" in caplog.text
    assert threading.active_count() == before


def test_configuration():
    from pr2jax.core.config import ConfigError
    from pr2jax.train.config import LoopConfig

    LoopConfig().validate()
    LoopConfig(watchdog_factor=0.0).validate()
    for bad in ({"watchdog_factor": 0.5}, {"watchdog_factor": -1.0}, {"watchdog_min_s": -1.0}):
        with pytest.raises(ConfigError, match=f"^{next(iter(bad))}: "):
            LoopConfig(**bad).validate()
