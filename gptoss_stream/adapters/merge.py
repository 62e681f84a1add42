"""Several adapters, merged in order: what a model's tensors are made of besides its own values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from ..checkpoint.metadata import CheckpointInfo
from ..checkpoint.reader import Reader
from ..errors import TensorError
from ..model.config import ModelConfig
from ..storage.location import Location
from ..tensors.dtypes import DType
from ..tensors.raw_tensor import RawTensor, RegroupedTensor
from ..transforms.changes import Change, LowRankChange
from ..transforms.factors import FactorCache
from .adapter_file import CONFIG_NAME, AdapterFile
from .base_model import Place
from .changes import AdapterChanges, changes_of
from .description import describe
from .parts import Saved

__all__ = ["Merge", "check_values", "merge_adapters"]

_CHECKED_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Merge:
    """Adapters to be merged into one model. Layers and experts have the model's numbers."""

    adapters: tuple[AdapterChanges, ...]
    like_peft: bool
    """Whether values are rounded to the model's dtype after each adapter, and what is added to a
    parameter or an embedding before that too, as PEFT does."""
    touched: Mapping[str, frozenset[int | None]]
    """The layers in which each model tensor is changed or replaced."""

    def touches(self, tensor: str, layer: int | None = None) -> bool:
        """Return whether a tensor is changed or replaced, in one layer or in any."""
        layers = self.touched.get(tensor, frozenset())
        return bool(layers) if layer is None else layer in layers

    def changes(self, tensor: str, layer: int | None, expert: int | None) -> list[Change]:
        """Return the changes of a tensor, in order."""
        place = Place(tensor, layer, expert)
        return [make() for one in self.adapters for make in one.changes.get(place, ())]

    def rounded(self, change: Change, dtype: DType) -> Change:
        """Return a change that is rounded before it is added, if that is asked for."""
        if self.like_peft and isinstance(change, LowRankChange) and change.is_rounded_by_peft:
            return replace(change, rounded_to=dtype)
        return change

    def replacement(self, tensor: str, layer: int | None) -> Saved | None:
        """Return what an adapter stores instead of a tensor of the model; None if none does."""
        place = Place(tensor, layer, None)
        return next(
            (one.replacements[place] for one in self.adapters if place in one.replacements), None
        )

    def replaced(self) -> Iterator[Place]:
        """Yield the tensors that are replaced."""
        for one in self.adapters:
            yield from one.replacements

    @property
    def regrouped_nbytes(self) -> int:
        """The bytes of the largest tensor that is regrouped by expert."""
        found = [0]
        for one in self.adapters:
            for place, makes in one.changes.items():
                if place.expert == 0:
                    found += [_regrouped_nbytes(make()) for make in makes]
        return max(found)

    @property
    def infos(self) -> list[CheckpointInfo]:
        """The files and tensors of each adapter."""
        return [one.file.info for one in self.adapters]

    def describe(self) -> list[dict[str, Any]]:
        """Return what the adapters are, as JSON types."""
        return [
            {**describe(one.file, one), "merged_scale": one.file.adapter.scale}
            for one in self.adapters
        ]

    def sources(self) -> list[dict[str, Any]]:
        """Return where the adapters are, as JSON types."""
        return [
            {**_source(one.file.info.location), "scale": one.file.adapter.scale}
            for one in self.adapters
        ]

    def identity(self) -> dict[str, Any]:
        """Return what tells the adapters, and how they are merged, from others, as JSON types."""
        return {
            f"adapter {number}": {
                "files": {shard.name: [shard.nbytes, shard.version] for shard in info.shards},
                "config": info.configs[CONFIG_NAME],
                **one.file.adapter.as_dict(),
                **one.decisions(),
            }
            for number, (one, info) in enumerate(zip(self.adapters, self.infos, strict=True), 1)
        }


def _regrouped_nbytes(change: Change) -> int:
    """Return the bytes of the tensor that a change takes regrouped; 0 without one."""
    if not isinstance(change, LowRankChange) or change.right is None:
        return 0
    raws = (change.left.raw, change.right.raw)
    return sum(raw.nbytes for raw in raws if isinstance(raw, RegroupedTensor))


def _source(location: Location) -> dict[str, Any]:
    """Return where an adapter is."""
    revision = {"revision": location.revision} if location.revision else {}
    return {"adapter": location.identity, **revision}


def merge_adapters(
    files: Sequence[AdapterFile], model: ModelConfig, *, like_peft: bool = False
) -> Merge | None:
    """Return what merging adapters changes in a model; None without adapters.

    Raises:
        CheckpointError: If an adapter cannot be merged into the model, or not after another.
        OptionError: If an adapter contradicts what the user says about it.
    """
    if not files:
        return None
    cache = FactorCache()
    adapters = tuple(changes_of(file, model, cache) for file in files)
    touched: dict[str, set[int | None]] = {}
    for number, one in enumerate(adapters):
        for place in one.replacements:
            _refuse_loss(one, place, adapters[:number])
        for place in (*one.changes, *one.replacements):
            touched.setdefault(place.tensor, set()).add(place.layer)
        _refuse_late_magnitudes(one, adapters[:number])
    frozen = {tensor: frozenset(layers) for tensor, layers in touched.items()}
    return Merge(adapters, like_peft, frozen)


def _refuse_loss(one: AdapterChanges, place: Place, earlier: Sequence[AdapterChanges]) -> None:
    """Refuse to replace what an adapter before has changed or stored."""
    raw = one.replacements[place].raw
    for other in earlier:
        changed = {(p.tensor, p.layer) for p in (*other.changes, *other.replacements)}
        if (place.tensor, place.layer) in changed:
            raise TensorError(
                f"{one.file.info.location}: tensor {raw.name!r} is stored whole, and would replace "
                f"what the adapter {other.file.info.location} changes; merge them in another "
                "order, or one of them alone"
            )


def _refuse_late_magnitudes(one: AdapterChanges, earlier: Sequence[AdapterChanges]) -> None:
    """Refuse DoRA of a tensor that an earlier adapter changes: PEFT's versions differ in it."""
    for place, makes in one.changes.items():
        if not any(place in other.changes for other in earlier):
            continue
        for change in (make() for make in makes):
            if isinstance(change, LowRankChange) and change.magnitude is not None:
                raise TensorError(
                    f"{one.file.info.location}: tensor {change.magnitude.raw.name!r} is DoRA of a "
                    "layer that an adapter before it changes too, which versions of PEFT merge "
                    "differently; merge the adapters in runs of their own"
                )


def check_values(merge: Merge, reader: Reader) -> None:
    """Read adapters once and check that all values are finite.

    Args:
        merge: The adapters.
        reader: Reads them.

    Raises:
        TensorError: Naming a tensor with other values.
        MachineError: If reading fails.
    """
    for file in (one.file for one in merge.adapters):
        for raw in file.info.tensors.values():
            _check_tensor(file, raw, reader)


def _check_tensor(file: AdapterFile, raw: RawTensor, reader: Reader) -> None:
    """Check that the values of a tensor are finite."""
    import numpy as np

    from ..tensors.cast import as_float32

    count = prod(raw.shape)
    step = _CHECKED_NBYTES // raw.dtype.itemsize
    for first in range(0, count, step):
        with reader.read(raw, first, (min(step, count - first),)) as array:
            if not np.isfinite(as_float32(array, raw.dtype)).all():
                where = file.info.location.display_path(raw.shard)
                raise TensorError(
                    f"{where}: tensor {raw.name!r} has values that are NaN or infinite; the "
                    "training failed, or the file is damaged"
                )
