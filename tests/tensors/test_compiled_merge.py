"""Compiled code adds products to bfloat16 values with the bits of the numpy code."""

from __future__ import annotations

import numpy as np
import pytest

from gptoss_stream.tensors import compiled
from gptoss_stream.tensors.low_rank import add_product_to_bfloat16, on_grid

pytest.importorskip("numba")

SHAPES = [(1, 1), (1, 3000), (3000, 1), (7, 1025), (33, 1024), (129, 515)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("gptoss_stream.tensors.low_rank._BLOCK_ELEMENTS", 5000)


def values(rows: int, columns: int) -> np.ndarray:
    """The bits of values of every sign and of exponents that are near to those of products."""
    rng = np.random.default_rng(rows * columns)
    bits = rng.integers(0x3A00, 0x4200, (rows, columns), np.uint16)
    bits |= rng.integers(2, size=bits.shape, dtype=np.uint16) << np.uint16(15)
    bits.flat[::17] &= 0x8000  # zeros
    return bits


def factors(rows: int, columns: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rank)
    left, right = (on_grid(rng.standard_normal((rank, n))) for n in (rows, columns))
    left[:, ::5] = 0
    return left, right


def added(bits, left, right, out, by_numba: bool) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_is_enabled", by_numba)
        return add_product_to_bfloat16(bits, left, right, out)


def assert_alike(bits, left, right, out) -> None:
    expected = np.empty(bits.shape, np.uint16)
    assert added(bits.copy(), left, right, expected, by_numba=False)
    assert added(bits, left, right, out, by_numba=True)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rank", [1, 16, 33])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_and_rank(shape, rank, turned, additions):
    out = np.empty(shape[::-1], np.uint16).T if turned else np.empty(shape, np.uint16)
    assert_alike(values(*shape), *factors(*shape, rank), out)
    assert sum(additions) == shape[0] * shape[1]


@pytest.mark.parametrize("turned", [False, True])
def test_in_place_and_with_memory_around_it(turned):
    memory = np.full((40, 1300), 7, np.uint16)
    tile = memory[3:-2, 5:-6].T if turned else memory[3:-2, 5:-6]
    tile[...] = values(*tile.shape)
    assert_alike(tile, *factors(*tile.shape, 4), tile)
    memory[3:-2, 5:-6] = 7
    assert (memory == 7).all()


def test_values_that_are_strided_read_only_or_not_aligned():
    whole = values(24, 160)
    left, right = factors(24, 160, 3)
    shifted = np.empty(whole.nbytes + 1, np.uint8)[1:].view(np.uint16).reshape(whole.shape)
    shifted[...] = whole
    for bits in (whole, shifted, np.asfortranarray(whole)):
        bits.flags.writeable = False
        for rows, columns in ((slice(2, None, 3), slice(1, -1)), (slice(None), slice(1, None, 2))):
            part = bits[rows, columns]
            assert_alike(part, left[:, rows], right[:, columns], np.empty(part.shape, np.uint16))


def test_memory_that_is_not_aligned():
    bits, (left, right) = values(5, 70), factors(5, 70, 2)
    out = np.empty(bits.nbytes + 1, np.uint8)[1:].view(np.uint16).reshape(bits.shape)
    assert_alike(bits, left, right, out)


@pytest.mark.parametrize("sign", [1, -1])
def test_ties_and_what_is_next_to_them(sign):
    """Half a unit in the last place is added to mantissas that are even and odd, or almost."""
    bits = np.arange(0x3F80, 0x4000, dtype=np.uint16)[:, None].repeat(3, axis=1)
    bits |= np.uint16(0x8000 if sign < 0 else 0)
    ulps = np.array([[0.5 - 2**-16, 0.5, 0.5 + 2**-16]])
    left, right = on_grid(np.full((1, 128), sign * 2.0**-7)), on_grid(ulps)
    out = np.empty(bits.shape, np.uint16)
    assert_alike(bits, left, right, out)
    odd = bits[:, 0] & 1
    np.testing.assert_array_equal(out - bits, np.stack([0 * odd, odd, 0 * odd + 1], axis=1))


def test_the_largest_that_bfloat16_holds():
    """What is just below the middle between it and infinity stays; the middle is too large."""
    left, right = on_grid(np.full((1, 1), 2.0**119)), on_grid(np.ones((1, 2000)))
    below, middle = on_grid(np.full((1, 1), 2.0**119 - 2.0**104)), left
    for factor, is_finite in ((below, True), (middle, False)):
        bits = np.full((1, 2000), 0x7F7F, np.uint16)
        for by_numba in (False, True):
            out = np.empty(bits.shape, np.uint16)
            assert added(bits, factor, right, out, by_numba) == is_finite
            assert not is_finite or (out == 0x7F7F).all()


@pytest.mark.parametrize("place", [(0, 0), (8, 1023), (8, 1024), (16, 1999)])
@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81])
def test_one_value_that_is_not_finite(bits, place):
    base = values(17, 2000)
    left, right = factors(17, 2000, 2)
    base[place] = bits
    for by_numba in (False, True):
        assert not added(base, left, right, np.empty(base.shape, np.uint16), by_numba)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_factors_that_are_not_finite(value):
    base, (left, right) = values(3, 50), factors(3, 50, 2)
    right[1, 49] = value
    for by_numba in (False, True):
        assert not added(base, left, right, np.empty(base.shape, np.uint16), by_numba)
