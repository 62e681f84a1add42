"""Compiled code gives the bits of the numpy code, and products as exact as float32 sums."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gptoss_stream.tensors import compiled
from gptoss_stream.tensors.cast import STORAGE
from gptoss_stream.tensors.dtypes import DType
from gptoss_stream.tensors.mxfp4 import decode, multiply

numba = pytest.importorskip("numba")

DTYPES = [DType.BF16, DType.F16, DType.F32]


def all_pairs() -> tuple[np.ndarray, np.ndarray]:
    """256 rows, one for each scale; each row has all 256 bytes in 16 blocks of 16."""
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (256, 1, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1)
    return blocks, scales


def random_rows(rows: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(rows * groups)
    blocks = rng.integers(256, size=(rows, groups, 16), dtype=np.uint8)
    return blocks, rng.integers(115, 125, size=(rows, groups), dtype=np.uint8)


def decoded(blocks: np.ndarray, scales: np.ndarray, dtype: DType, by_numba: bool) -> np.ndarray:
    """The bits of the values."""
    out = np.zeros((len(blocks), scales.shape[1] * 32), STORAGE[dtype])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_is_enabled", by_numba)
        decode(blocks, scales, out, dtype)
    return out.view(np.uint8)


def assert_decoded_alike(blocks: np.ndarray, scales: np.ndarray, dtype: DType) -> None:
    by_numpy = decoded(blocks, scales, dtype, by_numba=False)
    np.testing.assert_array_equal(decoded(blocks, scales, dtype, by_numba=True), by_numpy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_with_every_scale_is_decoded_alike(dtype):
    assert_decoded_alike(*all_pairs(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (1, 90), (7, 1), (33, 3)])
def test_any_number_of_rows_and_groups(rows, groups, dtype):
    assert_decoded_alike(*random_rows(rows, groups), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_memory_that_cannot_be_written(dtype):
    blocks, scales = random_rows(10, 6)
    blocks.flags.writeable = scales.flags.writeable = False
    for rows in (slice(None), slice(None, None, 2), slice(1, None, 2), slice(None, None, -1)):
        assert_decoded_alike(blocks[rows], scales[rows], dtype)
        assert_decoded_alike(blocks[rows, 2:5], scales[rows, 2:5], dtype)


def test_threads_decode_parts_of_one_array():
    """The first calls compile, in several threads at the same time."""
    blocks, scales = random_rows(400, 9)
    out = np.zeros((400, 9 * 32), np.uint16)

    def decode_part(first: int) -> None:
        part = slice(first, first + 10)
        decode(blocks[part], scales[part], out[part], DType.BF16)

    compiled._compiled_decode.cache_clear()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(compiled, "_is_enabled", True)
        list(pool.map(decode_part, range(0, 400, 10)))
    expected = decoded(blocks, scales, DType.BF16, by_numba=False)
    np.testing.assert_array_equal(out.view(np.uint8), expected)


@pytest.mark.parametrize(("tokens", "rows", "groups"), [(1, 1, 1), (1, 64, 90), (4, 33, 7)])
def test_products_are_as_exact_as_float32_sums(tokens, rows, groups):
    blocks, scales = random_rows(2 * rows, groups)
    blocks, scales = blocks[::2], scales[::2]
    weights = decoded(blocks, scales, DType.F32, by_numba=False).view(np.float32)
    vectors = np.random.default_rng(0).standard_normal((tokens, groups * 32)).astype(np.float32)
    out = np.full((tokens, rows + 2), np.nan, np.float32)
    multiply(blocks, scales, vectors, out[:, 1:-1])
    exact = vectors.astype(np.float64) @ weights.T.astype(np.float64)
    magnitudes = np.abs(vectors).astype(np.float64) @ np.abs(weights.T)
    assert np.all(np.abs(out[:, 1:-1] - exact) <= 1e-6 * magnitudes)
    assert np.isnan(out[:, [0, -1]]).all()


def test_products_have_the_exact_weights():
    """A token with a single 1 picks a column: every byte with every scale that is finite."""
    blocks, scales = all_pairs()
    blocks, scales = blocks[:253], scales[:253]
    weights = decoded(blocks, scales, DType.F32, by_numba=False).view(np.float32)
    out = np.empty((512, len(blocks)), np.float32)
    multiply(blocks, scales, np.eye(512, dtype=np.float32), out)
    np.testing.assert_array_equal(out.T, weights)


def test_products_keep_what_is_not_finite():
    blocks, scales = random_rows(1, 1)
    blocks[...] = 0x22
    for value in (np.inf, -np.inf, np.nan):
        vector = np.ones((1, 32), np.float32)
        vector[0, 5] = value
        out = np.empty((1, 1), np.float32)
        multiply(blocks, scales, vector, out)
        np.testing.assert_array_equal(out, [[np.float32(value)]])


def test_an_installation_that_cannot_be_written_compiles_each_time(monkeypatch):
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    compiled._compiled_decode.cache_clear()
    assert_decoded_alike(*random_rows(2, 2), DType.BF16)
    compiled._compiled_decode.cache_clear()


def test_converting_does_not_import_numba():
    code = (
        "import sys, gptoss_stream.tensors.mxfp4, gptoss_stream.tensors.compiled as compiled;"
        "assert not compiled.is_enabled(); assert compiled.enable() and compiled.is_enabled();"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_numba_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    monkeypatch.setattr(compiled, "_is_enabled", False)
    assert not compiled.enable()
    assert not compiled.is_enabled()
