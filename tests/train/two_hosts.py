"""One of two processes that pre-train together: `two_hosts.py INDEX PORT TEXTS WORKDIR`.

Prints one line of JSON: this host's ledger, losses, held-out figures, and what came of resuming.
"""

import json
import sys
from pathlib import Path

import jax

INDEX, PORT, TEXTS, WORKDIR = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{PORT}", num_processes=2, process_id=INDEX)

from pr2jax.core.sharding import MeshConfig  # noqa: E402 (the backend must know its peers first)
from pr2jax.train.pretrain import PretrainTrainer, read_data  # noqa: E402
from pr2jax.train.session import open_session  # noqa: E402
from tests.train.test_pretrain import config  # noqa: E402

cfg = config(TEXTS, mesh=MeshConfig(data=2))
with open_session(cfg, WORKDIR) as session:
    trainer = PretrainTrainer(session, read_data(cfg.pretrain))
    state = trainer.initial_state(session.initial_params())
    figures = {key: value.mean for key, value in trainer.full(state.params).items()}
    ledger, losses, memory = [], [], None
    for index in range(4):
        state, metrics = trainer.step(state, index)
        ledger.append(trainer.consumed(index))
        total, count = metrics["loss"]
        losses.append(float(total) / float(count))
        if index == 1:
            memory = json.loads(json.dumps(trainer.memory()))
    trainer.remember(memory)
    again = []
    for _ in range(2):
        again.append([str(p) for row in next(trainer.stream).pieces for p in row])
    print(json.dumps({"ledger": ledger, "losses": losses, "figures": figures, "again": again}))
