"""How the rows of a segment are encoded to MXFP4."""

from __future__ import annotations

from dataclasses import dataclass

from ..tensors.dtypes import BLOCK_NBYTES, BLOCK_VALUES
from .mxfp4_operand import Mxfp4Operand

__all__ = ["BLOCKS", "SCALES", "RowEncoding"]

BLOCKS, SCALES = 0, 1
"""The two tensors that an encoding makes of one."""


@dataclass(frozen=True, slots=True, eq=False)
class RowEncoding:
    """How rows of floats become rows of blocks or of scales."""

    rule: str
    """The name of the rule (see `tensors.mxfp4_rules`)."""
    component: int
    """`BLOCKS` or `SCALES`."""
    reference: Mxfp4Operand | None = None
    """The same rows in MXFP4. A block of these that decodes to the values of a row is written
    instead of one that is encoded; None for no such rows."""

    def row_nbytes(self, columns: int) -> int:
        """Return the bytes of a row of so many floats."""
        return columns // BLOCK_VALUES * (BLOCK_NBYTES if self.component == BLOCKS else 1)
