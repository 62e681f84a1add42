"""Products of low-rank factors: exact in any order, and near to what was asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gptoss_stream.tensors.cast import STORAGE, cast
from gptoss_stream.tensors.dtypes import DType
from gptoss_stream.tensors.low_rank import add_product, add_product_to_bfloat16, on_grid

RANKS = [1, 2, 3, 16, 17, 64, 256]


def factors(rank, rows=5, columns=7, seed=0):
    """Return factors of very different magnitudes, also within a column."""
    generator = np.random.default_rng(seed)
    return tuple(
        (generator.standard_normal((rank, n)) * 10.0 ** generator.uniform(-9, 3, (rank, n)))
        for n in (rows, columns)
    )


@pytest.mark.parametrize("rank", RANKS)
def test_sums_are_exact(rank):
    """So they are the same in any order, with and without fused operations."""
    left, right = (on_grid(factor).astype(np.float64) for factor in factors(rank))
    product = left.T @ right
    reversed_product = left[::-1].T @ right[::-1]
    for row in range(left.shape[1]):
        for column in range(right.shape[1]):
            exact = math.fsum(left[:, row] * right[:, column])
            assert exact == product[row, column] == reversed_product[row, column]
    assert (product != 0).all()


@pytest.mark.parametrize("rank", RANKS)
def test_values_keep_most_bits(rank):
    """Relative to the largest of their column: 24 with rank 32 or less, 22 with rank 256."""
    (factor, _), bits = factors(rank), 24 if rank <= 32 else 22
    errors = np.abs(on_grid(factor) - factor)
    assert (errors <= np.abs(factor).max(axis=0) * 2.0**-bits).all()


def test_of_zeros_and_infinities():
    assert (on_grid(np.zeros((3, 2))) == 0).all()
    assert np.isinf(on_grid(np.full((1, 1), 1e300))).all()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("block", [1, 10, 1000])
def test_added_to_values(block, turned, monkeypatch):
    """In float32, and rounded to bfloat16 once, whatever the layout and the block."""
    monkeypatch.setattr("gptoss_stream.tensors.low_rank._BLOCK_ELEMENTS", block)
    left, right = (on_grid(factor * 1e-3) for factor in factors(4))
    bits = np.random.default_rng(1).integers(0x3C00, 0x4000, (5, 7), np.uint16)
    bits[::2] |= 0x8000
    base = np.empty(bits.shape, np.float32)
    cast(bits, DType.BF16, base, DType.F32)
    delta = (left.T.astype(np.float64) @ right).astype(np.float32)
    values = base.T.copy().T if turned else base.copy()
    add_product(values, left, right)
    assert (values == base + delta).all()
    out = np.empty((7, 5), np.uint16).T if turned else np.empty((5, 7), np.uint16)
    assert add_product_to_bfloat16(bits, left, right, out)
    expected = np.empty((5, 7), STORAGE[DType.BF16])
    cast(base + delta, DType.F32, expected, DType.BF16)
    assert (out == expected).all()


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x7F7F])
def test_values_that_are_not_finite(bits):
    """Nothing is warned of; the caller refuses them."""
    base = np.full((2, 3), bits, np.uint16)
    left = on_grid(np.full((1, 2), 1e19))
    assert not add_product_to_bfloat16(base, left, on_grid(np.full((1, 3), 1e19)), base.copy())
