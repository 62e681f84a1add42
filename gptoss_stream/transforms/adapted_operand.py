"""An operand with what an adapter changes in it.

It is loaded like the operand that it is made of, in whatever order of axes that has, and gives
float32. So merging an adapter is no step of its own: what is rearranged, cast or encoded afterwards
is the merged tensor, and it is rounded once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..checkpoint.reader import ElementRange, Reader
from ..errors import TensorError
from ..tensors.dtypes import DType
from .changes import Change, LowRankChange
from .factors import Factor, Numbers, as_index
from .operand import Interval, Loaded, Operand, Tile

if TYPE_CHECKING:
    import numpy as np

__all__ = ["AdaptedOperand", "DoraScaling", "MatrixAxis"]

_Array: TypeAlias = "np.ndarray[Any, Any]"
_NORM_TILE_NBYTES = 1 << 20


class MatrixAxis(NamedTuple):
    """An axis of an operand: which outputs or inputs of the matrix its indices are.

    Example: the axis (n h) of query heads, 64 heads of 64 elements, is ((64, 64), (64, 1)).
    """

    is_input: bool
    strides: tuple[tuple[int, int], ...]
    """The size of each model axis in it, outermost first, and how far apart its indices are."""

    def numbers(self, interval: Interval | None) -> Numbers:
        """Return the outputs or inputs for an interval of indices, or for all."""
        import numpy as np

        (size, stride), *others = reversed(self.strides)
        while others and others[0][1] == size * stride:
            size *= others.pop(0)[0]
        whole = slice(None) if interval is None else slice(*interval)
        if not others:
            return range(0, size * stride, stride)[whole]
        numbers = np.arange(size) * stride
        for size, stride in others:
            numbers = (np.arange(size)[:, None] * stride + numbers).reshape(-1)
        return numbers[whole]


class DoraScaling:
    """What DoRA multiplies the rows of a matrix with its change by; computed once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scaling: _Array | None = None

    @property
    def is_known(self) -> bool:
        """Whether it is computed."""
        return self._scaling is not None

    def find(self, operand: AdaptedOperand, magnitude: Factor, reader: Reader) -> _Array:
        """Return the scaling, [outputs] float32: DoRA's length of each row by its own."""
        import numpy as np

        with self._lock:
            if self._scaling is None:
                lengths = magnitude.load(reader, 0, operand.num_outputs)[0].astype(np.float32)
                with np.errstate(all="ignore"):
                    self._scaling = lengths / operand.row_norms(reader)
            return self._scaling


