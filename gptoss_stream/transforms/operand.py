"""What an operand is: an array of stored elements that is loaded a tile at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from ..checkpoint.reader import ElementRange, Reader
from ..tensors.dtypes import DType

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Interval", "Loaded", "Operand", "Tile"]

Interval: TypeAlias = tuple[int, int]
"""Indices [begin, end)."""


class Tile(NamedTuple):
    """Rows and columns of an operand to load."""

    rows: Interval
    """Indices along the first axis."""
    columns: Interval | None
    """Indices along the second axis; None for all, and for operands without one."""
    dtype: DType
    """The dtype that the caller will cast to. All operands except dense ones give it."""
    out: np.ndarray[Any, Any] | None = None
    """Memory of the tile's shape and dtype that the operand may use for the result."""
    by_column: bool = False
    """Whether the caller transposes the result, so that columns that are contiguous save time."""


Loaded: TypeAlias = "tuple[np.ndarray[Any, Any], DType]"
"""The elements of a tile and their dtype."""


class Operand(Protocol):
    """An array of elements that are stored in the source."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        ...

    def load(self, reader: Reader, tile: Tile) -> AbstractContextManager[Loaded]:
        """Load a tile.

        Returns:
            A context manager of the elements, valid within the context, and their dtype. The
            array is `tile.out` itself if the operand used that memory.
        """
        ...

    def element_ranges(self, rows: Interval) -> Iterator[ElementRange]:
        """Yield the element ranges that loading the rows reads."""
        ...
