"""What adapters change in a matrix of the model, a tile at a time.

A matrix is a tensor of one layer and expert, [outputs, inputs] as `model.tensors.matrix_axes` says;
a vector is a matrix with one input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from ..checkpoint.reader import Reader
from ..tensors.dtypes import DType
from ..tensors.raw_tensor import RawTensor
from .factors import Factor, FactorCache, Numbers, as_index

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Change", "LowRankChange", "RowsChange"]

_MAX_NUMBERS = 8192
"""The most outputs or inputs of a tile that a low-rank change takes at once, which bounds the
memory for rows of factors."""


@dataclass(frozen=True, slots=True)
class LowRankChange:
    """The addition of `scale * left @ right.T`, in float32."""

    left: Factor
    """[outputs, rank]."""
    right: Factor | None
    """[inputs, rank]; None for a vector."""
    shape: tuple[int, int]
    """The matrix's numbers of outputs and inputs."""
    scale: float
    cache: FactorCache = field(repr=False, compare=False)
    is_rounded_by_peft: bool = False
    """Whether PEFT rounds it to the model's dtype before it adds it."""
    rounded_to: DType | None = None
    """The dtype that it is rounded to before it is added; None for none."""
    magnitude: Factor | None = None
    """DoRA's length of each output's row, [outputs, 1]; None without DoRA."""

    @property
    def raw(self) -> RawTensor:
        """A tensor of the adapter that it is made of, for messages."""
        return self.left.raw

    def apply(
        self,
        values: np.ndarray[Any, Any],
        outputs: Numbers,
        inputs: Numbers,
        reader: Reader,
    ) -> None:
        """Change a tile in place, without the scaling by `magnitude`.

        Args:
            values: The tile, [outputs, inputs] float32.
            outputs: The numbers of its outputs in the matrix.
            inputs: The numbers of its inputs.
            reader: Reads the adapter.
        """
        from ..tensors.low_rank import add_product

        through = None if self.rounded_to in (None, DType.F32) else self._round
        for place, left, right in self._factors(outputs, inputs, reader):
            add_product(values[place], left, right, through)

    def apply_to_bfloat16(
        self,
        bits: np.ndarray[Any, Any],
        outputs: Numbers,
        inputs: Numbers,
        reader: Reader,
        out: np.ndarray[Any, Any],
    ) -> bool:
        """Change a tile of bfloat16 and round it to bfloat16, in the processor's cache.

        Args:
            bits: The tile, [outputs, inputs] uint16.
            outputs: The numbers of its outputs in the matrix.
            inputs: The numbers of its inputs.
            reader: Reads the adapter.
            out: Memory for the result.

        Returns:
            Whether that was done; else `apply` has to be used, which says what is wrong.
        """
        from ..tensors.low_rank import add_product_to_bfloat16

        return all(
            add_product_to_bfloat16(bits[place], left, right, out[place])
            for place, left, right in self._factors(outputs, inputs, reader)
        )

    def _factors(
        self, outputs: Numbers, inputs: Numbers, reader: Reader
    ) -> Iterator[tuple[tuple[slice, slice], np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Yield parts of a tile, with what the factors have for their outputs and inputs."""
        for top in range(0, len(outputs), _MAX_NUMBERS):
            rows = slice(top, top + _MAX_NUMBERS)
            left = self.cache.find(self.left, self.scale, self.shape[0], outputs[rows], reader)
            for begin in range(0, len(inputs), _MAX_NUMBERS):
                columns = slice(begin, begin + _MAX_NUMBERS)
                yield (rows, columns), left, self._right(inputs[columns], reader)

    def _right(self, inputs: Numbers, reader: Reader) -> np.ndarray[Any, Any]:
        """Return what the second factor has for inputs, [rank, inputs]."""
        import numpy as np

        if self.right is None:
            return np.ones((1, len(inputs)), np.float32)
        return self.cache.find(self.right, 1.0, self.shape[1], inputs, reader)

    def _round(self, delta: np.ndarray[Any, Any]) -> None:
        """Round a part of the change to `rounded_to`, in place.

        Raises:
            OverflowError: If a value is too large for it.
        """
        import numpy as np

        from ..tensors.cast import STORAGE, cast

        if self.rounded_to is not None:
            rounded = np.empty(delta.shape, STORAGE[self.rounded_to])
            cast(delta, DType.F32, rounded, self.rounded_to)
            cast(rounded, self.rounded_to, delta, DType.F32)


@dataclass(frozen=True, slots=True)
class RowsChange:
    """The replacement of some outputs' rows, such as those of a few tokens of an embedding."""

    raw: RawTensor
    """The new rows, [rows, inputs]."""
    rows: Sequence[int]
    """The number of the output that each is for."""

    def apply(
        self,
        values: np.ndarray[Any, Any],
        outputs: Numbers,
        inputs: Numbers,
        reader: Reader,
    ) -> None:
        """Change a tile in place (see `LowRankChange.apply`)."""
        import numpy as np

        from ..tensors.cast import as_float32

        place = {row: number for number, row in enumerate(self.rows)}
        outputs = np.asarray(outputs)
        width = self.raw.shape[1]
        for position in np.flatnonzero(np.isin(outputs, self.rows)):
            number = place[int(outputs[position])]
            with reader.read(self.raw, number * width, (width,)) as array:
                values[position] = as_float32(array, self.raw.dtype)[as_index(inputs)]


Change: TypeAlias = "LowRankChange | RowsChange"
"""A change of a matrix."""
