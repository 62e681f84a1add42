"""How much of a source the shards of an output are made of."""

from __future__ import annotations

from collections.abc import Iterable

from ..transforms.output_tensor import element_ranges
from .shards import PlannedShard

__all__ = ["source_nbytes"]


def source_nbytes(shards: Iterable[PlannedShard]) -> int:
    """Return the bytes that shards are made of, each counted once.

    Those of a reference and of adapters are left out.
    """
    ranges: dict[str, list[tuple[int, int]]] = {}
    itemsizes = {}
    for shard in shards:
        for tensor in shard.tensors:
            for found in element_ranges(tensor, 0, tensor.nbytes):
                if found.raw.checkpoint:
                    continue
                itemsizes[found.raw.name] = found.raw.dtype.itemsize
                of_tensor = ranges.setdefault(found.raw.name, [])
                of_tensor.append((found.first, found.first + found.count))
    return sum(itemsizes[name] * _union_length(some) for name, some in ranges.items())


def _union_length(ranges: Iterable[tuple[int, int]]) -> int:
    """Return the number of elements in ranges [begin, end), each counted once."""
    length, reached = 0, 0
    for begin, end in sorted(ranges):
        length += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return length
