"""The files of an output: which tensors are in which shard, and where in it.

Tensors stay in order. There are as few shards as the largest size allows, of about equal size.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from .._utils.messages import counted, short_repr, sized, summary
from ..errors import OptionError
from ..tensors.dtypes import BLOCK_NBYTES, BLOCK_VALUES, DType
from ..tensors.safetensors_header import SINGLE_NAME, build_header
from ..transforms.adapted_operand import AdaptedOperand
from ..transforms.mxfp4_operand import Mxfp4Operand
from ..transforms.operands import spilled_dtype
from ..transforms.output_tensor import OutputTensor, Segment
from ..transforms.row_encoding import BLOCKS

__all__ = [
    "DEFAULT_SHARD_SIZE",
    "PlannedShard",
    "compiled_nbytes",
    "is_spilled",
    "parse_size",
    "parse_size_or_zero",
    "plan_shards",
    "spill_nbytes",
    "write_nbytes",
]

DEFAULT_SHARD_SIZE = "5GB"

SPILL_NBYTES = 64_000_000
"""Larger transpositions go through a spill file. Without one, each chunk of the output takes a few
columns of the source, and all of the source would be read from the disk for each chunk."""

SPILLED_AXES = frozenset({"v"})
"""Axes of which a tensor must have one to be spilled. An expert's matrix is read again from the
page cache for each chunk, which costs less than writing it to a spill file."""

_MERGED_AS_DECODED = 3
"""How many bytes that are decoded save as much of the processor's time, by compiled code, as one
byte that is merged with adapters."""


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A file of the output."""

    name: str
    """The file's name."""
    tensors: tuple[OutputTensor, ...]
    """Its tensors in the order of their data."""
    header: bytes
    """The safetensors header, with its length field."""
    offsets: tuple[int, ...]
    """The first byte of each tensor's data in the file."""
    nbytes: int
    """The size of the file."""

    def __repr__(self) -> str:
        return summary(
            self, f"{self.name}, {counted(len(self.tensors), 'tensor')}, {sized(self.nbytes)}"
        )

    @property
    def data_nbytes(self) -> int:
        """Bytes of tensor data."""
        return self.nbytes - len(self.header)

    @property
    def spill_nbytes(self) -> int:
        """Bytes of disk space that its spill files need while it is written."""
        return self.transposed_nbytes + self.scales_nbytes

    @property
    def transposed_nbytes(self) -> int:
        """Bytes of its transpositions that go through spill files."""
        return sum(spilled_nbytes(segment) for segment, _ in self.spilled())

    @property
    def scales_nbytes(self) -> int:
        """Bytes of its scales that wait in spill files until their blocks are encoded."""
        return sum(scales.nbytes for _, scales in self.encoded_pairs())

    def begin_of(self, tensor: OutputTensor) -> int:
        """Return the first byte of a tensor's data in the file."""
        return self.offsets[self.tensors.index(tensor)]

    def overlapping(self, begin: int, end: int) -> Iterator[tuple[OutputTensor, int, int, int]]:
        """Yield the tensors with data in bytes `begin … end` of the file.

        Yields:
            The tensor, the first of its bytes, the byte after the last, and the offset in the file
            of the first.
        """
        for i in range(max(0, bisect_right(self.offsets, begin) - 1), len(self.tensors)):
            offset = self.offsets[i]
            if offset >= end:
                return
            low = max(begin, offset)
            high = min(end, offset + self.tensors[i].nbytes)
            if low < high:
                yield self.tensors[i], low - offset, high - offset, low

    def spilled(self, begin: int = 0) -> Iterator[tuple[Segment, int]]:
        """Yield the segments that go through a spill file, with their tensors' offsets.

        Args:
            begin: Only segments of tensors with data from this byte of the file on.
        """
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            for segment in tensor.segments:
                if offset + tensor.nbytes > begin and is_spilled(segment):
                    yield segment, offset

    def encoded_pairs(self) -> Iterator[tuple[OutputTensor, OutputTensor]]:
        """Yield the blocks and the scales that are encoded in one pass."""
        for blocks, scales in pairwise(self.tensors):
            if scales.made_with == blocks.name:
                yield blocks, scales


def is_spilled(segment: Segment) -> bool:
    """Return whether a segment is a transposition that goes through a spill file."""
    rearrangement = segment.rearrangement
    return (
        rearrangement.transposes
        and not SPILLED_AXES.isdisjoint("".join(rearrangement.axes))
        and spilled_nbytes(segment) > SPILL_NBYTES
    )


