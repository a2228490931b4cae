"""Route logs: ids survive encoding and disk; per-token values move to inputs."""

import numpy as np
import pytest

from pr2jax.replay import routes as r


@pytest.mark.parametrize("experts,dtype", [(4, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_encode_decode(experts, dtype):
    ids = np.random.default_rng(0).integers(0, experts, (3, 4, 7, 2))
    ids[0, 0, 0] = [0, experts - 1]
    kept = r.encode(ids, experts)
    assert kept.dtype == dtype
    np.testing.assert_array_equal(r.decode(kept), ids)
    assert r.decode(kept).dtype == np.int32


@pytest.mark.parametrize("bad", [-1, 8])
def test_encode_refuses_what_is_no_expert(bad):
    ids = np.zeros((1, 1, 2, 1), int)
    ids[0, 0, 1, 0] = bad
    with pytest.raises(ValueError, match=str(bad)):
        r.encode(ids, 8)


def test_route_dtype_limit():
    with pytest.raises(ValueError, match="65537"):
        r.route_dtype(65537)


def test_alignment():
    values = np.arange(10.0).reshape(2, 5)
    np.testing.assert_array_equal(r.to_inputs(values), [[1, 2, 3, 4, 0], [6, 7, 8, 9, 0]])


def test_save_and_open(tmp_path):
    ids = np.random.default_rng(0).integers(0, 300, (3, 20, 9, 2)).astype(np.uint16)
    path = tmp_path / "routes"
    r.save_routes(path, np.zeros_like(ids), {"step": 1})
    r.save_routes(path, ids, {"step": 4, "lengths": list(range(20)), "mode": "pr2"})
    store, meta = r.open_routes(path)
    assert meta == {"step": 4, "lengths": list(range(20)), "mode": "pr2"}
    assert store.shape == ids.shape
    np.testing.assert_array_equal(store.read().result(), ids)
    np.testing.assert_array_equal(store[1, 17].read().result(), ids[1, 17])
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        r.open_routes(tmp_path / "nothing-here")
