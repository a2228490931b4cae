"""Meshes and logical-axis rules: how a `ParamSpec` tree lies on devices.

A rule sends a logical axis to mesh axes. One parameter may use a mesh axis once, and a mesh axis
must divide the dimension it splits; either fault is a `ShardingError` naming the parameter.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pr2jax.core.config import ConfigError
from pr2jax.core.params import ParamSpec, map_with_path

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")

Rules = Mapping[str, str | tuple[str, ...] | None]

# How a learner's parameters lie: every large one is spread over all of the mesh.
RULES: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": ("fsdp", "expert"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "expert",
    "expert_embed": "fsdp",
    "norm": None,
}


class ShardingError(ValueError):
    """A parameter or a batch cannot be laid out on the mesh as asked."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; `data=-1` takes the devices that the others leave.

    Attributes:
      data: rows; parameters are copied.
      fsdp: rows, and a part of every parameter.
      expert: rows, and a part of the experts.
      tensor: heads and widths.
      dcn_data, dcn_fsdp: into how many parts that axis is cut by slices (of GPUs and CPUs: hosts).
        Its neighbours within a part, and those of every other axis, share a slice and its fast
        network (ICI); only cuts cross the data centre's (DCN). 1 and 1: devices in their order.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    dcn_data: int = 1
    dcn_fsdp: int = 1

    def validate(self) -> None:
        """Raise ConfigError for a size that no mesh can have."""
        for name in (*MESH_AXES, "dcn_data", "dcn_fsdp"):
            size = getattr(self, name)
            if size < 1 and not (name == "data" and size == -1):
                rest = ", or -1 for the rest" if name == "data" else ""
                raise ConfigError(f"{name}: {size} devices; need at least 1{rest}")
            cut = name.removeprefix("dcn_")
            if cut != name and getattr(self, cut) > 0 and getattr(self, cut) % size:
                raise ConfigError(f"{name}: {size} does not divide {cut}={getattr(self, cut)}")


