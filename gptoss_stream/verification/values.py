"""Comparison of elements that were read with those that are expected."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from .._utils.thread_pool import Buffer
from ..tensors.cast import STORAGE, cast
from ..tensors.dtypes import DType
from ..tensors.raw_tensor import RawTensor
from ..transforms.output_tensor import OutputTensor
from .differences import Difference

__all__ = ["ValueDifferences", "first_unequal"]


class ValueDifferences:
    """The first difference in each tensor, added from any thread."""

    def __init__(self) -> None:
        self._by_tensor: dict[str, Difference] = {}
        self._lock = threading.Lock()

    def add(
        self, tensor: OutputTensor, raw: RawTensor, element: int, found: Any, expected: Any
    ) -> None:
        """Add a difference, unless one earlier in the same tensor is known."""
        index = tuple(int(i) for i in np.unravel_index(element, tensor.shape))
        values = _number(found, tensor.dtype), _number(expected, tensor.dtype)
        difference = Difference("value", tensor.name, raw.shard, *values, index)
        with self._lock:
            known = self._by_tensor.get(tensor.name)
            if known is None or index < known.index:
                self._by_tensor[tensor.name] = difference

    def in_order(self) -> list[Difference]:
        """Return the differences in order of the tensors' names."""
        return [self._by_tensor[name] for name in sorted(self._by_tensor)]


def first_unequal(found: Buffer, expected: Buffer) -> int | None:
    """Return the flat index of the first element whose bits differ, if any.

    Equal NaNs are equal; 0.0 and -0.0 are not.
    """
    integer = f"u{expected.itemsize}"
    unequal = (found.view(integer) != expected.view(integer)).reshape(-1)
    first = int(unequal.argmax())
    return first if unequal[first] else None


def _number(element: Any, dtype: DType) -> float | str:
    """Return a stored element as a number, or as text for NaN and infinity, unknown to JSON."""
    if dtype is DType.U8:
        return int(element)
    wide = np.empty(1, np.float32)
    cast(np.array([element], STORAGE[dtype]), dtype, wide, DType.F32)
    return float(wide[0]) if np.isfinite(wide[0]) else str(wide[0])