@dataclass(frozen=True, slots=True, eq=False)
class AdaptedOperand:
    """An operand that holds a matrix, or some of its rows, with a change."""

    base: Operand
    axes: tuple[MatrixAxis, ...]
    """What each axis of the operand is in the matrix."""
    first: tuple[int, int]
    """The output and the input at the operand's first element."""
    change: Change
    num_outputs: int
    """The number of outputs of the whole matrix."""
    dtype: DType
    """What loading gives: float32, or the dtype of the base if each adapter is rounded to it."""
    base_dtype: DType
    """The dtype that holds the base's values exactly."""
    dora: DoraScaling = field(default_factory=DoraScaling, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Operand`."""
        return self.base.shape

    @property
    def _magnitude(self) -> Factor | None:
        return self.change.magnitude if isinstance(self.change, LowRankChange) else None

    @contextmanager
    def load(self, reader: Reader, tile: Tile) -> Iterator[Loaded]:
        """See `Operand`; the values have the operand's dtype, or the tile's if that is bfloat16."""
        import numpy as np

        from ..tensors.cast import STORAGE, cast

        rounded = self._load_rounded(reader, tile)
        if rounded is not None:
            yield rounded, DType.BF16
            return
        values, outputs, inputs = self._load_base(reader, tile)
        self._change(reader, values, outputs, inputs)
        if self.dtype is DType.F32:
            yield values, self.dtype
            return
        rounded = np.empty(values.shape, STORAGE[self.dtype])
        cast(values, DType.F32, rounded, self.dtype)
        yield rounded, self.dtype

    def _load_rounded(self, reader: Reader, tile: Tile) -> _Array | None:
        """Load a tile and change it, from bfloat16 to bfloat16 at once, in the processor's cache.

        Returns:
            The tile; None if that is not what is wanted, or a value is NaN, infinite or too large.
        """
        import numpy as np

        change, dtypes = self.change, {tile.dtype, self.base_dtype}
        if not isinstance(change, LowRankChange) or change.magnitude is not None:
            return None
        if dtypes != {DType.BF16} or self.dtype is not DType.F32:
            return None
        outputs, inputs = self._numbers(tile)
        with self.base.load(reader, tile) as (array, dtype):
            if dtype is not DType.BF16:
                return None
            rounded = array if array.flags.writeable else tile.out  # its own memory, or that
            if rounded is None:
                rounded = np.empty(array.shape, np.uint16)
            bits, out = (self._as_matrix(one, outputs) for one in (array, rounded))
            if not np.shares_memory(out, rounded):
                return None
            is_done = change.apply_to_bfloat16(bits, outputs, inputs, reader, out)
            return rounded if is_done else None

    def _load_base(self, reader: Reader, tile: Tile) -> tuple[_Array, Numbers, Numbers]:
        """Load a tile of the base as float32; returns it with its outputs and inputs."""
        import numpy as np

        from ..tensors.cast import cast

        values = tile.out if tile.dtype is DType.F32 else None
        if values is None:
            values = np.empty([len(some) for some in self._indices(tile)], np.float32)
        with self.base.load(reader, Tile(tile.rows, tile.columns, DType.F32, values)) as loaded:
            array, dtype = loaded
            if dtype is DType.F32 and array.flags.writeable:
                values = array  # its own memory, and perhaps that of `values`
            else:
                cast(array, dtype, values, DType.F32)
        return values, *self._numbers(tile)

    def _indices(self, tile: Tile) -> list[Numbers]:
        """Return which outputs or inputs the indices along each axis of a tile are."""
        intervals = [tile.rows, tile.columns, *[None] * len(self.shape)][: len(self.shape)]
        return [axis.numbers(part) for axis, part in zip(self.axes, intervals, strict=True)]

    def _numbers(self, tile: Tile) -> tuple[Numbers, Numbers]:
        """Return the outputs and the inputs of a tile."""
        numbers = list(zip(self.axes, self._indices(tile), strict=True))
        return (
            _sums(self.first[0], [some for axis, some in numbers if not axis.is_input]),
            _sums(self.first[1], [some for axis, some in numbers if axis.is_input]),
        )

    def _change(self, reader: Reader, values: _Array, outputs: Numbers, inputs: Numbers) -> None:
        """Change a tile in place."""
        import numpy as np

        matrix = self._as_matrix(values, outputs)
        self._change_matrix(reader, matrix, outputs, inputs)
        if self._magnitude is not None:
            scaling = self.dora.find(self, self._magnitude, reader)[as_index(outputs)]
            with np.errstate(all="ignore"):
                matrix *= scaling[:, None]
            self._check_finite(scaling)
        if not np.shares_memory(matrix, values):
            turned = values.transpose(self._order)
            turned[...] = matrix.reshape(turned.shape)

    def _change_matrix(
        self, reader: Reader, matrix: _Array, outputs: Numbers, inputs: Numbers
    ) -> None:
        """Change a tile in place, without DoRA's scaling."""
        self.change.apply(matrix, outputs, inputs, reader)
        self._check_finite(matrix)

    def _as_matrix(self, values: _Array, outputs: Numbers) -> _Array:
        """Return a tile as [outputs, inputs], sharing its memory where the axes allow that."""
        return values.transpose(self._order).reshape(len(outputs), -1)

    def _check_finite(self, values: _Array) -> None:
        """Refuse values that are NaN or infinite."""
        import numpy as np

        if not (np.isfinite(values.max()) and np.isfinite(values.min())):
            raw = self.change.raw
            raise TensorError(
                f"{raw.shard}: with tensor {raw.name!r} merged, values are NaN or infinite; the "
                "adapter or the model is damaged: check both"
            )

    @property
    def _order(self) -> list[int]:
        """The operand's axes with those of outputs first."""
        return sorted(range(len(self.axes)), key=lambda number: self.axes[number].is_input)

    def row_norms(self, reader: Reader) -> _Array:
        """Return the lengths of the rows of the matrix with its change, [outputs] float32.

        Each sum is taken in float64 and in the order of the inputs, whatever the tiles.
        """
        import numpy as np

        sums = np.zeros(self.num_outputs)
        row_nbytes = prod(self.shape[1:]) * DType.F32.itemsize
        step = max(1, _NORM_TILE_NBYTES // row_nbytes)
        for begin in range(0, self.shape[0], step):
            rows = begin, min(begin + step, self.shape[0])
            values, outputs, inputs = self._load_base(reader, Tile(rows, None, DType.F32))
            matrix = self._as_matrix(values, outputs)
            self._change_matrix(reader, matrix, outputs, inputs)
            found = sums[as_index(outputs)]
            for column in np.ascontiguousarray(matrix.T, np.float64):
                found += column * column
            sums[as_index(outputs)] = found
        return np.sqrt(sums).astype(np.float32)

    def element_ranges(self, rows: Interval) -> Iterator[ElementRange]:
        """See `Operand`; DoRA needs all rows until their lengths are known."""
        needs_all = self._magnitude is not None and not self.dora.is_known
        yield from self.base.element_ranges((0, self.shape[0]) if needs_all else rows)


def _sums(first: int, parts: list[Numbers]) -> Numbers:
    """Return the sums of a number of each part, the last part's fastest."""
    import numpy as np

    if not parts:
        return range(first, first + 1)
    part = parts[0]
    if len(parts) == 1 and isinstance(part, range):
        return range(first + part.start, first + part.stop, part.step)
    sums = np.full(1, first, np.intp)
    for some in parts:
        sums = (sums[:, None] + np.asarray(some)).reshape(-1)
    return sums
