"""The torch dtypes of stored tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import TensorError
from ..tensors.dtypes import DType

if TYPE_CHECKING:
    import torch

__all__ = ["torch_dtype"]

_NAMES = {
    DType.BOOL: "bool",
    DType.U8: "uint8",
    DType.I8: "int8",
    DType.F8_E5M2: "float8_e5m2",
    DType.F8_E4M3: "float8_e4m3fn",
    DType.F8_E8M0: "float8_e8m0fnu",
    DType.F8_E4M3FNUZ: "float8_e4m3fnuz",
    DType.F8_E5M2FNUZ: "float8_e5m2fnuz",
    DType.I16: "int16",
    DType.U16: "uint16",
    DType.F16: "float16",
    DType.BF16: "bfloat16",
    DType.I32: "int32",
    DType.U32: "uint32",
    DType.F32: "float32",
    DType.C64: "complex64",
    DType.F64: "float64",
    DType.I64: "int64",
    DType.U64: "uint64",
}


def torch_dtype(stored: DType, name: str) -> torch.dtype:
    """Return the torch dtype of a tensor.

    Args:
        stored: The dtype as it is stored.
        name: The tensor's name, for the error.

    Raises:
        TensorError: If torch, or the installed version of it, has no such dtype.
    """
    import torch

    dtype: torch.dtype | None = getattr(torch, _NAMES.get(stored, ""), None)
    if dtype is None:
        raise TensorError(
            f"tensor {name!r} has the dtype {stored}, which torch "
            f"{torch.__version__} does not have; read it with safetensors or install a newer torch"
        )
    return dtype
