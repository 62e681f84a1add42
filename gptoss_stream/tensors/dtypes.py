"""The dtypes of safetensors: the only table of dtypes in the package.

Codes and sizes: safetensors, `safetensors/src/tensor.rs`, enum `Dtype`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from math import prod

from ..errors import OptionError

__all__ = [
    "BLOCK_NBYTES",
    "BLOCK_VALUES",
    "KEEP",
    "NUMPY_NAMES",
    "OUTPUT_DTYPES",
    "DType",
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


def output_dtype(name: str) -> DType:
    """Return the dtype for a torch name such as "bfloat16".

    Raises:
        OptionError: For a name that is not in `OUTPUT_DTYPES`.
    """
    try:
        return OUTPUT_DTYPES[name]
    except KeyError:
        names = ", ".join(OUTPUT_DTYPES)
        raise OptionError(f"unknown dtype {name!r}; choose one of {names}") from None


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
