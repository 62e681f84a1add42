"""Output tensors as recipes: what each is made of, and making any run of its bytes.

An `OutputTensor` is one `Part` after another (usually one); a part is an operand rearranged by a
pattern. All of it is known, with shape and size, before any data is read. `fill` makes bytes
`begin … end` of a tensor, reading only what these need and holding only a tile at a time.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.reader import ElementRange
from ..tensors.dtypes import DType, nbytes
from .operands import Operand
from .rearrangement import Rearrangement

if TYPE_CHECKING:
    pass

__all__ = ["Origin", "OutputTensor", "Segment", "element_ranges"]


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """An operand and how it is rearranged."""

    operand: Operand
    rearrangement: Rearrangement

    @property
    def elements(self) -> int:
        """Elements of the output that the part makes."""
        return self.rearrangement.num_rows * prod(self.rearrangement.row_shape)


class Origin(NamedTuple):
    """The model tensor that an output tensor holds, and its layer and expert if it is of one."""

    model_tensor: str
    layer: int | None
    expert: int | None


_NO_ORIGIN = Origin("", None, None)


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output: its parts lie one after another along its first axis."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]
    origin: Origin = _NO_ORIGIN

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return nbytes(self.dtype, self.shape)


def element_ranges(
    tensor: OutputTensor, begin: int, end: int, without: Container[Segment] = ()
) -> Iterator[ElementRange]:
    """What making bytes `begin … end` of a tensor reads, but for the parts `without`."""
    at = 0
    for segment in tensor.segments:
        size = segment.elements * tensor.dtype.itemsize
        low, high = max(begin, at) - at, min(end, at + size) - at
        at += size
        if low < high and segment not in without:
            how = segment.rearrangement
            row_nbytes = prod(how.row_shape) * tensor.dtype.itemsize
            rows = low // row_nbytes, -(-high // row_nbytes)
            rows = (0, segment.operand.shape[0]) if how.transposes else rows
            yield from segment.operand.element_ranges(rows)
