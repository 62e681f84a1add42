"""What each rule for writing MXFP4 gives: by a plain reference, and by the packages that write so.

A block of 32 values has a scale 2^e, written as the byte e + 127, and a code for each value. The
rules take the smallest e for which the largest magnitude m fits:

    openai    m <= 6 * 2^e, but e >= -126 unless the block is zero
    modelopt  m <= 6 * 2^e
    even      m <  7 * 2^e
    ocp       m <  8 * 2^e

and e >= -127, the smallest that a byte can hold. Then each |value| / 2^e goes to the nearest of
E2M1's magnitudes, in a tie to that with the even code; modelopt goes to the smaller one instead.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import f32_to_f4_unpacked, pack_uint4
from torchao.prototype.mx_formats.mx_tensor import to_mx

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])  # MIDPOINTS[c]: from code c to c + 1

Encoded = tuple[np.ndarray, np.ndarray]
"""Blocks [rows, groups, 16] and scales [rows, groups], both uint8."""

_LOWEST = {"openai": -126, "modelopt": -127, "even": -127, "ocp": -127}
_MODES = {
    "openai": ScaleCalculationMode.RCEIL,
    "even": ScaleCalculationMode.EVEN,
    "ocp": ScaleCalculationMode.FLOOR,
}


def floats(bits: np.ndarray) -> np.ndarray:
    """The values of bfloat16 bits, exactly, in float64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def bits_of(values: np.ndarray) -> np.ndarray:
    """The bfloat16 bits nearest to float32 or float64 values, as torch rounds them."""
    rounded = torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def reference(values: np.ndarray, rule: str) -> Encoded:
    """Encode bfloat16 bits [rows, groups * 32] in float64, in which all of this is exact."""
    x = floats(values).reshape(len(values), -1, 32)
    largest = np.abs(x).max(axis=-1)
    exponents = np.arange(_LOWEST[rule], 128)
    powers = np.ldexp(1.0, exponents)
    if rule in ("openai", "modelopt"):
        smallest = np.searchsorted(6 * powers, largest, side="left")
    else:
        smallest = np.searchsorted((7 if rule == "even" else 8) * powers, largest, side="right")
    exponent = np.where(largest == 0, -127, exponents[smallest])
    quotient = np.abs(x) / np.ldexp(1.0, exponent)[..., None]
    down = np.searchsorted(MIDPOINTS, quotient, side="left")  # how many midpoints are below
    up = np.searchsorted(MIDPOINTS, quotient, side="right")  # or equal: one more in a tie
    sign = np.signbit(x)
    if rule == "modelopt":
        codes = down
        sign = sign | (quotient.astype(np.float32) == 0)  # it divides in float32: 2^-150 becomes 0
    else:
        codes = np.where(down % 2 == 0, down, up)
    codes = (codes + 8 * sign).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).astype(np.uint8)


def encoded(model: dict[str, torch.Tensor], rule: str) -> dict[str, torch.Tensor]:
    """A model in floats, with Hugging Face's names, as it is in MXFP4 by the plain reference."""
    out = {}
    for name, tensor in model.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            out[name] = tensor.to(torch.bfloat16)
            continue
        rows = tensor.mT.to(torch.bfloat16).contiguous()  # [experts, out, in]
        bits = rows.view(torch.int16).numpy().view(np.uint16)
        blocks, scales = reference(bits.reshape(-1, bits.shape[-1]), rule)
        out[name + "_blocks"] = torch.from_numpy(blocks.reshape(*bits.shape[:2], -1, 16))
        out[name + "_scales"] = torch.from_numpy(scales.reshape(*bits.shape[:2], -1))
    return out


def codes_of(blocks: np.ndarray) -> np.ndarray:
    """The codes [rows, groups, 32] in blocks."""
    return np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)


def decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The values [rows, groups, 32] of blocks and scales, exactly, in float64."""
    codes = codes_of(blocks)
    magnitudes = MAGNITUDES[codes & 7] * np.ldexp(1.0, scales.astype(int) - 127)[..., None]
    return np.where(codes < 8, magnitudes, -magnitudes)


def package(values: np.ndarray, rule: str) -> Encoded:
    """Encode bfloat16 bits as the package does that has the rule."""
    return _modelopt(values) if rule == "modelopt" else _torchao(values, rule)


def torchao_scales(values: np.ndarray, rule: str) -> np.ndarray:
    """The scales of torchao, with nothing put right."""
    return (
        to_mx(_tensor(values), torch.float4_e2m1fn_x2, 32, _MODES[rule])[0]
        .view(torch.uint8)
        .numpy()
    )


def _torchao(values: np.ndarray, rule: str) -> Encoded:
    """Encode by torchao; blocks whose byte it has as 0 need help.

    It divides these by 1 (RCEIL) or 2^-126 (FLOOR, EVEN), though byte 0 means 2^-127. Of such
    blocks only its rounding is used, of values that were divided here. And RCEIL goes down to byte
    0, where openai stops at 1.
    """
    shape = (len(values), values.shape[1] // 32, 16)
    x = _tensor(values)
    scales, packed = to_mx(x, torch.float4_e2m1fn_x2, 32, _MODES[rule])
    blocks, scales = packed.view(torch.uint8).numpy().reshape(shape), scales.view(torch.uint8)
    quotient = x.float() * 2.0 ** -_LOWEST[rule]  # beyond float32 only where it is not used
    divided = pack_uint4(f32_to_f4_unpacked(quotient)).numpy().reshape(shape)
    zero = ~(values & 0x7FFF).reshape(len(values), -1, 32).any(axis=-1)
    low = scales.numpy() == 0
    lowest = np.where(zero, 0, _LOWEST[rule] + 127)
    return (
        np.where(low[..., None], divided, blocks),
        np.where(low, lowest, scales.numpy()).astype(np.uint8),
    )


def _modelopt(values: np.ndarray) -> Encoded:
    """Encode by NVIDIA's Model Optimizer, as its exporter of gpt-oss to MXFP4 does."""
    groups = values.shape[1] // 32
    quantized, scales = _modelopt_module().MXFP4QTensor.quantize(_tensor(values), 32)
    return quantized.data.numpy().reshape(-1, groups, 16), scales.numpy().reshape(-1, groups)


@cache
def _modelopt_module() -> ModuleType:
    """Import modelopt's module for MXFP4 alone, with a stand-in for the base class.

    The class method `quantize` needs torch only. Importing modelopt.torch takes 12 s, warns of
    versions, needs packages that it does not declare, and registers itself with transformers.
    """
    folder = find_spec("modelopt").submodule_search_locations[0]
    package, qtensor, base = (
        ModuleType(f"lone_modelopt{name}") for name in ("", ".qtensor", ".qtensor.base_qtensor")
    )
    package.__path__, qtensor.__path__ = [], [f"{folder}/torch/quantization/qtensor"]
    base.BaseQuantizedTensor = _Quantized
    sys.modules.update({module.__name__: module for module in (package, qtensor, base)})
    return importlib.import_module("lone_modelopt.qtensor.mxfp4_tensor")


class _Quantized:
    """What `MXFP4QTensor.quantize` returns is made of this."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, data: torch.Tensor) -> None:
        self.data = data


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)


def compressed_tensors(values: np.ndarray) -> Encoded:
    """Encode by the package compressed-tensors, as llm-compressor does; it has one rule, even.

    It gives zeros of either sign the code 0, and a block of zeros its own smallest scale.
    """
    from compressed_tensors.compressors.mx_utils import compress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    x = _tensor(values).float()
    groups = x.reshape(len(x), -1, 32)
    arguments = preset_name_to_scheme("MXFP4A16", ["Linear"]).weights
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    packed = quantize_and_pack_fp4(x, scales, group_size=32)
    exponents = compress_mx_scale(scales, torch.uint8).numpy()
    return packed.view(torch.uint8).numpy().reshape(*exponents.shape, 16), exponents
