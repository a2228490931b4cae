"""Meshes and axis rules: layouts that are right, and faults that name the parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pr2jax.core.config import ConfigError
from pr2jax.core.params import ParamSpec, zeros
from pr2jax.core.sharding import (
    MeshConfig,
    ShardingError,
    batch_sharding,
    make_mesh,
    param_shardings,
    partition_spec,
    replicated,
)


def spec(shape, *axes):
    return ParamSpec(shape, axes, zeros)


def test_mesh_sizes():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh(MeshConfig(), devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize("cfg", [MeshConfig(fsdp=3), MeshConfig(data=2), MeshConfig(tensor=16)])
def test_mesh_must_multiply_to_the_devices(cfg):
    with pytest.raises(ShardingError, match="mesh.tensor=.* 8 devices"):
        make_mesh(cfg)


@pytest.mark.parametrize(
    ("cfg", "key"), [(MeshConfig(fsdp=0), "fsdp"), (MeshConfig(tensor=-1), "tensor")]
)
def test_mesh_sizes_are_validated(cfg, key):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        cfg.validate()


def test_partition_specs():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    experts = spec((3, 4, 8, 6), "layers", "experts", "expert_embed", "mlp")
    assert partition_spec("w", experts, mesh) == P(None, "expert", "fsdp", "tensor")
    assert partition_spec("s", spec((8,), "norm"), mesh) == P()
    assert partition_spec("o", spec((4, 6, 8), "heads", None, "embed"), mesh) == P(
        "tensor", None, ("fsdp", "expert")
    )
    both = {"embed": ("fsdp", "tensor")}
    assert partition_spec("e", spec((8, 3), "embed", None), mesh, both) == P(("fsdp", "tensor"))


def test_axes_of_size_one_are_left_out():
    mesh = make_mesh(MeshConfig(fsdp=8))
    assert partition_spec("w", spec((4, 16), "mlp", "embed"), mesh) == P(None, "fsdp")
    assert partition_spec("w", spec((16, 4), "embed", "mlp"), mesh) == P("fsdp")
    assert batch_sharding(mesh, 2).spec == P("fsdp")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (spec((8, 8), "embed", "embed"), "'embed' and 'embed' both go to the mesh axis 'fsdp'"),
        (spec((8, 8), "heads", "mlp"), "'heads' and 'mlp' both go to the mesh axis 'tensor'"),
        (spec((7, 8), "embed", "mlp"), "'embed' of 7 is not divided by fsdp = 2"),
        (spec((8, 8), "embde", "mlp"), "no sharding rule for its axis 'embde'"),
    ],
)
def test_faults_name_the_parameter(bad, message):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    with pytest.raises(ShardingError, match=f"^block/w: .*{message}"):
        param_shardings({"block": {"w": bad, "fine": spec((8,), "embed")}}, mesh)


def test_collision_is_found_on_one_device_too():
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    with pytest.raises(ShardingError, match="both go to"):
        partition_spec("w", spec((8, 8), "embed", "embed"), mesh)


def test_batch_rows_are_split_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert batch_sharding(mesh, 2).spec == P(("data", "fsdp"))
    routes = batch_sharding(mesh, 4, batch_axis=1)
    placed = jax.device_put(jnp.arange(3 * 8 * 2 * 2).reshape(3, 8, 2, 2), routes)
    assert {s.data.shape for s in placed.addressable_shards} == {(3, 2, 2, 2)}
    whole = jax.device_put(np.ones((3,)), replicated(mesh))
    assert {s.data.shape for s in whole.addressable_shards} == {(3,)}
