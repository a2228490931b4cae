"""Checkpoints: state, position and configuration; asynchronous, atomic, for any mesh.

`DIR/STEP/` holds two orbax items: `state`, the arrays, and `record`, JSON with what the caller
gave (`extra`, `metrics`) and, for every array, its shape, dtype and fingerprint. A directory
takes its final name when all of it is on disk, so an interrupted save leaves nothing that could
be taken for a checkpoint; right after that its files' digests are written (core/manifest.py). On
restore files, record and fingerprints are checked, because neither zarr nor OCDBT notices a flipped
bit. A step without a manifest (the writer was killed in between, or is of before there were any)
is checked by record and fingerprints alone, and gets one then.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from pr2jax.core import hosts, manifest
from pr2jax.core.fingerprints import describe, flatten
from pr2jax.core.manifest import CheckpointError, DamagedCheckpoint
from pr2jax.core.params import Tree, map_with_path
from pr2jax.core.store import as_path, files_below, is_store
from pr2jax.core.stored import SCHEMA, Stored, brief

log = logging.getLogger("pr2jax")

Which = Literal["best", "latest"] | int

DAMAGED = "damaged"  # the folder of steps that were set aside


class _Keep:
    """Orbax preservation policy: the latest `keep` steps and the best one."""

    def __init__(self, owner: "Checkpointer"):
        self._owner = owner

    def should_preserve(self, checkpoints, *, context):
        del context
        steps = [info.step for info in checkpoints]
        kept = {*steps[-self._owner.keep :], self._owner.best_of(steps)}
        return [step in kept for step in steps]


class Checkpointer:
    """Saves to and restores from one directory; keeps the latest `keep` steps and the best.

    `best_metric` names the entry of `metrics` that ranks them (`best_mode` "max" or "min"); a save
    without it, or with a value that is not finite, is never the best. Close it, or use `with`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int = 3,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
        read_only: bool = False,
    ):
        if keep < 1 or best_mode not in ("max", "min"):
            raise ValueError(f"keep={keep} must be at least 1, best_mode={best_mode!r} max or min")
        self.directory = _absolute(directory)
        self.keep, self.best_metric, self.best_mode = keep, best_metric, best_mode
        if "://" not in self.directory and not os.path.isdir(self.directory):
            if os.path.exists(self.directory):
                raise CheckpointError(f"{self.directory}: not a directory")
            if read_only:
                raise CheckpointError(f"{self.directory}: no such directory")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Keep(self),
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,  # what a killed save left
        )
        self._scores: dict[int, float] = {}
        self._sealer: manifest.Sealer | None = None
        self._read_only = read_only
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
            self._stored = Stored(self.directory, self._manager, self.steps)
            steps = self.steps()
        except Exception as error:
            raise CheckpointError(f"{self.directory}: {brief(error)}") from error
        for step in steps:
            # A damaged old step is an error when it is asked for, not before.
            with contextlib.suppress(CheckpointError):
                self._score(step, self._stored.record(step)["metrics"])

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    # -------------------------------------------------------------- saving

    def save(
        self,
        step: int,
        state: Tree,
        extra: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Save `state` (any pytree of arrays) as `step`; False if that step is there already.

        Returns when the arrays are copied to the host (they may then be donated); writing goes on
        in the background. `extra` must survive JSON (position, key as ints, config dict).
        Raises CheckpointError when a later step exists (latest_step would not be this one) or
        when an earlier save failed, ValueError when `extra` is not JSON.
        """
        steps = self.steps()
        folder = epath.Path(self.directory)
        if hosts.first() and not is_store(folder) and not folder.is_dir():  # stores have none
            raise CheckpointError(f"{self.directory}: not saved: the folder is gone")
        if step in steps:
            return False
        if steps and step < steps[-1]:
            raise CheckpointError(f"{self.directory}: step {steps[-1]} is there, later than {step}")
        record = {
            "schema": SCHEMA,
            "extra": _jsonable(extra),
            "metrics": {k: float(v) for k, v in (metrics or {}).items()},
            "best": [self.best_metric, self.best_mode],
            "arrays": describe(state),
        }
        record["digest"] = manifest.digest(record)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_nested(state)), record=ocp.args.JsonSave(record)
        )
        self._score(step, record["metrics"])
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise CheckpointError(
                f"{self._stored.path(step)}: not saved: {brief(error)}"
            ) from error
        if hosts.first():
            self._sealer = manifest.Sealer(
                self._stored.path(step), self._manager.is_saving_in_progress
            )
        return True

    def wait(self) -> None:
        """Block until what was saved is on disk. Raises CheckpointError if it could not be."""
        sealer, self._sealer = self._sealer, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise CheckpointError(f"{self.directory}: a save failed: {brief(error)}") from error
        if sealer is not None:
            sealer.wait()

    def close(self) -> None:
        """`wait`, then release the writer threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    # -------------------------------------------------------------- finding

    def steps(self) -> list[int]:
        """Complete steps on disk, ascending (waits for a save under way)."""
        self.wait()
        self._manager.reload()  # an interrupted save leaves orbax counting a step that is not there
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The latest complete step, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The complete step that ranks first by `best_metric` (latest of equals), or None."""
        return self.best_of(self.steps())

    def best_of(self, steps: list[int]) -> int | None:
        """The best of `steps`, or None if none of them has the metric."""
        sign = 1 if self.best_mode == "max" else -1
        ranked = [(sign * self._scores[s], s) for s in steps if s in self._scores]
        return max(ranked)[1] if ranked else None

    def _score(self, step: int, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self.best_metric) if self.best_metric else None
        if value is not None and math.isfinite(value):
            self._scores[step] = value

    # -------------------------------------------------------------- restoring

    def restore(self, abstract_state: Tree, step: int | None = None) -> tuple[Tree, dict]:
        """(state, extra) of `step` (default: the latest), laid out as `abstract_state` says.

        `abstract_state`: a pytree of `jax.ShapeDtypeStruct`; its shardings may be of another mesh
        or device count than the one that saved (default device where there is none).
        Raises DamagedCheckpoint naming the file where one is not as it was written, CheckpointError
        if the step is missing, or if its arrays are not exactly those of `abstract_state` (names,
        shapes, dtypes).
        """
        step = self._resolve("latest" if step is None else step)
        sealed = self._verify(step)
        record = self._stored.record(step)
        wanted, present = flatten(abstract_state), record["arrays"]
        if odd := sorted(present.keys() - wanted.keys()):
            raise CheckpointError(
                f"{self._stored.path(step)}: holds {odd[0]!r}, which is not asked for"
            )
        self._stored.check(step, wanted, present)
        if odd := [p for p, x in wanted.items() if np.dtype(x.dtype).name != present[p]["dtype"]]:
            raise CheckpointError(
                f"{self._stored.path(step)}: {odd[0]!r} is {present[odd[0]]['dtype']}, "
                f"not {np.dtype(wanted[odd[0]].dtype).name}"
            )
        arrays = self._stored.arrays(step, wanted, present)
        state = map_with_path(lambda path, _: arrays[path], abstract_state)
        if not sealed and not self._read_only and hosts.first():
            manifest.seal(self._stored.path(step))
        return state, record["extra"]

    def restore_whole(self, abstract_state: Tree) -> tuple[int, Tree, dict] | None:
        """(step, state, extra) of the latest step that is whole; None where there is no step.

        Later, damaged ones are told and moved to DIR/damaged, so that they can be saved again.
        The same on all hosts, which must all call it.
        Raises DamagedCheckpoint where none is whole (nothing is moved then), and as `restore`.
        """
        damaged: dict[int, DamagedCheckpoint] = {}
        for step in reversed(self.steps()):
            try:
                state, extra = self.restore(abstract_state, step)
            except DamagedCheckpoint as error:
                damaged[step] = error
                continue
            for bad, error in damaged.items():
                log.warning("%s; moved to %s; step %d is used", error, self._set_aside(bad), step)
            return step, state, extra
        if not damaged:
            return None
        told = "; ".join(str(error) for error in damaged.values())
        raise DamagedCheckpoint(f"{self.directory}: no checkpoint here is whole: {told}")

    def _set_aside(self, step: int) -> str:
        """Moves a step out of the way; returns where it is then."""
        moved = None
        if hosts.first():
            folder = epath.Path(self.directory) / DAMAGED
            folder.mkdir(parents=True, exist_ok=True)
            taken = {path.name for path in folder.iterdir()} if folder.is_dir() else ()
            names = (f"{step}.{n}" if n else str(step) for n in range(len(taken) + 1))
            moved = folder / next(name for name in names if name not in taken)
            try:
                _move(epath.Path(self._stored.path(step)), moved)
            except OSError as error:
                raise CheckpointError(
                    f"{self._stored.path(step)}: cannot be moved: {error}"
                ) from error
            moved = os.fspath(moved)
        moved = hosts.from_first(moved)
        self._scores.pop(step, None)
        return moved

    def _verify(self, step: int) -> bool:
        """`manifest.verify`, by one host for all: it must not be one alone that finds damage."""
        found, error = None, None
        if hosts.first():
            try:
                found = manifest.verify(self._stored.path(step))
            except CheckpointError as caught:
                error = [isinstance(caught, DamagedCheckpoint), str(caught)]
        found, error = hosts.from_first([found, error])
        if error is not None:
            raise (DamagedCheckpoint if error[0] else CheckpointError)(error[1])
        return bool(found)

    def read(self, which: Which = "latest") -> tuple[int, dict, dict]:
        """(step, extra, metrics) of a checkpoint, without its arrays. Raises CheckpointError."""
        step = self._resolve(which)
        record = self._stored.record(step)
        return step, record["extra"], record["metrics"]

    def params(self, abstract_params: Tree, which: Which = "latest") -> Tree:
        """Only the `params` of a TrainState, cast to the dtypes asked for (`restore_params`)."""
        step = self._resolve(which)
        manifest.verify(self._stored.path(step))
        present = self._stored.record(step)["arrays"]
        wanted = {f"params/{p}": x for p, x in flatten(abstract_params).items()}
        self._stored.check(step, wanted, present)
        arrays = self._stored.arrays(step, wanted, present)
        cast = jax.jit(lambda tree: {p: x.astype(wanted[p].dtype) for p, x in tree.items()})
        if any(x.dtype != wanted[p].dtype for p, x in arrays.items()):
            arrays = cast(arrays)
        return map_with_path(lambda path, _: arrays[f"params/{path}"], abstract_params)

    def arrays(self, which: Which = "latest") -> tuple[int, dict[str, np.ndarray]]:
        """(step, {path: array}) of a checkpoint as it was saved. Raises CheckpointError."""
        step = self._resolve(which)
        manifest.verify(self._stored.path(step))
        present = self._stored.record(step)["arrays"]
        wanted = {
            path: jax.ShapeDtypeStruct(tuple(x["shape"]), np.dtype(x["dtype"]))
            for path, x in present.items()
        }
        found = self._stored.arrays(step, wanted, present)
        return step, {path: np.asarray(x) for path, x in found.items()}

    def _resolve(self, which: Which) -> int:
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.directory}: no checkpoint in this directory")
        if which == "latest":
            return steps[-1]
        if which == "best":
            best = self.best_of(steps)
            return steps[-1] if best is None else best
        if which not in steps:
            raise CheckpointError(
                f"{self._stored.path(which)}: no such checkpoint; there are {steps}"
            )
        return which


def restore_params(
    directory: str | os.PathLike, abstract_params: Tree, which: Which = "best"
) -> Tree:
    """The parameters of a run's checkpoint, for another job: its best step (the latest if the run
    ranked none), "latest", or a step number.

    `abstract_params` gives shapes, dtypes (values are cast) and shardings.
    Raises CheckpointError, naming the path.
    """
    with _reader(directory) as reader:
        return reader.params(abstract_params, which)


def read_checkpoint(directory: str | os.PathLike, which: Which = "best") -> tuple[int, dict, dict]:
    """(step, extra, metrics) of a run's checkpoint; `extra` holds the config that describes the
    arrays. Raises CheckpointError, naming the path."""
    with _reader(directory) as reader:
        return reader.read(which)


def read_arrays(
    directory: str | os.PathLike, which: Which = "latest"
) -> tuple[int, dict[str, np.ndarray]]:
    """(step, {path: array}) of a run's checkpoint on the host, whatever state it is of.

    Raises CheckpointError, naming the path.
    """
    with Checkpointer(directory, read_only=True) as reader:
        return reader.arrays(which)


def _reader(directory: str | os.PathLike) -> Checkpointer:
    """A read-only Checkpointer that ranks by what the run that wrote the directory ranked by."""
    reader = Checkpointer(directory, read_only=True)
    step = reader.latest_step()
    if step is not None:
        reader.best_metric, reader.best_mode = reader._stored.record(step).get(
            "best", [None, "max"]
        )
        for step in reader.steps():
            with contextlib.suppress(CheckpointError):
                reader._score(step, reader._stored.record(step)["metrics"])
    return reader


def _nested(tree: Tree) -> dict[str, Any]:
    # Names only: a checkpoint outlives the classes whose state it holds.
    return traverse_util.unflatten_dict(flatten(tree), sep="/")


def _jsonable(extra: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(extra)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra cannot be written as JSON: {error}") from None


def _move(folder: epath.Path, target: epath.Path) -> None:
    """Moves a folder: in a store one object after the other, the one that makes a checkpoint of
    them first, lest half of it be taken for one."""
    if not is_store(folder):
        folder.rename(target)
        return
    files = files_below(folder)
    for name in sorted(files, key=lambda name: name != manifest.COMMITTED):
        (target / name).write_bytes(files[name].read_bytes())
        files[name].unlink()


def _absolute(directory: str | os.PathLike) -> str:
    if not is_store(directory):
        return os.path.abspath(directory)
    try:
        return os.fspath(as_path(directory))
    except OSError as error:
        raise CheckpointError(str(error)) from None
