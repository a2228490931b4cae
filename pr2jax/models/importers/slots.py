"""Where each tensor of a checkpoint goes: names and shapes, checked before anything is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from pr2jax.models.config import ModelConfig, segments
from pr2jax.models.importers import files
from pr2jax.models.importers.family import Family, Row
from pr2jax.models.importers.files import CheckpointFormatError
from pr2jax.models.transformer import param_specs

PREDICTOR = "moe/predictor/kernel"


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one tensor of a checkpoint goes: params[path][index], of the shape `here`.

    Of its last axis the last `rotary` have halves here that alternate there (0: none).
    """

    path: str
    index: tuple[int, ...]
    row: Row
    here: tuple[int, ...]
    rotary: int = 0

    @property
    def there(self) -> tuple[int, ...]:
        """The tensor's shape in the checkpoint."""
        return self.row.shape_there(self.here)

    def to_here(self, array: np.ndarray) -> np.ndarray:
        """The tensor there as the parameter here."""
        return _reorder(self.row.to_here(array, self.here), self.rotary, apart=True)

    def to_there(self, array: np.ndarray) -> np.ndarray:
        """The parameter here as the tensor there."""
        return self.row.to_there(_reorder(array, self.rotary, apart=False))


def _reorder(array: np.ndarray, rotary: int, *, apart: bool) -> np.ndarray:
    """The last `rotary` columns: neighbours (2i, 2i + 1) to (i, i + rotary/2), or back."""
    if not rotary:
        return array
    split = array.shape[-1] - rotary
    pairs = (rotary // 2, 2) if apart else (2, rotary // 2)
    turned = array[..., split:].reshape(*array.shape[:-1], *pairs).swapaxes(-1, -2)
    turned = turned.reshape(*array.shape[:-1], rotary)
    return np.concatenate([array[..., :split], turned], axis=-1)


def slots_of(cfg: ModelConfig, family: Family) -> dict[str, Slot]:
    """Every tensor of the family's checkpoint of `cfg`, in the order it is written."""
    top = {row.path: row for row in family.top}
    layer = {row.path: row for row in family.layer}
    layers = {
        (f"segment_{i}", f"block_{j}"): [
            segment.first_layer + r * len(segment.pattern) + j for r in range(segment.repeats)
        ]
        for i, segment in enumerate(segments(cfg))
        for j in range(len(segment.pattern))
    }
    ordered: dict[tuple, tuple[str, Slot]] = {}
    for path, spec in traverse_util.flatten_dict(param_specs(cfg), sep="/").items():
        if path.endswith(PREDICTOR):
            continue
        parts = path.split("/", 2)
        numbers = layers.get(tuple(parts[:2]))
        row = top.get(path) if numbers is None else layer.get(parts[2])
        if row is None:
            raise CheckpointFormatError(f"{family.model_type} has no tensor for parameter {path}")
        if numbers is None:
            ordered[(0, 0, row.name)] = (row.name, Slot(path, (), row, spec.shape))
            continue
        rotary = cfg.rope_dim if row.rotary else 0
        for r, number in enumerate(numbers):
            prefix = f"model.layers.{number}."
            if "{expert}" not in row.name:
                slot = Slot(path, (r,), row, spec.shape[1:], rotary)
                ordered[(1, number, 0, row.name)] = (prefix + row.name, slot)
                continue
            for e in range(spec.shape[1]):
                name = prefix + row.name.format(expert=e)
                slot = Slot(path, (r, e), row, spec.shape[2:])
                ordered[(1, number, 1, e, row.name)] = (name, slot)
    return dict(ordered[key] for key in sorted(ordered))


def check_tensors(
    slots: Mapping[str, Slot], found: dict[str, files.Found], cfg: ModelConfig
) -> set[str]:
    """Compares names and shapes; returns the names of a tied head that is stored all the same."""
    # Old checkpoints store this buffer; it is computed here.
    for name in [n for n in found if n.endswith("rotary_emb.inv_freq")]:
        del found[name]
    tied = {"lm_head.weight"} & set(found) if cfg.tie_embeddings else set()
    for kind, names in (
        ("missing", set(slots) - set(found)),
        ("not in this model", set(found) - set(slots) - tied),
    ):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise CheckpointFormatError(f"tensors {kind} ({len(names)}): {some}")
    for name, slot in slots.items():
        if found[name].shape != slot.there:
            raise CheckpointFormatError(
                f"{found[name].file}: {name} has the shape {found[name].shape}, and config.json"
                f" means {slot.there}"
            )
    return tied
