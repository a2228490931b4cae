"""What hosts tell each other and hand over, in two real processes and in one."""

import dataclasses
import json
import signal
import time
import typing

import numpy as np
import pytest

from pr2jax.core import hosts, sharding
from pr2jax.core.config import ConfigError
from pr2jax.core.peers import Peers
from pr2jax.core.state import TrainState
from pr2jax.models.predictor import RouterFeatures
from pr2jax.sampler.decode import Slots
from pr2jax.sampler.types import Rollout
from tests.hosts import launch


def test_one_process_is_the_identity():
    assert hosts.gather({"a": 1}) == [{"a": 1}]
    assert hosts.from_first([1, "x"]) == [1, "x"]
    assert not hosts.several()
    assert hosts.first()
    assert hosts.own_rows(None, 8) == range(8)
    tree = {"x": np.arange(4.0), "y": 3}
    assert hosts.to_host(tree)["x"] is not None
    with pytest.raises(ValueError, match="own"), hosts.together("trying"):
        raise ValueError("own")
    Peers().leave()  # watches nobody


@pytest.mark.parametrize(
    "flags, told",
    [
        ({"address": "localhost:1"}, "--num_processes: missing"),
        ({"address": "localhost:1", "processes": 2}, "--process_id: missing"),
        ({"address": "localhost:1", "processes": 2, "index": 2}, "--process_id: 2 of 2"),
        ({"address": "x:1", "processes": 2, "index": 0, "mode": "off"}, "--distributed: off"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags, told):
    with pytest.raises(ConfigError, match=told):
        hosts.start(**flags)


def test_nothing_is_joined_where_there_is_nothing(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert not hosts.start()
    assert not hosts.start(mode="off")


class Device:
    """A device as `make_mesh` sees it: of a slice, or only of a host."""

    platform = device_kind = "cpu"

    def __init__(self, number, process, slice_index=None):
        self.id, self.process_index = number, process
        if slice_index is not None:
            self.slice_index = slice_index


@pytest.mark.parametrize("slices", [True, False])
def test_only_the_cut_axes_cross_slices(slices, monkeypatch):
    made = []
    monkeypatch.setattr(
        sharding, "Mesh", lambda array, names, axis_types: made.append(array) or array
    )
    devices = [Device(i, i // 4 if not slices else i // 2, i // 4 if slices else None)
               for i in range(16)]  # fmt: skip
    cfg = sharding.MeshConfig(data=4, fsdp=2, expert=2, dcn_data=2, dcn_fsdp=2)
    cfg.validate()
    mesh = sharding.make_mesh(cfg, devices)
    assert mesh.shape == (4, 2, 2, 1)
    where = np.vectorize(lambda d: d.id // 4)(mesh)  # the slice, or the host
    # Along data the first half lies elsewhere than the second; within a half all is one slice.
    for half in (0, 1):
        for column in (0, 1):
            assert len({*where[2 * half : 2 * half + 2, column].ravel()}) == 1
    assert len({*where.ravel()}) == 4


def test_cuts_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match="dcn_data: 3 does not divide data=4"):
        sharding.MeshConfig(data=4, dcn_data=3).validate()
    devices = [Device(i, i // 4) for i in range(8)]
    with pytest.raises(sharding.ShardingError, match="does not multiply to the 2 hosts"):
        sharding.make_mesh(sharding.MeshConfig(dcn_data=4), devices)
    with pytest.raises(sharding.ShardingError, match="dcn_data=2 does not divide mesh.data=1"):
        sharding.make_mesh(sharding.MeshConfig(fsdp=8, dcn_data=2), devices)


def test_two_processes_tell_and_hand_over(tmp_path):
    found = [json.loads(line) for line in launch.call("tests.hosts.talk", 2, "all")]
    for index, own in enumerate(found):
        assert own["gathered"] == [{"from": 0, "long": "x" * 700}, {"from": 1, "long": ""}]
        assert own["first"] == "of 0"
        # Rows 0..3 of eight are of process 0; all see all of them after `to_host`.
        assert own["rows"] == [4 * index, 4 * index + 4]
        assert own["whole"] == list(range(24))
        assert own["back"] == [list(range(12 * index, 12 * index + 12))] * 2
        assert own["axis1"] == list(range(16))
        assert own["mesh"] == [[0, 0], [1, 1]]
    assert found[0]["error"] == "HostError: reading: process 1 (" + found[1]["name"] + (
        "): ValueError: broken on 1"
    )
    assert found[1]["error"] == "ValueError: broken on 1"


@pytest.mark.slow
@pytest.mark.parametrize("signal_number, limit", [(signal.SIGKILL, 20), (signal.SIGSTOP, 40)])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_peer_ends_the_other_by_name(victim, signal_number, limit):
    processes = launch.python("tests.hosts.talk", 2, "wait")
    try:
        for process in processes:
            launch.ready(process)
        processes[victim].send_signal(signal_number)
        start = time.monotonic()
        other = processes[1 - victim]
        said = other.communicate(timeout=limit)[0].decode()
        assert other.returncode == 75
        assert f"process {victim} (" in said
        how = "is gone" if signal_number == signal.SIGKILL else "has been silent for 6 s"
        assert how in said
        assert f"pid {processes[victim].pid}" in said
        assert time.monotonic() - start < limit
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_a_peer_that_fails_says_why_to_all():
    processes = launch.python("tests.hosts.talk", 2, "fail")
    said = [process.communicate(timeout=60)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "process 1 (" in said[0]
    assert "failed: ConfigError: rl.steps: bad" in said[0]


@pytest.mark.slow
def test_an_orderly_end_alarms_no_one():
    processes = launch.python("tests.hosts.talk", 2, "leave")
    said = [process.communicate(timeout=60)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "gone" not in "".join(said)


@pytest.mark.slow
def test_one_stop_stops_all_after_the_same_step():
    processes = launch.python("tests.hosts.talk", 2, "stop")
    for process in processes:
        launch.ready(process)
    time.sleep(0.3)
    processes[1].send_signal(signal.SIGTERM)
    steps = [process.communicate(timeout=60)[0].decode().split()[-1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("cls", [Rollout, RouterFeatures, Slots, TrainState])
def test_a_type_says_where_its_fields_live(cls):
    # The modules' own names: jaxtyping's shapes are strings to everyone else.
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        if not field.metadata.get("pytree_node", True):
            continue
        kinds = [hints[field.name], *typing.get_args(hints[field.name])]
        markers = {m for k in kinds for m in getattr(k, "__metadata__", ())}
        assert len(markers & {"global", "every host", "own host"}) == 1, field.name
