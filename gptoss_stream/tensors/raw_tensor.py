"""A tensor in a safetensors file, as the file's header describes it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .dtypes import DType

__all__ = ["RawTensor"]


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as a file names and stores it."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    shard: str
    """The name of the file."""
    offset: int
    """The first byte of its data in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.bits // 8

    @property
    def end(self) -> int:
        """The byte after the last of its data in the file."""
        return self.offset + self.nbytes
