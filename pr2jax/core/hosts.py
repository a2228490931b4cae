"""Several processes as one: start-up, what they tell each other, arrays in and out.

One process a host; every process runs the same Python on the same numbers, and a mesh spans the
devices of all. Where a structure's field lives is part of its type: `Global`, `EveryHost`,
`OwnHost`. With one process all of this is the identity.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pr2jax.core.config import ConfigError
from pr2jax.core.sharding import batch_sharding, batch_shards, replicated

T = TypeVar("T")

# A jax.Array over the whole mesh: a host holds its devices' shards of it.
Global = Annotated[T, "global"]
# Numpy, whole, and the same on every host.
EveryHost = Annotated[T, "every host"]
# Numpy, each host its own part.
OwnHost = Annotated[T, "own host"]

log = logging.getLogger("pr2jax")

_HEARTBEAT_S = 100


class HostError(RuntimeError):
    """What one host was doing failed, told on all of them; names the host."""


class AbsentHost(HostError):
    """A host did not come in time: start all of them again."""


def start(
    address: str | None = None,
    processes: int | None = None,
    index: int | None = None,
    mode: str = "auto",
) -> bool:
    """Joins the processes of a run (`jax.distributed`); whether there is anything to join.

    With "auto" that is where an address is given, or the surroundings tell of several hosts (TPU
    pods and slices, JAX_COORDINATOR_ADDRESS) or of a TPU; "on" insists, "off" never does.
    Call it before anything asks for devices.

    Raises ConfigError naming the flag, or what jax.distributed could not find; AbsentHost where
    some process did not come within its time.
    """
    given = {"coordinator_address": address, "num_processes": processes, "process_id": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        if mode == "off" or (mode == "auto" and not _surrounded()):
            return False
        given = {}
    elif mode == "off":
        raise ConfigError("--distributed: off, but an address or a process is given")
    elif missing:
        raise ConfigError(f"--{missing[0]}: missing; an address goes with a number and an index")
    elif not 0 <= index < processes:
        raise ConfigError(f"--process_id: {index} of {processes} processes")
    # A peer that is gone is told of by `peers`, by name; by itself the runtime would abort us.
    jax.config.update("jax_enable_recoverability", True)
    if os.environ.get("JAX_PLATFORMS", "") in ("", "cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=_HEARTBEAT_S)
    except Exception as error:
        told = str(error).strip().splitlines()[0][:300]
        if "DEADLINE_EXCEEDED" in str(error) or "UNAVAILABLE" in str(error):
            where = address or "process 0"
            raise AbsentHost(f"not all processes came to {where}: {told}") from None
        raise ConfigError(
            f"--coordinator_address: {address or 'found by itself'}: {told}"
        ) from None
    log.info("process %d of %d on %s", jax.process_index(), jax.process_count(), host_name())
    return True


def _surrounded() -> bool:
    """Whether this looks like one host of several, or like a TPU VM (which may be one)."""
    environ = os.environ
    if environ.get("JAX_PLATFORMS") not in (None, "", "tpu"):
        return "JAX_COORDINATOR_ADDRESS" in environ
    named = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")
    several = "," in environ.get("TPU_WORKER_HOSTNAMES", "")
    chips = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return several or chips or any(name in environ for name in named)


def host_name() -> str:
    """This machine's name."""
    return socket.gethostname()


def several() -> bool:
    """Whether there is more than one process."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes for all."""
    return jax.process_index() == 0


# ------------------------------------------------------------------ what they tell each other


def gather(value: Any) -> list[Any]:
    """Every process's `value` (JSON), in their order. All must call it."""
    if not several():
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array(len(data))))
    # Powers of two: a program for each size is compiled.
    padded = np.zeros(1 << max(8, int(sizes.max() - 1).bit_length()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes.tolist(), strict=True)]


def from_first(value: Any) -> Any:
    """Process 0's `value` (JSON) on all: for what only one can know, or must decide."""
    return gather(value if first() else None)[0] if several() else value


