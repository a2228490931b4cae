"""One rollout batch learned from for two epochs, with what shapes its rewards and masks."""

import dataclasses

import jax
import numpy as np
import pytest

from pr2jax.core.config import ConfigError, from_config_dict, to_config_dict
from pr2jax.core.metrics import reduce
from pr2jax.tasks.registry import build_task
from pr2jax.train.config import Config
from pr2jax.train.rl import RLTrainer
from pr2jax.train.session import open_session
from tests.train import tiny

FAMILY = {
    "epochs": 2,
    "advantage": "rloo",
    "ratio": "sequence",
    "aggregation": "fixed",
    "overlong_buffer": 2,
    "mask_truncated": True,
    "tis_cap": 2.0,
    "scoring_pass": "always",
    "kl_coef": 0.01,
}


@pytest.mark.slow
def test_epochs(tmp_path):
    base = tiny.config()
    cfg = dataclasses.replace(base, rl=dataclasses.replace(base.rl, **FAMILY))
    with open_session(cfg, tmp_path, jax.devices()[:1]) as session:
        trainer = RLTrainer(session, build_task(cfg.rl_task).train, None)
        state = trainer.initial_state(session.initial_params())
        seen, inner = [], trainer._mini

        def mini(state, batch, active):
            seen.append((np.asarray(batch.tokens), np.asarray(batch.loss_mask), active))
            return inner(state, batch, active)

        trainer._mini = mini
        state, found = trainer.step(state, 0)
        later = trainer.source.gather(state, 1).rollout
    metrics = reduce(found)
    assert int(state.step) == len(seen) == cfg.rl.updates == 4
    # The predictor stands still in the very first mini-step alone.
    assert [active for *_, active in seen] == [False, True, True, True]
    for first, again in zip(seen[:2], seen[2:], strict=True):
        np.testing.assert_array_equal(first[0], again[0])
    assert np.any(seen[0][0] != seen[1][0])
    assert {k.split("/")[0] for k in metrics if k.startswith("mini_")} == {
        f"mini_{i}" for i in (1, 2, 3, 4)
    }
    # Under theta_old until the first update; then the policy has moved, in later epochs further.
    assert metrics["mini_1/sequence_ratio_max"] == pytest.approx(1.0, abs=1e-5)
    drift = [metrics[f"mini_{i}/old/abs"] for i in (1, 2, 3, 4)]
    assert drift == sorted(drift)
    assert drift[1] > 100 * drift[0]
    for name in ("tis_mean", "tis_max", "tis_capped", "overlong", "truncated", "reference_kl"):
        assert name in metrics
    assert metrics["overlong"] >= metrics["truncated"] > 0
    assert metrics["tis_mean"] == pytest.approx(1.0, abs=1e-4)
    tokens = sum(mask.sum() for _, mask, _ in seen[:2])
    assert sum(metrics[f"mini_{i}/tokens"] for i in (1, 2)) == tokens
    assert set(np.unique(later.policy_version)) == {-1, 4}


def test_what_contradicts_itself_is_told_by_its_key():
    cfg = to_config_dict(Config())
    cfg.rl.tis_cap = 2.0
    with pytest.raises(ConfigError, match="rl.tis_cap: corrects the sampler"):
        from_config_dict(Config, cfg)
