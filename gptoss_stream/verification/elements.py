"""Reads some elements of a model's tensors, whichever format stores them.

In a stored tensor each axis of the model tensor has a stride. So the position of an element is the
sum of its indices times the strides, whatever the order of the axes. Of the 16 elements of a
column, for example, one is read in each of 16 stored rows; elements that are close to each other
are read with what is between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..checkpoint.reader import ElementRange, Reader
from ..formats import SourceModel
from ..formats._table import Mxfp4Encoding, Row
from ..planning.operand_binding import source_rows
from ..tensors.cast import cast
from ..tensors.dtypes import BLOCK_NBYTES, BLOCK_VALUES, DType
from ..tensors.mxfp4 import NAN_SCALE, decode
from ..tensors.raw_tensor import RawTensor

__all__ = ["Array", "Elements", "ModelElements"]

Array: TypeAlias = "np.ndarray[Any, Any]"

_MAX_GAP_NBYTES = 32 << 10
"""Unneeded bytes between elements that are read together, at most: of a remote file they cost less
than a request."""


class Elements(NamedTuple):
    """Some elements of a model tensor."""

    tensor: str
    indices: Mapping[str, Array]
    """The index of each element along each axis of the tensor. All arrays are equally long."""


class _StoredElements(NamedTuple):
    """Elements of one stored tensor, which are read in units: a float, or an MXFP4 block."""

    raws: tuple[RawTensor, ...]
    """The tensor, or the blocks and scales of MXFP4."""
    widths: tuple[int, ...]
    """The number of elements of each raw tensor in a unit."""
    units: Array
    """The number of the unit that each element is in."""
    positions: Array
    """The position of each element in its unit."""

    def intervals(self) -> Iterator[tuple[int, int]]:
        """Yield the units [begin, end) that are read together."""
        nbytes = sum(
            raw.dtype.itemsize * width for raw, width in zip(self.raws, self.widths, strict=True)
        )
        needed = np.unique(self.units)
        cuts = np.flatnonzero(np.diff(needed) > 1 + _MAX_GAP_NBYTES // nbytes) + 1
        for first, end in pairwise([0, *cuts, len(needed)]):
            yield int(needed[first]), int(needed[end - 1]) + 1

    def ranges(self) -> Iterator[ElementRange]:
        """Yield what is read."""
        for begin, end in self.intervals():
            for raw, width in zip(self.raws, self.widths, strict=True):
                yield ElementRange(raw, begin * width, (end - begin) * width)

    def read(self, reader: Reader) -> Array:
        """Return the elements in float32; those with a NaN scale are NaN."""
        out = np.empty(len(self.units), np.float32)
        for begin, end in self.intervals():
            chosen = (begin <= self.units) & (self.units < end)
            parts = []
            for raw, width in zip(self.raws, self.widths, strict=True):
                with reader.read(raw, begin * width, (end - begin, width)) as array:
                    parts.append(array[self.units[chosen] - begin])
            values = _floats(parts, self.raws[0].dtype)
            out[chosen] = values[np.arange(len(values)), self.positions[chosen]]
        return out


def _floats(parts: Sequence[Array], dtype: DType) -> Array:
    """Return units in float32, of floats [units, 1] or of MXFP4 blocks and scales."""
    if len(parts) == 1:
        values = np.empty(parts[0].shape, np.float32)
        cast(parts[0], dtype, values, DType.F32)
        return values
    blocks, scales = parts
    values = np.empty((len(blocks), BLOCK_VALUES), np.float32)
    decode(blocks[:, None], scales, values, DType.F32)
    values[scales[:, 0] == NAN_SCALE] = np.nan
    return values


class ModelElements:
    """Reads elements of the tensors of a checkpoint, whose tensors were checked against its table.

    Args:
        source: The checkpoint.
    """

    def __init__(self, source: SourceModel) -> None:
        self._sizes = source.model.sizes
        self._raws = source.info.tensors
        self._rows = source_rows(source.table, source.model)

    def stores(self, tensor: str) -> bool:
        """Return whether the checkpoint stores a model tensor."""
        return tensor in self._rows

    def is_split(self, tensor: str) -> bool:
        """Return whether gate and up of a model tensor are stored in tensors of their own."""
        return any("t" in source.row.fixed for source in self._rows.get(tensor, ()))

    def ranges(self, elements: Elements) -> Iterator[ElementRange]:
        """Yield what `read` reads."""
        for _, stored in self._stored(elements):
            yield from stored.ranges()

    def read(self, reader: Reader, elements: Elements) -> Array:
        """Return elements in float32.

        A tensor that is not stored is what the model computes with instead: the embedding for the
        unembedding, and zeros for a bias.

        Raises:
            CheckpointError: If a file has changed.
            MachineError: If reading fails.
        """
        out = np.zeros(len(next(iter(elements.indices.values()))), np.float32)
        for chosen, stored in self._stored(elements):
            out[chosen] = stored.read(reader)
        return out

    def _stored(self, elements: Elements) -> Iterator[tuple[Array, _StoredElements]]:
        """Yield which of the elements are in one stored tensor, and where they are in it."""
        tensor, indices = elements
        if tensor == "unembed" and not self.stores(tensor):
            tensor = "embed"
        for source in self._rows.get(tensor, ()):
            row = source.row
            every = next(iter(indices.values()))
            chosen = np.ones(len(every), bool)
            for axis, index in row.fixed.items():
                chosen &= indices[axis] == index
            if not chosen.any():
                continue
            offsets, stride = np.full(len(every), source.first, np.int64), 1
            for axis in reversed(row.order):
                offsets += indices[axis] * stride
                stride *= self._sizes[axis]
            yield chosen, self._elements(row, indices, offsets[chosen])

    def _elements(self, row: Row, indices: Mapping[str, Array], offsets: Array) -> _StoredElements:
        """Return elements of the tensor that is stored for a row, given their offsets in it."""
        name = row.stored.format(**{axis: int(indices[axis][0]) for axis in row.axes_in_name})
        encoding = row.encoding
        if isinstance(encoding, Mxfp4Encoding):
            raws = self._raws[name + encoding.blocks], self._raws[name + encoding.scales]
            return _StoredElements(raws, (BLOCK_NBYTES, 1), *np.divmod(offsets, BLOCK_VALUES))
        return _StoredElements((self._raws[name],), (1,), offsets, np.zeros_like(offsets))
