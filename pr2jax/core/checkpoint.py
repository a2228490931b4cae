"""Checkpoints: state, position and configuration; asynchronous, atomic, for any mesh.

`DIR/STEP/` holds two orbax items: `state`, the arrays, and `record`, JSON with what the caller
gave (`extra`, `metrics`) and, for every array, its shape, dtype and fingerprint. A directory
takes its final name when all of it is on disk, so an interrupted save leaves nothing that could
be taken for a checkpoint. The fingerprint is checked on restore, because neither zarr nor OCDBT
notices a flipped bit; it is an integer sum, hence the same on every mesh.
"""

import contextlib
import json
import math
import os
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, UInt32

from pr2jax.core.params import Tree, map_with_path, path_str

Which = Literal["best", "latest"] | int


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or not of the state that was asked for; names the path."""


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
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
            steps = self.steps()
        except Exception as error:
            raise CheckpointError(f"{self.directory}: {_brief(error)}") from error
        for step in steps:
            # A damaged old step is an error when it is asked for, not before.
            with contextlib.suppress(CheckpointError):
                self._score(step, self._record(step)["metrics"])

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
        if step in steps:
            return False
        if steps and step < steps[-1]:
            raise CheckpointError(f"{self.directory}: step {steps[-1]} is there, later than {step}")
        record = {
            "extra": _jsonable(extra),
            "metrics": {k: float(v) for k, v in (metrics or {}).items()},
            "best": [self.best_metric, self.best_mode],
            "arrays": _describe(state),
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(_nested(state)), record=ocp.args.JsonSave(record)
        )
        self._score(step, record["metrics"])
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise CheckpointError(f"{self._path(step)}: not saved: {_brief(error)}") from error
        return True

    def wait(self) -> None:
        """Block until what was saved is on disk. Raises CheckpointError if it could not be."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise CheckpointError(f"{self.directory}: a save failed: {_brief(error)}") from error

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
        Raises CheckpointError, naming the path, if the step is missing or damaged, or if its
        arrays are not exactly those of `abstract_state` (names, shapes, dtypes).
        """
        step = self._resolve("latest" if step is None else step)
        record = self._record(step)
        wanted, present = _flatten(abstract_state), record["arrays"]
        if odd := sorted(present.keys() - wanted.keys()):
            raise CheckpointError(f"{self._path(step)}: holds {odd[0]!r}, which is not asked for")
        self._check(step, wanted, present)
        if odd := [p for p, x in wanted.items() if np.dtype(x.dtype).name != present[p]["dtype"]]:
            raise CheckpointError(
                f"{self._path(step)}: {odd[0]!r} is {present[odd[0]]['dtype']}, "
                f"not {np.dtype(wanted[odd[0]].dtype).name}"
            )
        return _like(abstract_state, self._arrays(step, wanted, present)), record["extra"]

    def read(self, which: Which = "latest") -> tuple[int, dict, dict]:
        """(step, extra, metrics) of a checkpoint, without its arrays. Raises CheckpointError."""
        step = self._resolve(which)
        record = self._record(step)
        return step, record["extra"], record["metrics"]

    def params(self, abstract_params: Tree, which: Which = "latest") -> Tree:
        """Only the `params` of a TrainState, cast to the dtypes asked for (`restore_params`)."""
        step = self._resolve(which)
        present = self._record(step)["arrays"]
        wanted = {f"params/{p}": x for p, x in _flatten(abstract_params).items()}
        self._check(step, wanted, present)
        arrays = self._arrays(step, wanted, present)
        cast = jax.jit(lambda tree: {p: x.astype(wanted[p].dtype) for p, x in tree.items()})
        if any(x.dtype != wanted[p].dtype for p, x in arrays.items()):
            arrays = cast(arrays)
        return map_with_path(lambda path, _: arrays[f"params/{path}"], abstract_params)

    def arrays(self, which: Which = "latest") -> tuple[int, dict[str, np.ndarray]]:
        """(step, {path: array}) of a checkpoint as it was saved. Raises CheckpointError."""
        step = self._resolve(which)
        present = self._record(step)["arrays"]
        wanted = {
            path: jax.ShapeDtypeStruct(tuple(x["shape"]), np.dtype(x["dtype"]))
            for path, x in present.items()
        }
        found = self._arrays(step, wanted, present)
        return step, {path: np.asarray(x) for path, x in found.items()}

    def _path(self, step: int) -> str:
        return os.path.join(self.directory, str(step))

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
            raise CheckpointError(f"{self._path(which)}: no such checkpoint; there are {steps}")
        return which

    def _record(self, step: int) -> dict[str, Any]:
        record = self._read(step, record=ocp.args.JsonRestore())["record"]
        if not isinstance(record, dict) or not {"extra", "metrics", "arrays"} <= record.keys():
            raise CheckpointError(f"{self._path(step)}: its record is incomplete")
        return record

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            others = [s for s in self.steps() if s != step]
            hint = f"; other steps here: {others}" if others else ""
            raise CheckpointError(
                f"{self._path(step)}: cannot be read: {_brief(error)}{hint}"
            ) from error

    def _check(self, step: int, wanted: Mapping[str, Any], present: Mapping[str, Any]) -> None:
        for path, leaf in wanted.items():
            if path not in present:
                raise CheckpointError(f"{self._path(step)}: has no array {path!r}")
            shape = tuple(present[path]["shape"])
            if shape != tuple(leaf.shape):
                raise CheckpointError(
                    f"{self._path(step)}: {path!r} has shape {shape}, not {tuple(leaf.shape)}"
                )

    def _arrays(
        self, step: int, wanted: Mapping[str, Any], present: Mapping[str, Any]
    ) -> dict[str, Array]:
        """The wanted arrays in the dtypes they were saved in, fingerprints verified."""
        default = SingleDeviceSharding(jax.devices()[0])
        flat = {
            path: jax.ShapeDtypeStruct(
                leaf.shape,
                np.dtype(present[path]["dtype"]),
                sharding=getattr(leaf, "sharding", None) or default,
            )
            for path, leaf in wanted.items()
        }
        nested = traverse_util.unflatten_dict(flat, sep="/")
        args = ocp.args.PyTreeRestore(
            nested,
            restore_args=ocp.checkpoint_utils.construct_restore_args(nested),
            partial_restore=True,
        )
        arrays = traverse_util.flatten_dict(self._read(step, state=args)["state"], sep="/")
        for path, found in _describe(arrays).items():
            if found != present[path]:
                raise CheckpointError(
                    f"{self._path(step)}: {path!r} is not what was saved (damaged on disk?)"
                )
        return arrays


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


def fingerprint(state: Tree) -> str:
    """A short name of the exact bits of a state, on any mesh: equal states have equal ones."""
    sums = np.asarray(_fingerprints(jax.tree.leaves(state)))
    return f"{zlib.crc32(sums.tobytes()):08x}"


def _reader(directory: str | os.PathLike) -> Checkpointer:
    """A read-only Checkpointer that ranks by what the run that wrote the directory ranked by."""
    reader = Checkpointer(directory, read_only=True)
    step = reader.latest_step()
    if step is not None:
        reader.best_metric, reader.best_mode = reader._record(step).get("best", [None, "max"])
        for step in reader.steps():
            with contextlib.suppress(CheckpointError):
                reader._score(step, reader._record(step)["metrics"])
    return reader


@jax.jit
def _fingerprints(leaves: list[Array]) -> UInt32[Array, " leaves"]:
    """sum_i (2 i + 1) bits_i mod 2**32 of each array: order of summation cannot change it, and an
    odd weight per element lets no single flipped bit and few permutations through."""

    def one(x):
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
        index = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(
                jnp.uint32, bits.shape, axis
            )
        return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

    return jnp.stack([one(x) for x in leaves])


def _describe(tree: Tree) -> dict[str, dict[str, Any]]:
    flat = _flatten(tree)
    sums = np.asarray(_fingerprints(list(flat.values()))).tolist()
    return {
        path: {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name, "sum": total}
        for (path, x), total in zip(flat.items(), sums, strict=True)
    }


def _flatten(tree: Tree) -> dict[str, Any]:
    return {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _nested(tree: Tree) -> dict[str, Any]:
    # Names only: a checkpoint outlives the classes whose state it holds.
    return traverse_util.unflatten_dict(_flatten(tree), sep="/")


def _like(tree: Tree, flat: Mapping[str, Array]) -> Tree:
    return map_with_path(lambda path, _: flat[path], tree)


def _jsonable(extra: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(extra)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra cannot be written as JSON: {error}") from None


def _brief(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"


def _absolute(directory: str | os.PathLike) -> str:
    directory = os.fspath(directory)
    return directory if "://" in directory else os.path.abspath(directory)
