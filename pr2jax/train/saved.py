"""The configuration of an earlier run, out of the JSON that it left: to repeat or to vary it.

python -m pr2jax.main --config=pr2jax/train/saved.py:RUN/config.json --workdir=DIR
"""

import json

from ml_collections import ConfigDict

from pr2jax.core.config import from_config_dict, to_config_dict
from pr2jax.core.store import as_path
from pr2jax.train.config import Config


def get_config(path: str) -> ConfigDict:
    """`path`: a config.json. Raises ConfigError for one that is not of this version."""
    values = json.loads(as_path(path).read_text(encoding="utf-8"))
    return to_config_dict(from_config_dict(Config, values))