def meet(mesh: Mesh | None) -> None:
    """Has every group of devices along the mesh's axes connect now, while all hosts are here.

    CPU processes connect when a group's first collective runs, and wait for each other for 30 s
    only: too short where one compiles longer than another. Elsewhere it does nothing.
    """
    if mesh is None or not several() or jax.devices()[0].platform != "cpu":
        return
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    for size in range(1, len(names) + 1):
        for axes in itertools.combinations(names, size):
            total = jax.shard_map(
                functools.partial(jax.lax.psum, axis_name=axes),
                mesh=mesh,
                in_specs=PartitionSpec(axes),
                out_specs=PartitionSpec(),
            )
            ones = np.ones(math.prod(mesh.shape[a] for a in axes), np.float32)
            jax.block_until_ready(
                jax.jit(total)(put(ones, NamedSharding(mesh, PartitionSpec(axes))))
            )
            gather(None)


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """A part that each host does on its own: what fails on one is raised on all.

    The host itself raises its own error, the others HostError naming it, instead of waiting for
    it in the next collective for ever. Nothing inside may talk to other hosts.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if not several():
        if error is not None:
            raise error
        return
    told = None if error is None else f"{host_name()}): {type(error).__name__}: {error}"
    found = gather(told)
    if error is not None:
        raise error
    for index, text in enumerate(found):
        if text is not None:
            raise HostError(f"{what}: process {index} ({text}")


# ------------------------------------------------------------------ arrays in and out


def to_host(tree: Any) -> Any:
    """A tree of arrays as numpy, whole on every host. All must call it.

    Shards of other hosts travel; on one host it is `jax.device_get`.
    """
    if not several():
        return jax.device_get(tree)
    leaves, structure = jax.tree.flatten(tree)
    away = [i for i, x in enumerate(leaves) if _is_away(x)]
    for i, whole in zip(away, _gathered([leaves[i] for i in away]), strict=True):
        leaves[i] = whole
    return jax.device_get(jax.tree.unflatten(structure, leaves))


def _is_away(x: Any) -> bool:
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)


def _gathered(leaves: list[jax.Array]) -> list[jax.Array]:
    """The arrays, replicated by one program."""
    if not leaves:
        return []
    mesh = next((x.sharding.mesh for x in leaves if isinstance(x.sharding, NamedSharding)), None)
    if mesh is None:
        return [multihost_utils.process_allgather(x, tiled=True) for x in leaves]
    return _replicate(mesh)(leaves)


def _replicate(mesh: Mesh) -> Any:
    if mesh not in _REPLICATE:
        _REPLICATE[mesh] = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))
    return _REPLICATE[mesh]


_REPLICATE: dict[Mesh, Any] = {}


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every host has whole (`EveryHost`), or a global one, laid out by `sharding`.

    Of numpy each host hands over only what its devices hold; nothing travels.
    """
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return _move(sharding)(x)
    if not several():
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _move(sharding: NamedSharding) -> Any:
    if sharding not in _MOVE:
        _MOVE[sharding] = jax.jit(lambda x: x, out_shardings=sharding)
    return _MOVE[sharding]


_MOVE: dict[NamedSharding, Any] = {}


def put_own(
    x: np.ndarray, sharding: NamedSharding, total: int, first: int, axis: int = 0
) -> jax.Array:
    """A global array of `total` rows, of which this host has those from `first` on (`OwnHost`)."""
    shape = (*x.shape[:axis], total, *x.shape[axis + 1 :])

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[axis].indices(total)
        return x[(*index[:axis], slice(start - first, stop - first), *index[axis + 1 :])]

    return jax.make_array_from_callback(shape, sharding, shard)


def rows_of(x: jax.Array, rows: range, axis: int = 0) -> np.ndarray:
    """Those rows of a global array as numpy, out of the shards that this host holds."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        whole = np.asarray(x)
        return whole[(slice(None),) * axis + (slice(rows.start, rows.stop),)]
    out = np.empty((*x.shape[:axis], len(rows), *x.shape[axis + 1 :]), x.dtype)
    for shard in x.addressable_shards:
        start, stop, _ = shard.index[axis].indices(x.shape[axis])
        lead = shard.index[:axis]
        out[(*lead, slice(start - rows.start, stop - rows.start))] = np.asarray(shard.data)
    return out


def own_rows(mesh: Mesh | None, rows: int) -> range:
    """The rows of a batch of `rows` that this host's devices hold, as the smallest range."""
    if mesh is None or not several():
        return range(rows)
    if rows % batch_shards(mesh):
        return range(rows)
    slices = batch_sharding(mesh, 1).addressable_devices_indices_map((rows,)).values()
    bounds = [s[0].indices(rows)[:2] for s in slices]
    return range(min(b[0] for b in bounds), max(b[1] for b in bounds))
