"""Decoding of every byte with every scale, checked against transformers and exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from gptoss_stream.tensors.cast import STORAGE
from gptoss_stream.tensors.dtypes import DType
from gptoss_stream.tensors.mxfp4 import E2M1, decode, largest_scale

TORCH = {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32}


def all_pairs() -> tuple[np.ndarray, np.ndarray]:
    """255 rows, one for each scale except NaN; each row has all 256 bytes in 16 blocks of 16."""
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (255, 1, 1))
    scales = np.repeat(np.arange(255, dtype=np.uint8)[:, None], 16, axis=1)
    return blocks, scales


def decoded(blocks: np.ndarray, scales: np.ndarray, dtype: DType) -> np.ndarray:
    rows, groups, _ = blocks.shape
    out = np.empty((rows, groups * 32), STORAGE[dtype])
    decode(blocks, scales, out, dtype)
    return out


def test_every_byte_with_every_scale_is_decoded_as_in_transformers():
    blocks, scales = all_pairs()
    ours = decoded(blocks, scales, DType.BF16)
    theirs = convert_moe_packed_tensors(
        torch.from_numpy(blocks)[None], torch.from_numpy(scales)[None], dtype=torch.bfloat16
    )
    expected = theirs[0].T.contiguous().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("dtype", [DType.F16, DType.F32])
def test_other_dtypes_are_casts_of_bfloat16(dtype):
    blocks, scales = all_pairs()
    halves = decoded(blocks, scales, DType.BF16).view(np.int16)
    cast = torch.from_numpy(halves).view(torch.bfloat16).to(TORCH[dtype]).numpy()
    np.testing.assert_array_equal(
        decoded(blocks, scales, dtype).view(np.uint8), cast.view(np.uint8)
    )


def test_values_are_those_of_the_standard():
    """OCP MX v1.0: a code's value times 2^(scale - 127), exactly, the low nibble first."""
    blocks, scales = all_pairs()
    values = decoded(blocks, scales, DType.F32)
    for scale in (0, 1, 100, 127, 200, 252):
        for byte in (0x00, 0x10, 0x78, 0x8F, 0xF2):
            for nibble, code in enumerate((byte & 15, byte >> 4)):
                found = values[scale, 2 * byte + nibble]
                assert Fraction(float(found)) == Fraction(E2M1[code]) * Fraction(2) ** (scale - 127)
                assert np.signbit(found) == (code >= 8)  # -0.0 stays -0.0


@pytest.mark.parametrize("dtype", list(TORCH))
def test_the_largest_scale_gives_finite_values_and_the_next_does_not(dtype):
    blocks, scales = all_pairs()
    finite = torch.from_numpy(decoded(blocks, scales, DType.F32)).to(TORCH[dtype]).isfinite()
    largest = largest_scale(dtype)
    assert finite[: largest + 1].all()
    assert not finite[largest + 1].all()


@pytest.mark.parametrize("rows", [1, 2, 127, 128, 129, 300])
def test_rows_are_the_same_in_any_tile(rows):
    rng = np.random.default_rng(rows)
    blocks = rng.integers(256, size=(rows, 90, 16), dtype=np.uint8)
    scales = rng.integers(100, 130, size=(rows, 90), dtype=np.uint8)
    whole = decoded(blocks, scales, DType.BF16)
    for row in range(rows):
        one = decoded(blocks[row : row + 1], scales[row : row + 1], DType.BF16)
        np.testing.assert_array_equal(whole[row : row + 1], one)
