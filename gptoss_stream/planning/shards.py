"""From a source and a format to write to a plan: every shard, tensor, shape and size of the output.

Reads headers and configuration, no tensor data (but of a bias that must be zero), and moves none.
All that can be wrong with a source and is visible in these is found here, before the first byte is
written.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from ..errors import OptionError
from ..tensors.safetensors_header import build_header
from ..transforms.operands import DenseOperand, as_dense
from ..transforms.output_tensor import OutputTensor, Segment

__all__ = ["DEFAULT_SHARD_SIZE", "PlannedShard", "parse_size", "plan_shards", "write_nbytes"]


DEFAULT_SHARD_SIZE = "5GB"


SPILL_NBYTES = 64_000_000
"""A transposition of more than this goes through a spill file (`scratch`): reading it a few columns
at a time would read it from disk once for each time."""


SPILLED_AXES = frozenset({"v"})
"""Only tensors with these axes are that large; an expert's matrix is read again from the page
cache for each segment of the output, which costs less than writing it once more."""


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One file of the output: its tensors in order, and where each one's data begins in it."""

    name: str
    tensors: tuple[OutputTensor, ...]
    header: bytes = field(repr=False)
    offsets: tuple[int, ...] = field(repr=False)
    nbytes: int

    @property
    def data_nbytes(self) -> int:
        """Bytes of tensor data."""
        return self.nbytes - len(self.header)

    @property
    def spill_nbytes(self) -> int:
        """Disk space that is needed beside the shard while it is made."""
        return sum(
            segment.elements * as_dense(segment.operand).raw.dtype.itemsize
            for segment, _ in self.spilled()
        )

    def overlapping(self, begin: int, end: int) -> Iterator[tuple[OutputTensor, int, int, int]]:
        """The tensors with data in bytes `begin … end` of the file: tensor, from and to which of
        its bytes, and where in the file that is."""
        for i in range(max(0, bisect_right(self.offsets, begin) - 1), len(self.tensors)):
            at = self.offsets[i]
            if at >= end:
                return
            low = max(begin, at)
            high = min(end, at + self.tensors[i].nbytes)
            if low < high:
                yield self.tensors[i], low - at, high - at, low

    def spilled(self) -> Iterator[tuple[Segment, int]]:
        """The parts that are transposed through a scratch file, and where their tensors begin."""
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            for segment in tensor.segments:
                if is_spilled(segment):
                    yield segment, offset


def is_spilled(segment: Segment) -> bool:
    """Whether a part is a transposition too large to be read in columns."""
    operand, how = segment.operand, segment.rearrangement
    return (
        how.transposes
        and isinstance(operand, DenseOperand)
        and not SPILLED_AXES.isdisjoint("".join(how.axes))
        and segment.elements * operand.raw.dtype.itemsize > SPILL_NBYTES
    )


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as "5GB", "500MB" or 1000 (decimal units); raises `OptionError`."""
    match = _SIZE.fullmatch(str(size).strip())
    nbytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match and len(match[1]) < 20 else 0
    if nbytes < 1:
        raise OptionError(f"{size!r} is not a size; write it as 5GB or 500MB")
    return nbytes


def plan_shards(
    tensors: Sequence[OutputTensor], limit: int, *, first_number: int = 1, stem: str = "model"
) -> tuple[PlannedShard, ...]:
    """Lay tensors, in order, into shards of at most `limit` bytes of data.

    One suffices: `model.safetensors`. More: `model-00001-of-000NN.safetensors`, counted from
    `first_number` (OpenAI's repositories count from 0, and the last number follows suit).
    """
    sizes = [tensor.nbytes for tensor in tensors]
    groups = balanced_groups(sizes, limit)
    last_number = len(groups) - 1 + first_number
    result = []
    first = 0
    for number, count in enumerate(groups, first_number):
        members = tuple(tensors[first : first + count])
        header = build_header((t.name, t.dtype, t.shape) for t in members)
        starts = accumulate(sizes[first : first + count], initial=len(header))
        *offsets, end = starts
        name = (
            "model.safetensors"
            if len(groups) == 1
            else f"{stem}-{number:05d}-of-{last_number:05d}.safetensors"
        )
        result.append(PlannedShard(name, members, header, tuple(offsets), end))
        first += count
    return tuple(result)


def _greedy(sizes: Iterable[int], limit: int) -> list[int]:
    """How many of the sizes go into each group, in order; one above the limit goes alone."""
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
    """Cut sizes, in order, into as few groups of at most `limit` as possible, the largest group
    being as small as it can: how many sizes go into each.

    A size above the limit makes a group alone.
    """
    count = len(_greedy(sizes, limit))
    low, high = max(sizes, default=1), limit
    while low < high:
        middle = (low + high) // 2
        if len(_greedy(sizes, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return _greedy(sizes, min(high, limit))


def write_nbytes(shard: PlannedShard) -> int:
    """What making a shard costs, in bytes written: its own, and those of a large transpose."""
    return shard.nbytes + shard.spill_nbytes
