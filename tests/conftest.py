"""Eight fake CPU devices before JAX starts, and the bridge to the reference implementations."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.xla import flags

# Device count and platform are read when the backend starts, so this must come before any test.
os.environ["XLA_FLAGS"] = flags(8, os.environ.get("XLA_FLAGS", ""))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation, and many tests compile the same programs.
_CACHE = Path(__file__).resolve().parent.parent / ".pytest_cache" / "xla"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests import gcs  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RUNNER = ROOT / "tests" / "reference" / "run.py"
TIMEOUT_S = 600
_NO_TIME = "no time was left (PR2JAX_SLOW_UNTIL)"


def reference_python() -> tuple[Path | None, str]:
    """The interpreter that has torch: PR2JAX_REFERENCE_PYTHON, else .venv-ref, else (None, why)."""
    named = os.environ.get("PR2JAX_REFERENCE_PYTHON")
    if named:
        path = Path(named)
        return (path, "") if path.exists() else (None, f"PR2JAX_REFERENCE_PYTHON={named} not found")
    path = ROOT / ".venv-ref" / "bin" / "python"
    return (path, "") if path.exists() else (None, "no .venv-ref (launch/test.sh makes it)")


@pytest.fixture(scope="session")
def _store():
    with gcs.serving() as store:
        yield store


@pytest.fixture
def store(_store, request):
    """A store of objects that gs://bucket/... means in this test and in processes it starts; the
    clients keep a connection to it, so it is one for all tests."""
    yield _store
    _store.fault = lambda method, path: None
    _store.buckets.clear()
    _store.buckets[gcs.BUCKET] = {}


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """`reference(job, arrays=None, params=None) -> arrays`, computed by another implementation.

    Runs tests/reference/jobs/JOB.py in the reference environment (torch, transformers) as its own
    process; numpy arrays and JSON-able parameters go there and arrays come back by file.  Starting
    torch takes seconds: hand one job all of a module's cases.  Without that environment the tests
    that ask are skipped, or fail where PR2JAX_REQUIRE_REFERENCE=1 (`.ci/run`).
    """
    python, why = reference_python()
    if python is None:
        message = f"reference environment missing: {why}"
        if os.environ.get("PR2JAX_REQUIRE_REFERENCE") == "1":
            pytest.fail(message)
        pytest.skip(message)

    def call(job, arrays=None, params=None):
        folder = tmp_path_factory.mktemp(f"reference_{job}")
        np.savez(folder / "in.npz", **(arrays or {}))
        (folder / "in.json").write_text(json.dumps(params or {}))
        keep = ("PATH", "HOME", "TMPDIR", "LANG", "LD_LIBRARY_PATH")
        environment = {k: os.environ[k] for k in keep if k in os.environ}
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        done = subprocess.run(
            [python, "-I", RUNNER, job, folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        if done.returncode:
            raise RuntimeError(f"reference job {job!r} failed:\n{done.stdout[-6000:]}")
        with np.load(folder / "out.npz") as out:
            return dict(out)

    return call


def pytest_runtest_setup(item):
    """Slow tests run while there is time: until PR2JAX_SLOW_UNTIL (unix seconds), if it is set."""
    until = os.environ.get("PR2JAX_SLOW_UNTIL")
    if until and item.get_closest_marker("slow") and time.time() > float(until):
        pytest.skip(_NO_TIME)


def pytest_terminal_summary(terminalreporter):
    """Says how many tests were skipped for want of time, or of the reference environment."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [str(r.longrepr[2]) for r in skipped if isinstance(r.longrepr, tuple)]
    reasons = [r.removeprefix("Skipped: ") for r in reasons]
    late = reasons.count(_NO_TIME)
    if late:
        terminalreporter.write_line(f"{late} slow tests not run: {_NO_TIME}")
    reasons = [r for r in reasons if "reference environment" in r]
    if reasons:
        terminalreporter.write_line(f"{len(reasons)} reference tests skipped: {reasons[0]}")


def pytest_configure():
    if "torch" in sys.modules:
        raise pytest.UsageError("torch does not belong in this environment")
