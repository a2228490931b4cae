"""A full disk, a folder that is read-only or gone: told by name, and the last good step stays."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pr2jax.core.checkpoint import Checkpointer, CheckpointError
from pr2jax.core.files import check_writable
from pr2jax.core.metrics import MetricWriter, RowWriter, write_json
from pr2jax.core.store import StorageError
from pr2jax.train.journal import Journal

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}


def _state(value):
    return {"x": jnp.full((3,), float(value))}


# Every write of the process to a regular file fails while the limit is 0, TensorStore's too.
FULL = """
    import json, resource, sys
    from pathlib import Path
    import jax, jax.numpy as jnp
    from pr2jax.core.checkpoint import Checkpointer
    from pr2jax.core.metrics import MetricWriter, RowWriter, write_json
    from pr2jax.train.journal import Journal

    folder, said = Path(sys.argv[1]), {}
    def limit(bytes):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.prlimit(0, resource.RLIMIT_FSIZE, (hard if bytes is None else bytes, hard))
    def told(name, what):
        try:
            what()
        except Exception as error:
            said[name] = [type(error).__name__, str(error)]
    state = lambda value: {"x": jnp.full((3,), float(value))}
    board = MetricWriter(folder / "board")
    rows, journal = RowWriter(folder / "rows.jsonl"), Journal(folder / "journal", "run")
    checkpoints = Checkpointer(folder / "checkpoints", keep=1)
    checkpoints.save(1, state(1), {})
    rows.write({"step": 1})
    checkpoints.wait()
    write_json(folder / "summary.json", {"old": 1})
    limit(0)
    for name in ("save", "wait"):
        told(name, lambda: (checkpoints.save(2, state(2), {}), checkpoints.wait()))
    told("row", lambda: rows.write({"step": 2}))
    told("metrics", lambda: board.write(2, {"loss": 1.0}))
    told("json", lambda: write_json(folder / "summary.json", {"new": 1}))
    told("journal", lambda: journal.write(3, {"x": jax.device_get(state(3)["x"])}, {}))
    for what in (rows, board, checkpoints):
        told("closed", what.close)
    limit(None)
    # Another process, so to speak: this one ends.
    with Checkpointer(folder / "checkpoints", keep=1) as checkpoints:
        wanted = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}
        step, restored, _ = checkpoints.restore_whole(wanted)
        said["restored"] = [step, restored["x"].tolist()]
        checkpoints.save(2, state(2), {})
        said["then"] = checkpoints.steps()
    said["left"] = sorted(p.name for p in folder.glob("*/.*")) + [p.name for p in folder.glob(".*")]
    print(json.dumps(said))
"""


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    why = f"cannot be written: {os.strerror(errno.EFBIG)}"
    for name, path in {
        "row": tmp_path / "rows.jsonl",
        "metrics": tmp_path / "board" / "metrics.jsonl",
        "json": tmp_path / "summary.json",
        "journal": tmp_path / "journal" / "step_000003.p0.batch",
    }.items():
        assert said[name] == ["StorageError", f"{path}: {why}"]
    for kind, text in (said["save"], said["wait"]):
        assert kind == "CheckpointError"
        assert str(tmp_path / "checkpoints") in text
    assert said["restored"] == [1, [1.0] * 3]
    assert said["then"] == [2]
    assert said["left"] == []
    assert json.loads((tmp_path / "summary.json").read_text()) == {"old": 1}


def _mounted(folder: Path, mount: str, code: str) -> str:
    """What a program says in a namespace where something is mounted on `folder`."""
    done = subprocess.run(
        [
            *("unshare", "-Urm", "sh", "-c", f'{mount} && exec "$2" -c "$3" "$1"', "sh"),
            *(str(folder), sys.executable, textwrap.dedent(code)),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if "StorageError" not in done.stderr:
        pytest.skip(f"no mount namespace here: {done.stderr[-300:]}")
    return done.stderr


def test_a_file_system_that_is_full(tmp_path):
    code = """
        import sys
        from pr2jax.core.metrics import RowWriter
        rows = RowWriter(sys.argv[1] + "/rows.jsonl")
        for step in range(1000):
            rows.write({"step": step, "text": "x" * 1000})
    """
    said = _mounted(tmp_path, 'mount -t tmpfs -o size=64k none "$1"', code)
    assert f"{tmp_path}/rows.jsonl: cannot be written: No space left on device" in said


def test_a_read_only_mount(tmp_path):
    code = "import sys; from pr2jax.core.files import check_writable as c; c(sys.argv[1])"
    mount = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"'
    said = _mounted(tmp_path, mount, code)
    assert f"StorageError: {tmp_path}: cannot be written: Read-only file system" in said


def test_folders_and_files_that_vanish(tmp_path):
    rows = RowWriter(tmp_path / "rows.jsonl")
    rows.write({"step": 1})
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(StorageError, match=f"^{tmp_path}/rows.jsonl: .*removed while the run"):
        rows.sync()
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpointer(folder)
    checkpoints.save(1, _state(1), {})
    checkpoints.wait()
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=f"^{folder}: .*gone"):
        checkpoints.save(2, _state(2), {})
    assert not folder.exists()
    checkpoints.close()


def test_a_workdir_that_cannot_be_one(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("x")
    for bad, why in (
        (tmp_path / "file", "File exists|Not a directory"),
        (tmp_path / "file" / "below", "Not a directory"),
        ("/proc/pr2jax", "No such file"),
    ):
        with pytest.raises(StorageError, match=f"^{bad}: cannot be written: ({why})"):
            check_writable(bad)


def test_a_read_only_folder():
    """As an ordinary user: root writes into any folder."""
    code = """
        import os, sys
        from pr2jax.core.files import check_writable
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        check_writable(sys.argv[1])
    """
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), folder],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert f"StorageError: {folder}: cannot be written: Permission denied" in done.stderr
        os.chmod(folder, 0o755)


def test_writers_name_what_they_cannot_open(tmp_path):
    (tmp_path / "file").write_text("x")
    for make in (
        lambda: RowWriter(tmp_path / "file" / "rows.jsonl"),
        lambda: MetricWriter(tmp_path / "file"),
        lambda: write_json(tmp_path / "file" / "summary.json", {}),
        lambda: Journal(tmp_path / "file", "run"),
    ):
        with pytest.raises(OSError, match=str(tmp_path / "file")):
            make()