def mesh_sizes(cfg: MeshConfig, count: int) -> dict[str, int]:
    """Devices along each axis of a mesh of `count` devices.

    Raises ShardingError when the sizes do not multiply to that.
    """
    cfg.validate()
    sizes = {name: getattr(cfg, name) for name in MESH_AXES}
    if sizes["data"] == -1:
        sizes["data"] = max(1, count // math.prod(sizes[a] for a in MESH_AXES[1:]))
    if math.prod(sizes.values()) != count:
        asked = " x ".join(f"mesh.{name}={getattr(cfg, name)}" for name in MESH_AXES)
        raise ShardingError(f"{asked} does not multiply to the {count} devices present")
    return sizes


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes ("data", "fsdp", "expert", "tensor") over `devices` (default: all).

    Raises ShardingError when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(cfg, len(devices))
    if cfg.dcn_data * cfg.dcn_fsdp > 1:
        return _across_slices(cfg, sizes, devices)
    return jax.make_mesh(
        tuple(sizes.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices,
    )


def _across_slices(cfg: MeshConfig, sizes: dict[str, int], devices: list[jax.Device]) -> Mesh:
    """A mesh whose cut axes alone cross slices (or hosts, of devices that are in no slice)."""
    slices = {getattr(device, "slice_index", None) for device in devices}
    by_host = len(slices) == 1
    count = len({d.process_index for d in devices}) if by_host else len(slices)
    cuts = {"data": cfg.dcn_data, "fsdp": cfg.dcn_fsdp}
    if math.prod(cuts.values()) != count:
        raise ShardingError(
            f"mesh.dcn_data={cfg.dcn_data} x mesh.dcn_fsdp={cfg.dcn_fsdp} does not multiply to "
            f"the {count} {'hosts' if by_host else 'slices'} present"
        )
    dcn = [cuts.get(name, 1) for name in MESH_AXES]
    for name, cut in cuts.items():
        if sizes[name] % cut:
            raise ShardingError(f"mesh.dcn_{name}={cut} does not divide mesh.{name}={sizes[name]}")
    inside = [size // cut for size, cut in zip(sizes.values(), dcn, strict=True)]
    placed = mesh_utils.create_hybrid_device_mesh(inside, dcn, devices, process_is_granule=by_host)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _canonical(entries: list[tuple[str, ...]]) -> PartitionSpec:
    # One spelling per layout: jit caches by sharding, so P("x", None) and P("x") would compile
    # the same program twice.
    dims = [e[0] if len(e) == 1 else (e or None) for e in entries]
    while dims and dims[-1] is None:
        dims.pop()
    return PartitionSpec(*dims)


def partition_spec(path: str, spec: ParamSpec, mesh: Mesh, rules: Rules = RULES) -> PartitionSpec:
    """The PartitionSpec of one parameter; mesh axes of size 1 are left out of it.

    Raises ShardingError, naming `path`, for a logical axis without a rule, a mesh axis used by
    two dimensions (whatever its size: the fault should not wait for a bigger mesh), or a
    dimension that its mesh axes do not divide.
    """
    used: dict[str, str] = {}
    entries = []
    for dim, axis in zip(spec.shape, spec.axes, strict=True):
        if axis is not None and axis not in rules:
            raise ShardingError(f"{path}: no sharding rule for its axis {axis!r}")
        target = rules[axis] if axis is not None else None
        names = () if target is None else (target,) if isinstance(target, str) else tuple(target)
        for name in names:
            if name not in mesh.shape:
                raise ShardingError(f"{path}: axis {axis!r} goes to the unknown mesh axis {name!r}")
            if name in used:
                raise ShardingError(
                    f"{path}: axes {used[name]!r} and {axis!r} both go to the mesh axis {name!r}"
                )
            used[name] = axis
        names = tuple(n for n in names if mesh.shape[n] > 1)
        size = math.prod(mesh.shape[n] for n in names)
        if dim % size:
            raise ShardingError(
                f"{path}: dimension {axis!r} of {dim} is not divided by "
                f"{' x '.join(names)} = {size} devices"
            )
        entries.append(names)
    return _canonical(entries)


def mesh_axes(mesh: Mesh, rules: Rules, axis: str) -> tuple[str, ...]:
    """The mesh axes of more than one device that `rules` split a logical axis over."""
    target = rules[axis]
    names = () if target is None else (target,) if isinstance(target, str) else tuple(target)
    return tuple(n for n in names if mesh.shape[n] > 1)


def decode_rules(mesh: Mesh, num_experts: int) -> Rules:
    """How a sampler's parameters lie: RULES gather weights for every product, which a decode step
    of few tokens cannot pay for.

    Experts lie over ("fsdp", "expert") where those divide them, so that each device holds whole
    ones; what every token needs is on every device (but for the tensor axis).
    """
    spread = ("fsdp", "expert")
    if num_experts % math.prod(mesh.shape[a] for a in spread):
        spread = ("expert",)
    return {**RULES, "embed": None, "expert_embed": None, "experts": spread}


def param_shardings(specs: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A NamedSharding for each parameter of `specs`. Raises ShardingError (`partition_spec`)."""
    return map_with_path(
        lambda path, spec: NamedSharding(mesh, partition_spec(path, spec, mesh, rules)), specs
    )


def row_axes(mesh: Mesh, rows: int) -> tuple[str, ...]:
    """The axes that `rows` rows are split over: of BATCH_AXES, in order, as many as divide them.

    The devices of an axis left out hold the same rows (a prefill of few prompts).
    """
    names: tuple[str, ...] = ()
    for name in BATCH_AXES:
        if rows % math.prod(mesh.shape[a] for a in (*names, name)):
            break
        names = (*names, name)
    return tuple(n for n in names if mesh.shape[n] > 1)


def row_sharding(mesh: Mesh, shape: Sequence[int], axis: int = 0) -> NamedSharding:
    """An array of `shape` with the rows of dimension `axis` over `row_axes`, else replicated."""
    entries: list[tuple[str, ...]] = [()] * len(shape)
    entries[axis] = row_axes(mesh, shape[axis])
    return NamedSharding(mesh, _canonical(entries))


def batch_sharding(mesh: Mesh, ndim: int, batch_axis: int = 0) -> NamedSharding:
    """Rows split over BATCH_AXES, every other dimension of an `ndim`-array replicated."""
    entries: list[tuple[str, ...]] = [()] * ndim
    entries[batch_axis] = tuple(a for a in BATCH_AXES if mesh.shape[a] > 1)
    return NamedSharding(mesh, _canonical(entries))


def batch_shards(mesh: Mesh) -> int:
    """Devices that the rows of a batch are split over."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())
