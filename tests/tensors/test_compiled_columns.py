"""Columns of MXFP4 that compiled code decodes are bit for bit those that numpy decodes."""

from __future__ import annotations

import numpy as np
import pytest

from gptoss_stream.tensors import compiled
from gptoss_stream.tensors.cast import STORAGE
from gptoss_stream.tensors.dtypes import DType
from gptoss_stream.tensors.mxfp4 import decode, decode_columns

pytest.importorskip("numba")
LIMITS = {DType.BF16: (2, 252), DType.F16: (114, 140), DType.F32: (2, 252)}
DTYPES = [*LIMITS]


@pytest.fixture(autouse=True)
def enabled(monkeypatch):
    monkeypatch.setattr(compiled, "_is_enabled", True)


def packed(rows: int, groups: int, dtype: DType) -> tuple[np.ndarray, np.ndarray]:
    """Random codes, with all scales that the dtype allows."""
    rng = np.random.default_rng(rows * groups)
    low, high = LIMITS[dtype]
    scales = rng.integers(low, high + 1, size=(rows, groups), dtype=np.uint8)
    scales.flat[0], scales.flat[-1] = low, high
    return rng.integers(256, size=(rows, groups, 16), dtype=np.uint8), scales


def assert_alike(blocks, scales, first: int, count: int, dtype: DType) -> None:
    rows, groups = scales.shape
    expected = np.empty((rows, groups * 32), STORAGE[dtype])
    decode(np.ascontiguousarray(blocks), scales, expected, dtype)
    memory = np.full((count, rows + 7), 7, STORAGE[dtype])
    assert decode_columns(blocks, scales, first, memory[:, 3:-4], dtype)
    np.testing.assert_array_equal(
        memory[:, 3:-4].view(np.uint8),
        np.ascontiguousarray(expected.T[first : first + count]).view(np.uint8),
    )
    assert (memory[:, :3] == 7).all()
    assert (memory[:, -4:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_every_scale(dtype):
    low, high = LIMITS[dtype]
    scales = np.arange(low, high + 1, dtype=np.uint8)[:, None].repeat(16, axis=1)
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(len(scales), axis=0)
    assert_alike(blocks, scales, 0, 512, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "groups", "first", "count"),
    [(1, 1, 0, 32), (7, 3, 5, 1), (513, 2, 17, 40), (1100, 3, 31, 65), (64, 4, 32, 64)],
)
def test_any_rows_and_columns(rows, groups, first, count, dtype):
    assert_alike(*packed(rows, groups, dtype), first, count, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_that_is_strided_or_not_aligned(dtype):
    blocks, scales = packed(20, 6, dtype)
    memory = np.empty(blocks.nbytes + 1, np.uint8)
    shifted = memory[1:].reshape(blocks.shape)
    shifted[...] = blocks
    shifted.flags.writeable = scales.flags.writeable = False
    for some in (slice(None), slice(1, None, 2)):
        assert_alike(blocks[some, 2:5], scales[some, 2:5], 3, 70, dtype)
        assert_alike(shifted[some, 2:5], scales[some, 2:5], 3, 70, dtype)


@pytest.mark.parametrize(("dtype", "scale"), [(d, s) for d in DTYPES for s in LIMITS[d]])
def test_scales_that_it_leaves_to_numpy(dtype, scale):
    """With one more or less, a code would be subnormal or infinite."""
    beyond = scale - 1 if scale == LIMITS[dtype][0] else scale + 1
    blocks, scales = packed(4, 2, dtype)
    scales[2, 1] = beyond
    out = np.zeros((64, 4), STORAGE[dtype])
    assert not decode_columns(blocks, scales, 0, out, dtype)
    assert not out.any()
