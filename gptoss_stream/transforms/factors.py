"""The factors of low-rank changes, as an adapter stores them, and a cache of those in use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..checkpoint.reader import Reader
from ..tensors.raw_tensor import RawTensor

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Factor", "FactorCache", "Numbers", "as_index"]

Numbers: TypeAlias = "range | np.ndarray[Any, Any]"
"""Numbers of outputs or inputs, ascending if they are a range."""

_CACHE_NBYTES = 6 << 20
"""The most bytes of factors in memory, for all threads: with rank 64, those of three matrices."""
_CACHED_NBYTES = 4 << 20
"""A larger factor, such as that of an unembedding, is not kept: each tile takes some rows of it."""


@dataclass(frozen=True, slots=True)
class Factor:
    """One of the two factors of a change: a matrix [size, rank], stored that way or transposed.

    Example: expert 3 of 32 has rows 48 to 64 of a `lora_A` [512, 2880] of rank 16. `first` is
    48 * 2880, `size` 2880, `rank` 16, and `is_rank_first` is true.
    """

    raw: RawTensor
    first: int
    """The first element in the raw tensor."""
    size: int
    rank: int
    is_rank_first: bool
    """Whether it is stored as [rank, size]."""
    indices: range | None = None
    """Which indices of the change's axis it has, such as every other one; None for all. All others
    are zero."""

    def __hash__(self) -> int:
        """Return a hash that takes little time, since each tile needs it."""
        return hash((self.raw.name, self.first))

    def load(self, reader: Reader, begin: int, end: int) -> np.ndarray[Any, Any]:
        """Load what the factor has for indices `begin … end` of the change's axis.

        Returns:
            [rank, end - begin] float64.
        """
        import numpy as np

        if self.indices is None:
            return self._load(reader, begin, end)
        start, step = self.indices.start, self.indices.step
        low, high = (max(0, -(-(index - start) // step)) for index in (begin, end))
        out = np.zeros((self.rank, end - begin))
        if low < high:
            out[:, start + low * step - begin :: step] = self._load(reader, low, high)
        return out

    def _load(self, reader: Reader, begin: int, end: int) -> np.ndarray[Any, Any]:
        """Load some of the factor, without what is zero."""
        import numpy as np

        out = np.empty((self.rank, end - begin))
        if not self.is_rank_first:
            shape = end - begin, self.rank
            self._read(reader, self.first + begin * self.rank, shape, out.T)
        elif (begin, end) == (0, self.size):
            self._read(reader, self.first, (self.rank, self.size), out)
        else:
            for number, row in enumerate(out):
                first = self.first + number * self.size + begin
                self._read(reader, first, (end - begin,), row)
        return out

    def _read(
        self, reader: Reader, first: int, shape: tuple[int, ...], out: np.ndarray[Any, Any]
    ) -> None:
        """Read elements as float64."""
        from ..tensors.cast import as_float32

        with reader.read(self.raw, first, shape) as array:
            out[...] = as_float32(array, self.raw.dtype)


class FactorCache:
    """The factors that were used last, rounded for exact products, for any thread."""

    def __init__(self) -> None:
        self._factors: OrderedDict[tuple[Factor, float], np.ndarray[Any, Any]] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def find(
        self, factor: Factor, scale: float, size: int, numbers: Numbers, reader: Reader
    ) -> np.ndarray[Any, Any]:
        """Return what a factor has for some outputs or inputs, times a scale.

        Args:
            factor: The factor.
            scale: The scale.
            size: The size of the change's axis.
            numbers: The outputs or inputs, at least one.
            reader: Reads the adapter.

        Returns:
            [rank, numbers] float32, rounded by `on_grid`.
        """
        import numpy as np

        from ..tensors.low_rank import on_grid

        def prepared(begin: int, end: int) -> np.ndarray[Any, Any]:
            with np.errstate(all="ignore"):  # what is not finite is refused once it is added
                return on_grid(factor.load(reader, begin, end) * scale)

        if size * factor.rank * 4 <= _CACHED_NBYTES:
            whole = self._find((factor, scale), lambda: prepared(0, size))
            return whole[:, as_index(numbers)]
        first, last = int(min(numbers)), int(max(numbers))
        return prepared(first, last + 1)[:, as_index(numbers, first)]

    def _find(
        self, key: tuple[Factor, float], make: Callable[[], np.ndarray[Any, Any]]
    ) -> np.ndarray[Any, Any]:
        """Return what is kept for a key; make it if nothing is."""
        with self._lock:
            if key in self._factors:
                self._factors.move_to_end(key)
                return self._factors[key]
        made = make()  # perhaps by two threads at once, which costs less than waiting
        with self._lock:
            if key not in self._factors:
                self._factors[key] = made
                self._nbytes += made.nbytes
            while self._nbytes > _CACHE_NBYTES and len(self._factors) > 1:
                self._nbytes -= self._factors.popitem(last=False)[1].nbytes
        return made


def as_index(numbers: Numbers, first: int = 0) -> slice | np.ndarray[Any, Any]:
    """Return numbers, counted from `first`, as an index of an array: a slice where possible."""
    if isinstance(numbers, range):
        return slice(numbers.start - first, numbers.stop - first, numbers.step)
    return numbers - first
