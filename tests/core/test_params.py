"""Parameter specs: values, shapes, counts and paths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pr2jax.core import rng
from pr2jax.core.params import (
    ParamSpec,
    abstract_params,
    count_params,
    fan_in,
    init_params,
    map_with_path,
    normal,
    ones,
    tree_paths,
    zeros,
)
from pr2jax.core.sharding import MeshConfig, make_mesh, param_shardings

SPECS = {
    "embed": {"table": ParamSpec((16, 8), ("vocab", "embed"), normal(0.02))},
    "block": {
        "kernel": ParamSpec((4, 64, 32), ("layers", "embed", "mlp"), fan_in(-2), jnp.bfloat16),
        "bias": ParamSpec((4, 32), ("layers", "mlp"), zeros),
    },
    "norm": {"scale": ParamSpec((8,), ("norm",), ones)},
}


def test_paths_and_count():
    assert tree_paths(SPECS) == ["block/bias", "block/kernel", "embed/table", "norm/scale"]
    assert count_params(SPECS) == 16 * 8 + 4 * 64 * 32 + 4 * 32 + 8
    named = map_with_path(lambda path, spec: (path, spec.shape), SPECS)
    assert named["embed"]["table"] == ("embed/table", (16, 8))


def test_initial_values():
    params = init_params(SPECS, rng.root(0))
    kernel = np.asarray(params["block"]["kernel"], np.float64)
    assert params["block"]["kernel"].dtype == jnp.bfloat16
    # 8192 draws: the standard error of the deviation is 0.8%, of the mean 1.4e-3.
    assert abs(kernel.std() / 64**-0.5 - 1) < 0.05
    assert abs(kernel.mean()) < 0.01
    assert np.all(np.asarray(params["block"]["bias"]) == 0)
    assert np.all(np.asarray(params["norm"]["scale"]) == 1)


def test_value_depends_on_path_not_on_company_or_mesh():
    key = rng.root(3)
    whole = init_params(SPECS, key)
    alone = init_params({"embed": SPECS["embed"]}, key)
    equal = functools.partial(np.testing.assert_allclose, rtol=1e-6)  # ulps, see init_params
    equal(whole["embed"]["table"], alone["embed"]["table"])
    twin = init_params({"other": SPECS["embed"]}, key)["other"]["table"]
    assert not np.array_equal(twin, whole["embed"]["table"])
    shardings = param_shardings(SPECS, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    spread = init_params(SPECS, key, shardings)
    assert spread["block"]["kernel"].sharding == shardings["block"]["kernel"]
    equal(whole["embed"]["table"], spread["embed"]["table"])
    bits = [np.asarray(x["block"]["kernel"], np.float32) for x in (whole, spread)]
    np.testing.assert_allclose(*bits, rtol=2**-7)  # an ulp of bfloat16


def test_abstract_matches_concrete():
    shardings = param_shardings(SPECS, make_mesh(MeshConfig(fsdp=4)))
    abstract = abstract_params(SPECS, shardings)
    concrete = init_params(SPECS, rng.root(0), shardings)

    def same(a, b):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)

    jax.tree.map(same, abstract, concrete)
    assert abstract_params(SPECS)["norm"]["scale"].sharding is None


def test_axes_must_name_every_dimension():
    with pytest.raises(ValueError, match="1 axes"):
        ParamSpec((2, 3), ("embed",), zeros)
