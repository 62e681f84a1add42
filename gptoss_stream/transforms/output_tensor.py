"""Output tensors: what each is made of, known before any data is read.

An `OutputTensor` is one `Segment` after another along its first axis, most often a single one. A
segment is an operand, rearranged by an einops pattern and cast or encoded. For example, q, k and v
of OpenAI's format are one tensor, `qkv`. Made of Hugging Face's format it has three segments:

    qkv.weight [5120, 2880]    segment 0: q_proj.weight [4096, 2880], unchanged
                               segment 1: k_proj.weight [512, 2880], unchanged
                               segment 2: v_proj.weight [512, 2880], unchanged

Three classes describe tensors. A `tensors.raw_tensor.RawTensor` is in a file of the source. A
`formats.TensorSpec` says what a format stores, of any model and in any checkpoint. An
`OutputTensor` is to be written, and its operands name the raw tensors that it is made of.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from .._utils.messages import summary
from ..checkpoint.reader import ElementRange
from ..tensors.dtypes import DType, nbytes
from .operand import Operand
from .rearrangement import Rearrangement
from .row_encoding import RowEncoding

__all__ = ["Origin", "OutputTensor", "Segment", "element_ranges"]


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A run of rows of an output tensor: an operand and how it is rearranged."""

    operand: Operand
    rearrangement: Rearrangement
    encoding: RowEncoding | None = None
    """How its rows of floats become bytes; None if they are cast."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row of the output tensor."""
        shape = self.rearrangement.row_shape
        return shape if self.encoding is None else (self.encoding.row_nbytes(shape[-1]),)

    @property
    def elements(self) -> int:
        """The number of elements of the output tensor."""
        return self.rearrangement.num_rows * prod(self.row_shape)

    def element_ranges(self, rows: tuple[int, int]) -> Iterator[ElementRange]:
        """Yield what has to be read to make rows [begin, end)."""
        transposes = self.rearrangement.transposes
        yield from self.operand.element_ranges((0, self.operand.shape[0]) if transposes else rows)
        if self.encoding is not None and self.encoding.reference is not None:
            yield from self.encoding.reference.element_ranges(rows)


class Origin(NamedTuple):
    """The model tensor that an output tensor holds."""

    model_tensor: str
    """Its name (see `model.tensors.MODEL_TENSORS`)."""
    layer: int | None
    """The layer; None for a tensor that belongs to no layer."""
    expert: int | None
    """The expert; None for a tensor that belongs to no expert or holds all of them."""


_NO_ORIGIN = Origin("", None, None)


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written."""

    name: str
    """Its name in the output."""
    dtype: DType
    """Its dtype in the output; U8 for MXFP4 blocks and scales."""
    shape: tuple[int, ...]
    """Its shape in the output."""
    segments: tuple[Segment, ...]
    """What it is made of, one after another along the first axis."""
    origin: Origin = _NO_ORIGIN
    """The model tensor that it holds."""
    made_with: str = ""
    """Of scales that are encoded, the name of the blocks: both are made in one pass."""

    def __repr__(self) -> str:
        return summary(self, f"{self.name}, {self.dtype}, {list(self.shape)}")

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return nbytes(self.dtype, self.shape)


def element_ranges(
    tensor: OutputTensor, begin: int, end: int, without: Container[Segment] = ()
) -> Iterator[ElementRange]:
    """Yield what has to be read to make bytes `begin … end` of a tensor.

    Args:
        tensor: The output tensor.
        begin: The first byte of its data.
        end: The byte after the last.
        without: Segments to leave out.
    """
    offset = 0  # of the segment, in bytes
    for segment in tensor.segments:
        size = segment.elements * tensor.dtype.itemsize
        low, high = max(begin, offset) - offset, min(end, offset + size) - offset
        offset += size
        if low < high and segment not in without:
            row_nbytes = prod(segment.row_shape) * tensor.dtype.itemsize
            yield from segment.element_ranges((low // row_nbytes, -(-high // row_nbytes)))
