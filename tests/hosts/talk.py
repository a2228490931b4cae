"""One of several processes: `talk.py WHAT INDEX COUNT PORT`; see tests/hosts/test_core.py."""

import json
import logging
import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pr2jax.core import hosts
from pr2jax.core.peers import Peers
from pr2jax.core.sharding import MeshConfig, batch_sharding, make_mesh
from pr2jax.train.loop import StopRequest

WHAT, INDEX, COUNT, PORT = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
logging.getLogger("jax").setLevel(logging.ERROR)
hosts.start(f"localhost:{PORT}", COUNT, INDEX)


def everything() -> dict:
    """What each helper gives here."""
    mesh = make_mesh(MeshConfig())
    rows = hosts.own_rows(mesh, 8)
    whole = np.arange(24.0).reshape(8, 3)
    placed = hosts.put(whole, batch_sharding(mesh, 2))
    own = hosts.put_own(whole[rows.start : rows.stop], batch_sharding(mesh, 2), 8, rows.start)
    wide = np.arange(16.0).reshape(2, 8)
    second = hosts.put_own(
        wide[:, rows.start : rows.stop], batch_sharding(mesh, 2, 1), 8, rows.start, 1
    )
    try:
        with hosts.together("reading"):
            if INDEX == 1:
                raise ValueError("broken on 1")
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    cut = make_mesh(MeshConfig(data=2, fsdp=2, dcn_data=2))
    return {
        "name": hosts.host_name(),
        "gathered": hosts.gather({"from": INDEX, "long": "x" * 700 * (INDEX == 0)}),
        "first": hosts.from_first(f"of {INDEX}"),
        "rows": [rows.start, rows.stop],
        "whole": hosts.to_host({"x": placed})["x"].ravel().tolist(),
        "back": [hosts.rows_of(x, rows).ravel().tolist() for x in (placed, own)],
        "axis1": hosts.to_host(second).ravel().tolist(),
        "error": told,
        "mesh": [[d.process_index for d in row] for row in cut.devices[:, :, 0, 0].tolist()],
    }


peers = Peers(timeout_s=6.0)
print("ready", flush=True)
if WHAT == "all":
    print(json.dumps(everything()), flush=True)
    peers.leave()
elif WHAT == "wait":
    mesh = make_mesh(MeshConfig())
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    x = hosts.put(np.ones((8, 2)), batch_sharding(mesh, 2))
    try:
        while True:
            jax.block_until_ready(total(x))
            time.sleep(0.05)
    except Exception as error:  # some transports notice at once
        print(f"collective: {type(error).__name__}", flush=True)
        peers.blame(60.0)
elif WHAT == "fail":
    if INDEX == 1:
        peers.fail(2, "ConfigError: rl.steps: bad")
        sys.stdout.flush()
        import os

        os._exit(2)
    time.sleep(60)
elif WHAT == "stop":
    step = 0
    with StopRequest() as stop:
        while not stop.poll():
            step += 1
            time.sleep(0.02)
    print(step, flush=True)
    peers.leave()
else:
    time.sleep(0.5 * INDEX)
    peers.leave()
