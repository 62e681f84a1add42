"""The dtypes of an output: the main one, and where precision is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ..tensors.dtypes import DType, is_exact
from ..transforms.operands import raw_tensors
from ..transforms.output_tensor import OutputTensor

__all__ = ["count_narrowed", "main_dtype"]


def main_dtype(tensors: Iterable[OutputTensor]) -> DType:
    """Return the dtype of most dense elements; bfloat16 without any."""
    counts: Counter[DType] = Counter()
    for tensor in tensors:
        if tensor.dtype is not DType.U8:
            counts[tensor.dtype] += tensor.nbytes // tensor.dtype.itemsize
    return max(counts, key=lambda dtype: counts[dtype], default=DType.BF16)


def count_narrowed(tensors: Iterable[OutputTensor]) -> dict[str, int]:
    """Count the tensors that lose precision, by dtypes."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        found = {raw.dtype for s in tensor.segments for raw in raw_tensors(s.operand)}
        if any(segment.encoding is not None for segment in tensor.segments):
            continue  # the report says what encoding loses
        counts.update(
            f"{'MXFP4' if dtype is DType.U8 else dtype} to {tensor.dtype}"
            for dtype in found
            if not is_exact(dtype, tensor.dtype)
        )
    return dict(sorted(counts.items()))
