"""Runs one reference job in the environment that has torch: `run.py JOB FOLDER`.

Reads FOLDER/in.npz and FOLDER/in.json, calls `run(arrays, params) -> arrays` of jobs/JOB.py,
writes FOLDER/out.npz.  Knows nothing of pr2jax: what it computes must be independent of it.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np


def main(job: str, folder: Path) -> None:
    source = Path(__file__).resolve().parent / "jobs" / f"{job}.py"
    if not source.exists():
        raise SystemExit(f"no reference job {job!r} ({source})")
    spec = importlib.util.spec_from_file_location(job, source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with np.load(folder / "in.npz") as arrays:
        result = module.run(dict(arrays), json.loads((folder / "in.json").read_text()))
    np.savez(folder / "out.npz", **result)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