def spilled_nbytes(segment: Segment) -> int:
    """Return the bytes of a segment in a spill file; 0 if its operand is never spilled."""
    dtype = spilled_dtype(segment.operand)
    return 0 if dtype is None else segment.elements * dtype.itemsize


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(size: int | str) -> int:
    """Return a size in bytes.

    Args:
        size: Bytes, or a text such as "5GB" or "500MB" (decimal units).

    Raises:
        OptionError: For another text, and for less than 1 byte.
    """
    match = _SIZE.fullmatch(str(size).strip()) if not isinstance(size, bool) else None
    nbytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match and len(match[1]) < 20 else 0
    if nbytes < 1:
        raise OptionError(f"{short_repr(size)} is not a size; write it as 5GB or 500MB")
    return nbytes


def parse_size_or_zero(size: int | str) -> int:
    """Return a size in bytes that may be 0; else as `parse_size`."""
    return 0 if str(size).strip() == "0" else parse_size(size)


def plan_shards(
    tensors: Sequence[OutputTensor], limit: int, *, first_number: int = 1, stem: str = "model"
) -> tuple[PlannedShard, ...]:
    """Return the shards of an output.

    A single shard is named `model.safetensors`, several `model-00001-of-000NN.safetensors`.

    Args:
        tensors: The tensors in order.
        limit: The most bytes of tensor data in a shard; a larger tensor gets a shard of its own.
        first_number: The number of the first shard. With 0, as in OpenAI's repositories, the last
            number is one less too.
        stem: What the names of several shards begin with.
    """
    sizes = [tensor.nbytes for tensor in tensors]
    groups = _tensors_of_shards(tensors, limit)
    last_number = len(groups) - 1 + first_number
    shards = []
    first = 0
    for number, count in enumerate(groups, first_number):
        members = tuple(tensors[first : first + count])
        header = build_header((t.name, t.dtype, t.shape) for t in members)
        *offsets, end = accumulate(sizes[first : first + count], initial=len(header))
        name = (
            SINGLE_NAME
            if len(groups) == 1
            else f"{stem}-{number:05d}-of-{last_number:05d}.safetensors"
        )
        shards.append(PlannedShard(name, members, header, tuple(offsets), end))
        first += count
    return tuple(shards)


def _tensors_of_shards(tensors: Sequence[OutputTensor], limit: int) -> list[int]:
    """Return how many tensors, in order, are in each shard.

    Blocks and scales that are encoded in one pass are in the same shard.
    """
    counts: list[int] = []  # of tensors that stay together
    sizes: list[int] = []
    for number, tensor in enumerate(tensors):
        if number and tensor.made_with == tensors[number - 1].name:
            counts[-1] += 1
            sizes[-1] += tensor.nbytes
        else:
            counts.append(1)
            sizes.append(tensor.nbytes)
    ends = accumulate(balanced_groups(sizes, limit), initial=0)
    return [sum(counts[begin:end]) for begin, end in pairwise(ends)]


def _fill_groups(sizes: Iterable[int], limit: int) -> list[int]:
    """Return how many sizes, in order, fit into each group of at most `limit`."""
    groups: list[int] = []
    room = 0
    for size in sizes:
        if not groups or size > room:
            groups.append(0)
            room = limit
        groups[-1] += 1
        room -= size
    return groups


def balanced_groups(sizes: Sequence[int], limit: int) -> list[int]:
    """Cut sizes, in order, into as few groups as possible, and make the largest group small.

    Args:
        sizes: The sizes.
        limit: The most that the sizes of a group add up to. A larger size gets its own group.

    Returns:
        The number of sizes in each group.
    """
    count = len(_fill_groups(sizes, limit))
    low, high = max(sizes, default=1), limit
    while low < high:
        middle = (low + high) // 2
        if len(_fill_groups(sizes, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return _fill_groups(sizes, min(high, limit))


def spill_nbytes(shards: Iterable[PlannedShard]) -> int:
    """Return the bytes of disk space that spill files need while shards are written in order.

    The spilled transpositions of several shards may wait at a time, and the scales of two.
    """
    shards = list(shards)
    scales = sorted((shard.scales_nbytes for shard in shards), reverse=True)
    return sum(shard.transposed_nbytes for shard in shards) + sum(scales[:2])


def compiled_nbytes(shards: Iterable[PlannedShard]) -> int:
    """Return the bytes of floats that compiled code makes of MXFP4, or makes MXFP4 of.

    Floats that are merged with adapters count several times, by what that saves.
    """
    total = 0
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        for segment in tensor.segments:
            nbytes = segment.elements * tensor.dtype.itemsize
            if segment.encoding is not None:
                is_blocks = segment.encoding.component == BLOCKS
                values = segment.elements // BLOCK_NBYTES * BLOCK_VALUES if is_blocks else 0
                nbytes = values * DType.BF16.itemsize
            if isinstance(segment.operand, AdaptedOperand):
                total += _MERGED_AS_DECODED * nbytes
            elif segment.encoding is not None or isinstance(segment.operand, Mxfp4Operand):
                total += nbytes
    return total


def write_nbytes(shard: PlannedShard) -> int:
    """Return the bytes that are written for a shard, with those of its spill files."""
    return shard.nbytes + shard.spill_nbytes
