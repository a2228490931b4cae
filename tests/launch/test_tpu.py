"""launch/tpu.sh against a gcloud that records its calls, runs the workers' side here, and fails."""

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACE = ["--project=my-project", "--zone=us-east5-a", "--name=my-run"]
RUN = ["--config=configs/quickstart.py", "--workdir=gs://bucket/run", "--topology=v5p:2x2x2"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A repository with the scripts as they are here, and nothing to install."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "launch", folder / "launch")
    (folder / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "quickstart.py", folder / "configs")
    (folder / "setup.py").write_text("# nothing\n")
    (folder / ".gitignore").write_text("runs/\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(folder)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    return folder


class World:
    """One folder of the fake gcloud, and the script run in it."""

    def __init__(self, checkout: Path, folder: Path):
        self.checkout, self.folder = checkout, folder
        for name in ("bin", "vm", "bucket"):
            (folder / name).mkdir()
        self._tool("bin/gcloud", f"#!{sys.executable} -SE\n", ROOT / "tests/launch/fake_gcloud.py")
        self._tool("vm/python3.12", "", ROOT / "tests/launch/fake_python.sh")
        self._tool("local_python", "", ROOT / "tests/launch/fake_python.sh")

    def _tool(self, name: str, head: str, source: Path | None = None) -> None:
        path = self.folder / name
        path.write_text(head + (source.read_text() if source else ""))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def scenario(self, codes=(), memory=0, **scenario) -> None:
        """What goes wrong; the exit codes of a worker's starts; that of the memory check."""
        (self.folder / "scenario.json").write_text(json.dumps(scenario))
        (self.folder / "codes").write_text("".join(f"{c}\n" for c in codes))
        (self.folder / "memory").write_text(str(memory))

    @property
    def environment(self) -> dict[str, str]:
        """That of a shell beside this gcloud. Nothing of the surroundings' settings is in it:
        "workers" that heard of PR2JAX_VENV would make the environment of these tests anew."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PR2JAX_")}
        return kept | {
            "FAKE_GCLOUD": str(self.folder),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PR2JAX_PYTHON": str(self.folder / "local_python"),
            "PR2JAX_POLL_S": "0.1",
            "PR2JAX_BACKOFF_S": "0",
            "PR2JAX_QUICK_S": "0",
            "PR2JAX_RETRIES": "1",
        }

    def start(self, *arguments: str) -> subprocess.Popen:
        """The script, running."""
        return subprocess.Popen(
            ["bash", str(self.checkout / "launch" / "tpu.sh"), *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Whoever was started in the background ignores it, and so would all below.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of the script."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def calls(self) -> list[str]:
        """All calls, in order: "create", "describe", "delete" of the request; "setup", "start",
        "poll", "stop" over ssh; "copy"; "node"."""
        path = self.folder / "calls.jsonl"
        lines = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        return [_named(line) for line in lines]

    def counted(self, name: str) -> int:
        """Calls of that name."""
        return self.calls().count(name)

    def starts(self, worker: int = 0) -> list[str]:
        """The command lines of pr2jax.main on a worker, over all slices."""
        path = self.folder / f"count{worker}"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def billed(self) -> bool:
        """Whether the request is still there."""
        path = self.folder / "state.json"
        return path.exists() and json.loads(path.read_text())["exists"]

    def close(self) -> None:
        """Ends what still runs on the workers."""
        for pid in self.folder.glob("slice*/*/pr2jax_run/pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)


def _named(call: list[str]) -> str:
    if call[2] == "queued-resources":
        return call[3]
    if call[3] != "ssh":
        return {"scp": "copy", "describe": "node"}[call[3]]
    line = next(a for a in call if a.startswith("--command="))
    assert "--worker=all" in call
    return line.partition("vm.sh ")[2].split()[0]


@pytest.fixture
def world(checkout, tmp_path):
    """A world without mishaps, until its `scenario` is called."""
    found = World(checkout, tmp_path)
    found.scenario()
    yield found
    found.close()


def essential(calls: list[str]) -> list[str]:
    """Without questions."""
    return [c for c in calls if c not in ("describe", "node", "poll")]


def test_from_a_request_to_the_end(world):
    world.scenario(states=["WAITING_FOR_RESOURCES", "PROVISIONING"], codes=[0])
    code, _, err = world.run("watch", *PLACE, *RUN, "--spot", "--", "--config.seed=3 4")
    assert code == 0, err
    assert essential(world.calls()) == ["create", "copy", "setup", "start", "delete"]
    create = json.loads((world.folder / "calls.jsonl").read_text().splitlines()[1])
    assert {"--type=v5p", "--topology=2x2x2", "--spot", "--node-id=my-run"} <= set(create)
    for worker in (0, 1):
        (line,) = world.starts(worker)
        assert "--config=configs/quickstart.py" in line
        assert line.endswith("--config.seed=3 4")
        assert "--workdir=gs://bucket/run --compilation_cache=gs://bucket/run/xla " in line
    # The memory check came before, with the run's own settings.
    check = (world.folder / "checks").read_text()
    assert "--compile_only --topology=v5p:2x2x2 --config.seed=3 4" in check
    # Lines of the workers are kept here, and beside the run.
    assert "start 1:" in (world.checkout / "runs" / "tpu" / "my-run.log").read_text()
    assert list((world.folder / "bucket" / "run" / "launch").glob("*.log"))
    assert not world.billed


def test_a_bucket_that_the_workers_may_not_write(world):
    world.scenario(codes=[0])
    assert world.run("create", *PLACE, "--topology=v5p:2x2x2")[0] == 0
    (world.folder / "denied").touch()
    code, _, err = world.run("setup", *PLACE, "--workdir=gs://bucket/run", "--ssh_tries=1")
    assert code == 1
    assert "StorageError: gs://bucket: cannot be written: Forbidden" in err
    assert "error: setting up: failed 1 times" in err
    assert world.starts(0) == []


def test_a_run_that_does_not_fit_is_never_asked_for(world):
    world.scenario(memory=1)
    code, _, err = world.run("watch", *PLACE, *RUN)
    assert code == 2
    assert "does not fit v5p:2x2x2" in err
    assert world.calls() == []
    code, _, err = world.run("create", *PLACE, "--topology=v5p:2x2x2")
    assert code == 0, err  # no config, nothing to check
    code, _, err = world.run("watch", *PLACE, *RUN, "--skip_memory_check")
    assert code == 0, err  # goes on with the slice that is there
    assert world.counted("create") == 1


def test_a_config_that_does_not_load_is_never_asked_for(world):
    world.scenario(memory=2)
    code, _, err = world.run("watch", *PLACE, *RUN, "--skip_memory_check")
    assert code == 2
    assert "--config: configs/quickstart.py does not load" in err
    assert world.calls() == []


@pytest.mark.parametrize("keep", [False, True])
def test_no_chips_are_free(world, keep):
    world.scenario(states=["WAITING_FOR_RESOURCES", "FOREVER"])
    code, _, err = world.run(
        "watch", *PLACE, *RUN, "--max_wait_hours=0.0003", *(["--keep"] if keep else [])
    )
    assert code == 75
    assert "no chips of v5p were free" in err
    assert world.counted("delete") == (0 if keep else 1)
    assert world.billed is keep
    assert ("tpu.sh delete --project=my-project" in err) is keep


@pytest.mark.parametrize(
    "message, told",
    [
        ("RESOURCE_EXHAUSTED: Quota limit 'TPUV5PPerProject' has been exceeded", "quota: project"),
        ("INVALID_ARGUMENT: Zone us-east5-a is not available", "--zone: us-east5-a"),
        ("INVALID_ARGUMENT: unknown accelerator type", "--topology: v5p:2x2x2"),
        ("INVALID_ARGUMENT: unsupported runtime", "--runtime_version: v2-alpha-tpuv5"),
        ("PERMISSION_DENIED: tpu.nodes.create", "--project: my-project"),
    ],
)
def test_a_request_that_is_refused(world, message, told):
    world.scenario(create_errors=[message])
    code, _, err = world.run("watch", *PLACE, *RUN)
    assert code == 1
    assert message in err
    assert f"error: {told}" in err
    assert essential(world.calls()) == ["create"]
    assert "still there" not in err


def test_preempted_in_the_middle(world):
    world.scenario(preempt={"1": 2}, codes=["hang", 0])
    code, _, err = world.run("watch", *PLACE, *RUN, "--spot")
    assert code == 0, err
    once = ["create", "copy", "setup", "start", "delete"]
    assert essential(world.calls()) == once + once
    first, second = world.starts(0)
    assert first.replace("slice1", "slice2") == second  # the very same command goes on
    assert not world.billed


def test_preempted_more_often_than_allowed(world):
    world.scenario(preempt={"1": 1, "2": 1, "3": 1}, codes=["hang"] * 9)
    code, _, err = world.run("watch", *PLACE, *RUN, "--spot", "--max_recreations=1")
    assert code == 75
    assert "--max_recreations: 1 were not enough" in err
    assert world.counted("create") == 2
    assert not world.billed


@pytest.mark.parametrize("word", ["scp", "vm.sh setup", "vm.sh start", "vm.sh poll"])
def test_ssh_fails_once(world, word):
    world.scenario(fail={word: 1})
    code, _, err = world.run("watch", *PLACE, *RUN)
    assert code == 0, err
    assert world.counted("create") == 1
    assert len(world.starts()) == 1
    assert not world.billed


def test_setup_never_works(world):
    world.scenario(fail={"vm.sh setup": -1})
    code, _, err = world.run("watch", *PLACE, *RUN, "--ssh_tries=3")
    assert code == 1
    assert "setting up: failed 3 times" in err
    assert world.counted("setup") == 3
    assert world.counted("start") == 0
    assert not world.billed


def test_workers_that_stop_answering_are_left_and_mentioned(world):
    world.scenario(fail={"vm.sh poll": -1}, codes=["hang"])
    code, _, err = world.run("watch", *PLACE, *RUN, "--ssh_tries=2")
    assert code == 1
    assert "the workers do not answer, though the slice is there" in err
    assert "tpu.sh delete --project=my-project --zone=us-east5-a --name=my-run" in err
    assert world.billed  # the job may be running


def test_75_goes_on_on_all_workers(world):
    world.scenario(codes=[75, 75, 75, 0])
    code, _, err = world.run("watch", *PLACE, *RUN)
    assert code == 0, err
    assert len(world.starts(0)) == len(world.starts(1)) == 4
    assert world.counted("create") == 1


def test_2_is_not_tried_again(world):
    world.scenario(codes=[2, 0, 0])
    code, _, err = world.run("watch", *PLACE, *RUN)
    assert code == 2
    assert "refused its configuration" in err
    assert len(world.starts(0)) == 1
    assert not world.billed


def test_other_failures_are_tried_a_few_times(world):
    world.scenario(codes=[1] * 50)
    code, _, err = world.run("watch", *PLACE, *RUN, "--restarts=1")
    assert code == 1
    # restart.sh on the worker: a start and a retry; then all of that once more.
    assert len(world.starts(0)) == 4
    assert "the job failed 2 times, the last time with exit code 1" in err
    assert not world.billed


def test_a_limit_of_time(world):
    world.scenario(codes=["hang"])
    code, _, err = world.run("watch", *PLACE, *RUN, "--max_hours=0.0006", "--keep")
    assert code == 75
    assert "--max_hours=0.0006 are over" in err
    assert world.billed
    assert "To delete it" in err


def test_ctrl_c_says_what_is_left_and_resume_goes_on(world):
    world.scenario(codes=["sigterm"])
    process = world.start("watch", *PLACE, *RUN)
    deadline = time.monotonic() + 30
    while world.counted("poll") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "tpu.sh delete --project=my-project --zone=us-east5-a --name=my-run" in err
    assert world.counted("delete") == 0
    assert world.billed

    code, _, err = world.run("run", *PLACE, *RUN)
    assert code == 1
    assert "a job is running on my-run already" in err
    # The same command stays with it, and neither creates nor sets up anything.
    before, polls = essential(world.calls()), world.counted("poll")
    again = world.start("watch", *PLACE, *RUN)
    # The first poll finds the job, the second one follows it: by then the start is over.
    while world.counted("poll") < polls + 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in world.folder.glob("slice1/*/pr2jax_run/pid"):
        os.kill(int(pid.read_text()), signal.SIGTERM)
    _, err = again.communicate(timeout=30)
    assert again.returncode == 0, err
    assert "the workers ended with 75" in err, err
    assert essential(world.calls())[len(before) :] == ["start", "start", "delete"]
    assert len(world.starts(0)) == 2


def test_step_by_step(world):
    for arguments in (
        ["create", *PLACE, "--topology=v5e:4x4"],
        ["setup", *PLACE, "--workdir=gs://bucket/run"],
        ["run", *PLACE, *RUN[:2]],
        ["resume", *PLACE, *RUN[:2]],
    ):
        code, _, err = world.run(*arguments)
        assert code == 0, err
        assert "tpu.sh delete" in err  # it is billed
    create = json.loads((world.folder / "calls.jsonl").read_text().splitlines()[0])
    assert "--accelerator-type=v5litepod-16" in create
    code, out, err = world.run("status", *PLACE)
    assert code == 0
    assert "my-run is ACTIVE" in err
    assert out.count("ended 0") == 2
    code, out, _ = world.run("logs", *PLACE, "--lines=200")
    assert code == 0
    assert out.count("] start 2:") == 2
    for _ in range(2):  # the second finds nothing
        code, _, err = world.run("delete", *PLACE)
        assert code == 0, err
    assert "deleted before" in err
    code, _, err = world.run("run", *PLACE, *RUN[:2])
    assert code == 1
    assert "--name: my-run is GONE" in err


@pytest.mark.parametrize(
    "command", ["create", "setup", "run", "resume", "watch", "status", "delete"]
)
def test_a_dry_run_calls_nothing(world, command):
    code, out, err = world.run(command, *PLACE, *RUN, "--dry_run")
    assert code == 0, err
    assert world.calls() == []
    assert not (world.folder / "checks").exists()
    lines = out.splitlines()
    assert lines
    assert all(line.startswith(("gcloud compute tpus ", "git archive ")) for line in lines)
    if command == "watch":
        # What it prints are commands: given to a shell, they reach gcloud as the real ones do.
        script = f"mkdir -p runs/tpu\n{out}"
        subprocess.run(
            ["bash", "-e", "-c", script], env=world.environment, cwd=world.checkout, check=True
        )
        done = ["create", "copy", "setup", "start", "delete"]
        assert essential(world.calls()) == done


@pytest.mark.parametrize(
    "change, told",
    [
        ("--project=My_Project", "--project: 'My_Project'"),
        ("--zone=europe", "--zone: 'europe'"),
        ("--name=My_run", "--name: 'My_run'"),
        ("--topology=h100:8", "--topology: 'h100:8'"),
        ("--topology=v5p:4x4", "--topology: a v5p slice has three dimensions"),
        ("--topology=v6e:3x5", "--topology: v6e comes as"),
        ("--workdir=/tmp/run", "--workdir: '/tmp/run'"),
        ("--config=configs/no_such.py", "--config: no file configs/no_such.py"),
        ("--reserved", "--spot: not with --reserved"),
        ("--max_hours=soon", "--max_hours: 'soon'"),
        ("--commit=0123abcd", "--commit: git has no"),
        ("--sopt", "--sopt: no such option"),
        ("--zone=", "--zone: missing"),
    ],
)
def test_bad_input_is_told_by_name(world, change, told):
    code, _, err = world.run("watch", *PLACE, *RUN, "--spot", change)
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {told}")
    assert world.calls() == []
