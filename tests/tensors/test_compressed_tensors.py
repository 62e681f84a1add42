"""The rule `even` against the package compressed-tensors, which serves and saves such weights."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from mxfp4_oracles import bits_of, compressed_tensors

from gptoss_stream.tensors.mxfp4_encoder import encode

pytestmark = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="compressed-tensors 0.20 requires Python 3.11"
)

BEYOND = 0x7F60
"""From here on its scale overflows: 1.75 * 2^127."""


def every_maximum(rng: np.random.Generator) -> np.ndarray:
    """A block for each magnitude below `BEYOND`, which is the largest one in it."""
    maximum = np.arange(1, BEYOND, dtype=np.uint16)
    values = rng.integers(0, maximum[:, None] + 1, (len(maximum), 32), np.uint16)
    values[:, 5] = maximum
    values |= rng.integers(2, size=values.shape, dtype=np.uint16) << 15
    return values


def normal(rng: np.random.Generator) -> np.ndarray:
    return bits_of(rng.standard_normal((400, 96)) * 2.0 ** rng.integers(-20, 20, (400, 1)))


def halves(rng: np.random.Generator) -> np.ndarray:
    """Many ties."""
    return bits_of(rng.integers(-30, 31, (400, 96)) / 4)


@pytest.mark.parametrize("case", [every_maximum, normal, halves])
def test_every_bit_but_the_sign_of_zeros(case):
    values = case(np.random.default_rng(2))
    values[(values & 0x7FFF) == 0] = 0
    rows, groups = len(values), values.shape[1] // 32
    blocks, scales = np.empty((rows, groups, 16), np.uint8), np.empty((rows, groups), np.uint8)
    encode(values, "even", blocks, scales)
    expected_blocks, expected_scales = compressed_tensors(values)
    is_zero = ~values.reshape(rows, groups, 32).any(axis=-1)
    np.testing.assert_array_equal(scales[~is_zero], expected_scales[~is_zero])
    for shift in (0, 4):
        found, expected = (b >> shift & 15 for b in (blocks, expected_blocks))
        np.testing.assert_array_equal(np.where(found == 8, 0, found),
                                      np.where(expected == 8, 0, expected))  # fmt: skip
