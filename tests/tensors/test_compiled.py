"""Compiled code gives the bits of the numpy code."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gptoss_stream.tensors import compiled
from gptoss_stream.tensors.cast import STORAGE
from gptoss_stream.tensors.dtypes import DType
from gptoss_stream.tensors.mxfp4 import decode

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
