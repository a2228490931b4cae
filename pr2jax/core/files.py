"""Where files that can be made again are kept."""

import os
from pathlib import Path


def user_cache(*names: str) -> Path:
    """The folder `names` of this project's part of the user's cache (XDG_CACHE_HOME, ~/.cache)."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base.joinpath("pr2jax", *names)
