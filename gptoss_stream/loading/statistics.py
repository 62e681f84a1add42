"""Statistics and a corner of a tensor, computed in bounded memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf, prod, sqrt
from typing import TYPE_CHECKING, Any

from ..tensors.dtypes import NUMPY_NAMES, DType
from .checkpoint_tensors import CheckpointTensors

if TYPE_CHECKING:
    import numpy as np

__all__ = ["TensorStatistics", "corner", "statistics"]

_ELEMENTS = 1 << 20  # that are widened to float64 at a time
_CORNER_ROWS, _CORNER_COLUMNS = 3, 6


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """Statistics of a tensor's finite values; `min` and `max` are None without any."""

    min: float | None
    max: float | None
    mean: float
    norm: float
    """The square root of the sum of squares."""
    nan: int
    infinite: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the statistics as JSON types."""
        return asdict(self)


def statistics(tensors: CheckpointTensors, name: str) -> TensorStatistics | None:
    """Compute the statistics of a tensor, in float64.

    Args:
        tensors: The tensors.
        name: The tensor's name.

    Returns:
        The statistics; None for a complex dtype, and for one that is neither numpy's nor bfloat16.
    """
    import numpy as np

    dtype = tensors.entries[name].dtype
    if not _has_values(dtype):
        return None
    low, high, total, squares = inf, -inf, 0.0, 0.0
    count = nan = infinite = 0
    for data in tensors.slices(name):
        for first in range(0, len(data), _ELEMENTS * dtype.itemsize):
            part = _values(data[first : first + _ELEMENTS * dtype.itemsize], dtype)
            values = part.astype(np.float64)
            is_finite = np.isfinite(values)
            if not is_finite.all():
                nan += int(np.isnan(values).sum())
                infinite += int(np.isinf(values).sum())
                values = values[is_finite]
            if len(values):
                low, high = min(low, float(values.min())), max(high, float(values.max()))
                with np.errstate(all="ignore"):  # squares of float64 may be too large for it
                    total += float(values.sum())
                    squares += float(np.dot(values, values))
                count += len(values)
    return TensorStatistics(
        min=low if count else None,
        max=high if count else None,
        mean=total / count if count else 0.0,
        norm=sqrt(squares),
        nan=nan,
        infinite=infinite,
    )


def corner(tensors: CheckpointTensors, name: str) -> np.ndarray[Any, Any] | None:
    """Return the first values of a tensor: of its last two axes, at index 0 of the others.

    Args:
        tensors: The tensors.
        name: The tensor's name.

    Returns:
        At most [3, 6] values, or [6] of a tensor without two axes;
        None for a complex dtype, and for one that is neither numpy's nor bfloat16.
    """
    import numpy as np

    entry = tensors.entries[name]
    if not _has_values(entry.dtype):
        return None
    is_matrix = len(entry.shape) > 1 and 0 not in entry.shape
    if is_matrix:
        count = min(entry.shape[-2], _CORNER_ROWS) * entry.shape[-1]
    else:
        count = min(prod(entry.shape), _CORNER_COLUMNS)
    data = np.empty(count * entry.dtype.itemsize, np.uint8)  # the tensor's first bytes
    tensors.loader.make_into(entry.tensor, 0, len(data), data)
    values = _values(data, entry.dtype)
    return values.reshape(-1, entry.shape[-1])[:, :_CORNER_COLUMNS] if is_matrix else values


def _has_values(dtype: DType) -> bool:
    """Return whether `_values` can be called for a dtype, and its values are ordered."""
    return dtype is DType.BF16 or (dtype in NUMPY_NAMES and dtype is not DType.C64)


def _values(data: np.ndarray[Any, Any], dtype: DType) -> np.ndarray[Any, Any]:
    """Return the values that bytes mean: bfloat16 as float32, bool as the bytes."""
    from ..tensors.cast import STORAGE, as_float32

    if dtype is DType.BF16:
        return as_float32(data.view(STORAGE[dtype]), dtype)
    return data.view(NUMPY_NAMES[DType.U8 if dtype is DType.BOOL else dtype])
