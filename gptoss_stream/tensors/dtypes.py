"""The dtypes of safetensors: the only table of dtypes in the package.

Codes and sizes: safetensors, `safetensors/src/tensor.rs`, enum `Dtype`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

from .._utils.messages import short_repr
from ..errors import OptionError

if TYPE_CHECKING:
    import torch

__all__ = [
    "BLOCK_NBYTES",
    "BLOCK_VALUES",
    "KEEP",
    "NUMPY_NAMES",
    "OUTPUT_DTYPES",
    "DType",
    "DTypeLike",
    "dtype_name",
    "is_exact",
    "nbytes",
    "output_dtype",
    "torch_name",
]

BLOCK_VALUES = 32
"""Values of an MXFP4 block (OCP Microscaling Formats v1.0, section 5.1)."""
BLOCK_NBYTES = 16
"""Bytes of an MXFP4 block, without its scale."""


class DType(Enum):
    """A tensor's dtype by its safetensors code; `bits` is the size of one element."""

    BOOL = ("BOOL", 8)
    F4 = ("F4", 4)
    F6_E2M3 = ("F6_E2M3", 6)
    F6_E3M2 = ("F6_E3M2", 6)
    U8 = ("U8", 8)
    I8 = ("I8", 8)
    F8_E5M2 = ("F8_E5M2", 8)
    F8_E4M3 = ("F8_E4M3", 8)
    F8_E8M0 = ("F8_E8M0", 8)
    F8_E4M3FNUZ = ("F8_E4M3FNUZ", 8)
    F8_E5M2FNUZ = ("F8_E5M2FNUZ", 8)
    I16 = ("I16", 16)
    U16 = ("U16", 16)
    F16 = ("F16", 16)
    BF16 = ("BF16", 16)
    I32 = ("I32", 32)
    U32 = ("U32", 32)
    F32 = ("F32", 32)
    C64 = ("C64", 64)
    F64 = ("F64", 64)
    I64 = ("I64", 64)
    U64 = ("U64", 64)

    def __init__(self, code: str, bits: int) -> None:
        self.code = code
        self.bits = bits

    @property
    def itemsize(self) -> int:
        """Bytes of one element; only for dtypes of whole bytes."""
        return self.bits // 8

    def __str__(self) -> str:
        return self.code


NUMPY_NAMES = {
    DType.BOOL: "|b1",
    DType.U8: "|u1",
    DType.I8: "|i1",
    DType.I16: "<i2",
    DType.U16: "<u2",
    DType.F16: "<f2",
    DType.I32: "<i4",
    DType.U32: "<u4",
    DType.F32: "<f4",
    DType.C64: "<c8",
    DType.F64: "<f8",
    DType.I64: "<i8",
    DType.U64: "<u8",
}
"""The dtypes that numpy has, by its names; safetensors is little-endian."""

OUTPUT_DTYPES = {"bfloat16": DType.BF16, "float16": DType.F16, "float32": DType.F32}
"""The dtypes that can be written, by torch's names."""
KEEP = "keep"
"""The name that stands for each tensor's dtype in the source."""

DTypeLike: TypeAlias = "str | torch.dtype | DType"
"""How callers name a dtype: by torch's name or a short one ("bf16", "fp16", "fp32"), or by a dtype
of torch, or of this package."""

_SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def dtype_name(dtype: DTypeLike | None) -> str | None:
    """Return the torch name of a dtype; None for None. Does not import torch.

    Whether a text is the name of a dtype is not checked.

    Raises:
        OptionError: For what is neither a text nor a dtype.
    """
    if dtype is None:
        return None
    if isinstance(dtype, str):
        return _SHORT_NAMES.get(dtype, dtype)
    if isinstance(dtype, DType):
        names = {value: name for name, value in OUTPUT_DTYPES.items()}
        return names.get(dtype, dtype.code)
    kind: Any = type(dtype)
    if (kind.__module__, kind.__name__) == ("torch", "dtype"):
        return str(dtype).removeprefix("torch.")
    raise OptionError(f"unknown dtype {short_repr(dtype)}; give a name or a dtype of torch")


def output_dtype(dtype: DTypeLike) -> DType:
    """Return the dtype that can be written, such as that for "bfloat16".

    Raises:
        OptionError: For another dtype, and for what is no dtype.
    """
    name = dtype_name(dtype)
    if name is None or name not in OUTPUT_DTYPES:
        raise OptionError(f"unknown dtype {name!r}; choose one of {', '.join(OUTPUT_DTYPES)}")
    return OUTPUT_DTYPES[name]


def torch_name(dtype: DType) -> str:
    """Return the torch name of a dtype that can be written."""
    return next(name for name, value in OUTPUT_DTYPES.items() if value is dtype)


_PRECISION = {DType.U8: 2, DType.BF16: 8, DType.F16: 11, DType.F32: 24}  # bits; U8 holds MXFP4


def is_exact(source: DType, target: DType) -> bool:
    """Return whether a cast keeps every value.

    Args:
        source: The dtype before the cast: a float dtype, or U8 for MXFP4 (whose range exceeds
            that of float16).
        target: The dtype after it.
    """
    if source is target or target in (DType.F32, DType.U8):
        return True
    return target is DType.BF16 and _PRECISION[source] <= _PRECISION[target]


def nbytes(dtype: DType, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor whose dtype has whole bytes."""
    return prod(shape) * dtype.itemsize
