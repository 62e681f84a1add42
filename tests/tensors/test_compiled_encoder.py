"""Compiled code encodes and transposes bit for bit as numpy does, and counts the same losses."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from gptoss_stream.tensors import compiled, mxfp4_encoder
from gptoss_stream.tensors.compiled_encoder import copy_transposed
from gptoss_stream.tensors.encoding_loss import EncodingLoss
from gptoss_stream.tensors.mxfp4_encoder import encode
from gptoss_stream.tensors.mxfp4_rules import RULES

pytest.importorskip("numba")


def bits(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bfloat16, some of them zeros of either sign."""
    rng = np.random.default_rng(seed)
    exponents = rng.integers(90, 160, size=(rows, columns // 32)).repeat(32, axis=1)
    exponents -= rng.integers(0, 12, size=exponents.shape)
    values = exponents << 7 | rng.integers(0, 128, size=exponents.shape)
    values[rng.random(values.shape) < 0.05] = 0
    values |= rng.integers(0, 2, size=values.shape) << 15
    return values.astype(np.uint16)


def encoded(
    values: np.ndarray, rule: str, step: int
) -> tuple[np.ndarray, np.ndarray, EncodingLoss]:
    rows, groups = len(values), values.shape[1] // 32
    # The blocks begin anywhere, as they do in a shard.
    blocks = np.zeros(rows * groups * 16 + 3, np.uint8)[3:].reshape(rows, groups, 16)
    scales, loss = np.zeros((rows, groups), np.uint8), EncodingLoss(step)
    encode(values, rule, blocks, scales, loss, first_row=7)
    return blocks, scales, loss


def assert_alike(values: np.ndarray, rule: str, step: int, monkeypatch) -> None:
    results = []
    for enabled in (False, True):
        monkeypatch.setattr(compiled, "_is_enabled", enabled)
        results.append(encoded(values, rule, step))
    assert_same(*results)


def assert_same(found: tuple, expected: tuple) -> None:
    """The same blocks, scales and losses; only sums of squares are rounded in another order."""
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(one, other)
    assert asdict(found[2]) == pytest.approx(asdict(expected[2]), rel=1e-12, abs=0)


def layouts(values: np.ndarray) -> list[np.ndarray]:
    """Rows, columns, and rows whose memory is not aligned, in contiguous memory and in other."""
    wide = np.zeros((len(values), values.shape[1] + 8), np.uint16)
    wide[:, 3:-5] = values
    return [values, np.asfortranarray(values), wide[:, 3:-5], np.asfortranarray(wide)[:, 3:-5]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows", [1, 479, 481, 1930])
def test_every_layout(rows, rule, monkeypatch):
    """By compiled code alone: no block here is tiny or zero."""
    values = bits(rows, 7 * 32)
    values[:, ::32] = 0x3F81
    monkeypatch.setattr(compiled, "_is_enabled", False)
    expected = [encoded(one, rule, 64) for one in layouts(values)]
    monkeypatch.setattr(compiled, "_is_enabled", True)
    monkeypatch.delattr(mxfp4_encoder, "_encode_by_numpy")
    for one, result in zip(layouts(values), expected, strict=True):
        assert_same(encoded(one, rule, 64), result)
        loss = result[2]
        assert loss.squared_error > 0
        assert loss.flushed > 0
        assert (loss.clipped > 0) == RULES[rule].clips or rows == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("step", [1, 64])
def test_zero_and_tiny_blocks_among_others(step, rule, monkeypatch):
    values = bits(2000, 64)
    values[1500:1600] = 0
    values[1900, :32] = np.arange(32)
    for one in layouts(values):
        assert_alike(one, rule, step, monkeypatch)


@pytest.mark.parametrize("rule", RULES)
def test_every_magnitude_with_every_maximum(rule, monkeypatch):
    """All distances of a value from its block's scale, and all mantissas of either."""
    maxima = np.arange(0x280, 0x7F00, 5, dtype=np.uint16)
    for least in range(0, 0x500, 31):
        values = np.maximum(maxima[:, None].astype(int) - least - np.arange(32), 0)
        values[:, 0] = maxima
        assert_alike(values.astype(np.uint16), rule, 1, monkeypatch)


def test_what_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(compiled, "_is_enabled", True)
    values = bits(1000, 32)
    values[990, 5] = 0x7F80
    with pytest.raises(ValueError, match="infinite"):
        encoded(values, "openai", 1)


@pytest.mark.parametrize("shape", [(1, 4), (7, 32), (481, 64), (1000, 12)])
def test_copying_a_transpose(shape):
    source = np.random.default_rng(0).integers(1 << 16, size=shape, dtype=np.uint16)
    out = np.full((shape[1], shape[0] + 5), 7, np.uint16)
    assert copy_transposed(source, out[:, 2:-3])
    np.testing.assert_array_equal(out[:, 2:-3], source.T)
    assert (out[:, :2] == 7).all()
    assert (out[:, -3:] == 7).all()


def test_a_transpose_of_other_memory_is_left_to_numpy():
    memory = np.zeros((6, 16), np.uint16)
    for source in (memory[:, ::2], memory[:, :6], memory[:, 1:9]):
        assert not copy_transposed(source, np.empty(source.shape[::-1], np.uint16))
