"""The description of a tensor in a safetensors file, as the file's header gives it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .._utils.messages import summary
from .dtypes import DType

__all__ = ["RawTensor", "RegroupedTensor"]


@dataclass(frozen=True, slots=True)
class RawTensor:
    """The name, dtype, shape and bytes of a tensor in a safetensors file."""

    name: str
    """Its name in the file."""
    dtype: DType
    """Its dtype as it is stored."""
    shape: tuple[int, ...]
    """Its shape as it is stored."""
    shard: str
    """The name of the safetensors file."""
    offset: int
    """The first byte of its data in the file."""
    checkpoint: int = 0
    """Which of the checkpoints that a conversion reads: 0 the source, 1 the reference, others the
    adapters."""

    def __repr__(self) -> str:
        return summary(self, f"{self.name}, {self.dtype}, {list(self.shape)} in {self.shard}")

    @property
    def nbytes(self) -> int:
        """The size of its data in bytes."""
        return prod(self.shape) * self.dtype.bits // 8

    @property
    def end(self) -> int:
        """The byte after the last of its data in the file."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class RegroupedTensor(RawTensor):
    """A tensor that is stored as [rows, groups * width], and is read as [groups, rows, width].

    Example: in `lora_B` [5760, 512] of rank 16, column j belongs to expert j mod 32. Expert 3 alone
    is [5760, 16], and touches every row.
    """

    is_group_fastest: bool = True
    """Whether neighbours along the second axis belong to different groups."""
