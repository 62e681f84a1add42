"""Encoding by each rule, bit for bit as a plain reference does, and as the packages with the rules.

`mxfp4_oracles` has the reference and the packages. Values are written as the bits of bfloat16:
0x3F80 is 1.0, 0x80 more or less doubles or halves, and 0x7F7F is the largest finite one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from mxfp4_oracles import (
    MAGNITUDES,
    MIDPOINTS,
    bits_of,
    codes_of,
    decoded,
    floats,
    package,
    reference,
    torchao_scales,
)

from gptoss_stream.tensors import compiled
from gptoss_stream.tensors.dtypes import DType
from gptoss_stream.tensors.encoding_loss import EncodingLoss, measured_step
from gptoss_stream.tensors.mxfp4 import decode
from gptoss_stream.tensors.mxfp4_encoder import encode
from gptoss_stream.tensors.mxfp4_rules import DEFAULT_RULE, RULES

LARGEST = 0x7F7F
NAN_AND_INFINITY = np.array([b for b in range(65536) if b & 0x7F80 == 0x7F80], np.uint16)
LARGEST_ENCODED = {"openai": 0x7F40, "modelopt": 0x7F40, "ocp": LARGEST, "even": 0x7F5F}
"""By rule, the largest magnitude with a scale byte of 252: the codes of 253 are infinite."""
rules = pytest.mark.parametrize("rule", LARGEST_ENCODED)


@pytest.fixture(autouse=True, params=["numpy", "compiled"])
def arithmetic(request, monkeypatch):
    """Every test is run by numpy and by compiled code."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    monkeypatch.setattr(compiled, "_is_enabled", request.param == "compiled")


def encoded(
    values: np.ndarray, rule: str, loss: EncodingLoss | None = None, first_row: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Encode to memory full of other bytes, between rows and groups that must stay as they are."""
    rows, groups = len(values), values.shape[1] // 32
    blocks = np.full((rows + 2, groups + 2, 16), 0xA5, np.uint8)
    scales = np.full((rows + 2, groups + 2), 0xA5, np.uint8)
    before = values.copy()
    inside = slice(1, -1), slice(1, -1)
    encode(values, rule, blocks[inside], scales[inside], loss, first_row)
    np.testing.assert_array_equal(values, before)
    found = blocks[inside].copy(), scales[inside].copy()
    blocks[inside] = scales[inside] = 0xA5
    assert (blocks == 0xA5).all()
    assert (scales == 0xA5).all()
    return found


def assert_same(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]):
    np.testing.assert_array_equal(found[1], expected[1], "scales")
    np.testing.assert_array_equal(found[0], expected[0], "blocks")


def every_maximum() -> np.ndarray:
    """A row for each magnitude that is finite, which is the largest one of its three blocks.

    They hold: each midpoint, and the values next to it, for the smaller and for the larger
    scale that a rule may choose; and random smaller values.
    """
    rng = np.random.default_rng(1)
    maximum = np.arange(LARGEST + 1, dtype=np.uint16)
    powers = np.ldexp(1.0, np.maximum(maximum.astype(int) >> 7, 1) - 127)  # <= the maximum
    values = rng.integers(0, maximum[:, None, None] + 1, (len(maximum), 3, 32), np.uint16)
    for block, factor in enumerate((0.25, 0.5)):
        near = bits_of(np.minimum(powers[:, None] * factor * MIDPOINTS, 3e38)).astype(int)
        beside = np.concatenate([near - 1, near, near + 1, near[:, :3]], axis=1)
        values[:, block, :24] = np.clip(beside, 0, maximum[:, None])
    values |= rng.integers(2, size=values.shape, dtype=np.uint16) << 15
    np.put_along_axis(
        values,
        rng.integers(24, 32, (len(maximum), 3, 1)),
        maximum[:, None, None] | rng.integers(2, size=(len(maximum), 3, 1), dtype=np.uint16) << 15,
        axis=2,
    )
    return values.reshape(len(maximum), 96)


def every_value_below(*largest: int) -> np.ndarray:
    """Rows of blocks that together hold all bit patterns that are not larger than their maximum."""
    blocks = []
    for maximum in largest:
        patterns = np.arange(65536, dtype=np.uint16)
        patterns = patterns[(patterns & 0x7FFF) <= maximum]
        patterns = np.resize(patterns, (-(-len(patterns) // 31), 31))
        blocks += [np.insert(patterns, 7, maximum, axis=1)]
    return np.concatenate(blocks)


def random_values(*shape: int) -> np.ndarray:
    """Values with heavy tails, in blocks of all sizes, and zeros of both signs."""
    rng = np.random.default_rng(shape)
    rows, groups = shape
    values = rng.standard_t(2, (rows, groups, 32)) * 2.0 ** rng.integers(-20, 20, (rows, groups, 1))
    values[rng.random(values.shape) < 0.05] *= 0.0
    return bits_of(values.reshape(rows, groups * 32))


CASES = {
    "every maximum": every_maximum,
    "every value below 6 to 8": lambda: every_value_below(0x40C0, 0x40C1, 0x40DF, 0x40E0, 0x40FF),
    "every value below the largest": lambda: every_value_below(0x7F40, 0x7F5F, 0x7F60, LARGEST),
    "every value below the smallest": lambda: every_value_below(*range(0x0300)[::13]),
    "every value below 2^17": lambda: every_value_below(0x4800),
    "one block": lambda: random_values(1, 1),
    "one row": lambda: random_values(1, 90),
    "one group": lambda: random_values(3000, 1),
    "as in gpt-oss": lambda: random_values(255, 90),
    "an odd number of rows": lambda: random_values(1025, 4),
}
cases = pytest.mark.parametrize("case", CASES)


@cache
def values_of(case: str) -> np.ndarray:
    return CASES[case]()


@cache
def reference_of(case: str, rule: str) -> tuple[np.ndarray, np.ndarray]:
    return reference(values_of(case), rule)


def encodable(case: str, rule: str) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The rows of a case that are not refused, and what they are encoded to."""
    values, (blocks, scales) = values_of(case), reference_of(case, rule)
    rows = ((values & 0x7FFF) <= LARGEST_ENCODED[rule]).all(axis=1)
    return values[rows], (blocks[rows], scales[rows])


def test_the_rules_are_those_that_are_tested_here():
    assert list(RULES) == list(LARGEST_ENCODED)
    assert DEFAULT_RULE == "openai"


@rules
@cases
def test_the_reference_has_the_bytes_of_the_package(rule, case):
    assert_same(package(values_of(case), rule), reference_of(case, rule))


@rules
@cases
def test_encode_has_the_bytes_of_the_reference(rule, case):
    values, expected = encodable(case, rule)
    assert len(values) > 0.2 * len(values_of(case))
    assert_same(encoded(values, rule), expected)


@rules
def test_a_transposed_array_is_encoded_to_the_same(rule):
    values, expected = encodable("an odd number of rows", rule)
    assert_same(encoded(np.asfortranarray(values), rule), expected)


@rules
def test_no_rows_and_no_groups(rule):
    for shape in ((0, 64), (5, 0)):
        encoded(np.zeros(shape, np.uint16), rule)


def test_torchao_has_the_scales_of_openai_except_that_the_smallest_go_down_to_byte_0():
    values = np.zeros((LARGEST_ENCODED["openai"] + 1, 32), np.uint16)
    values[:, 5] = np.arange(len(values))
    found = encoded(values, "openai")[1][:, 0]
    theirs = torchao_scales(values, "openai")[:, 0]
    np.testing.assert_array_equal(found[theirs != found], 1)
    np.testing.assert_array_equal(np.flatnonzero(theirs != found), range(1, 0x0141))  # 6 * 2^-127


@rules
def test_magnitudes_whose_scale_has_infinite_codes_are_refused(rule):
    limit = LARGEST_ENCODED[rule]
    row = np.zeros((1, 32), np.uint16)
    for bits in range(limit - 3, LARGEST + 1):
        for row[0, 9] in (bits, bits | 0x8000):
            if bits > limit:
                with pytest.raises(ValueError, match="infinite in bfloat16"):
                    encoded(row, rule)
            else:
                assert encoded(row, rule)[1].item() == 252
            assert (reference(row, rule)[1].item() == 253) == (bits > limit)


@pytest.mark.parametrize(
    ("maximum", "openai", "modelopt", "ocp", "even"),
    [
        # In each column: the scale byte and the maximum's code.
        (0x0001, "01 0", "00 0", "00 0", "00 0"),  # 2^-133, the smallest
        (0x0010, "01 0", "00 0", "00 0", "00 0"),  # 2^-129: a tie at byte 0
        (0x0011, "01 0", "00 1", "00 1", "00 1"),
        (0x0020, "01 0", "00 1", "00 1", "00 1"),  # 2^-128: a tie at byte 1
        (0x0021, "01 1", "00 1", "00 1", "00 1"),
        (0x007F, "01 2", "00 4", "00 4", "00 4"),  # the largest subnormal number
        (0x0140, "01 5", "00 7", "00 7", "00 7"),  # 6 * 2^-127
        (0x0141, "01 5", "01 5", "00 7", "00 7"),
        (0x015F, "01 5", "01 5", "00 7", "00 7"),
        (0x0160, "01 6", "01 5", "00 7", "01 6"),  # 7 * 2^-127, a tie between 3 and 4 at byte 1
        (0x017F, "01 6", "01 6", "00 7", "01 6"),
        (0x0180, "01 6", "01 6", "01 6", "01 6"),  # 8 * 2^-127
        (0x01C0, "01 7", "01 7", "01 7", "01 7"),
        (0x01C1, "02 5", "02 5", "01 7", "01 7"),
        (0x3F7F, "7D 6", "7D 6", "7C 7", "7D 6"),  # just below 1
        (0x3F80, "7D 6", "7D 6", "7D 6", "7D 6"),  # 1
        (0x3FC0, "7D 7", "7D 7", "7D 7", "7D 7"),  # 1.5
        (0x3FC1, "7E 5", "7E 5", "7D 7", "7D 7"),
        (0x3FE0, "7E 6", "7E 5", "7D 7", "7E 6"),  # 1.75, a tie between 3 and 4
        (0x7F40, "FC 7", "FC 7", "FC 7", "FC 7"),  # 1.5 * 2^127, the largest of all rules
    ],
)
def test_scales_at_their_ends_and_at_the_rules_thresholds(maximum, openai, modelopt, ocp, even):
    values = np.zeros((1, 32), np.uint16)
    values[0, :2] = maximum, maximum | 0x8000
    for rule, expected in zip(LARGEST_ENCODED, (openai, modelopt, ocp, even), strict=True):
        blocks, scales = encoded(values, rule)
        scale, code = bytes.fromhex(expected[:2])[0], int(expected[3])
        assert (rule, scales.item(), *codes_of(blocks)[0, 0, :2]) == (rule, scale, code, 8 + code)


@pytest.mark.parametrize(
    ("rule", "positive", "negative"),
    [
        ("openai", "0224466", "8AACCEE"),
        ("modelopt", "0123456", "89ABCDE"),
        ("ocp", "0224466", "8AACCEE"),
        ("even", "0224466", "8AACCEE"),
    ],
)
def test_ties(rule, positive, negative):
    """The codes of the midpoints 0.25, 0.75, 1.25, 1.75, 2.5, 3.5 and 5."""
    midpoints = bits_of(MIDPOINTS)
    values = np.zeros((1, 32), np.uint16)
    values[0, :15] = [0x40C0, *midpoints, *midpoints | 0x8000]  # 6: the scale is 2^0
    blocks, scales = encoded(values, rule)
    assert scales.item() == 127
    found = "".join(f"{code:X}" for code in codes_of(blocks)[0, 0, :15])
    assert found == "7" + positive + negative


@rules
def test_zeros(rule):
    plus = 8 if rule == "modelopt" else 0
    values = np.zeros((3, 64), np.uint16)
    values[1] = 0x8000
    values[2, ::2] = 0x8000
    values[2, 5] = 0x3F80
    blocks, scales = encoded(values, rule)
    codes = codes_of(blocks)
    assert (scales[:2] == 0).all()
    np.testing.assert_array_equal(scales[2], [125, 0])
    assert (codes[0] == plus).all()
    assert (codes[1] == 8).all()
    np.testing.assert_array_equal(codes[2, 1], [8, plus] * 16)
    np.testing.assert_array_equal(codes[2, 0], [8, plus, 8, plus, 8, 6, 8, plus] + [8, plus] * 12)


@rules
def test_small_values_keep_their_sign_unless_float32_loses_them(rule):
    values = np.zeros((2, 32), np.uint16)
    values[:, 0] = 0x4800, 0x4880  # 2^17 and 2^18: the scales are 2^15 and 2^16
    values[:, 1:5] = 0x0001, 0x8001, 0x0002, 0x0003  # 2^-133, ...
    blocks, scales = encoded(values, rule)
    np.testing.assert_array_equal(scales[:, 0], [142, 143])
    np.testing.assert_array_equal(codes_of(blocks)[:, 0, :5], [[6, 0, 8, 0, 0]] * 2)
    values[:, 0] = 0x4900, 0x4980  # 2^19 and 2^20: 2^-133 / 2^17 is 2^-150, which rounds to 0
    blocks, scales = encoded(values, rule)
    np.testing.assert_array_equal(scales[:, 0], [144, 145])
    lost = 8 if rule == "modelopt" else 0
    np.testing.assert_array_equal(
        codes_of(blocks)[:, 0, :5], [[6, lost, 8, 0, 0], [6, lost, 8, lost, 0]]
    )


@rules
@pytest.mark.parametrize(
    ("row", "column"), [(0, 0), (1500, 70), (959, 191), (960, 192), (2048, 255)]
)
def test_nan_and_infinity_are_refused_wherever_they_are(rule, row, column):
    values = np.zeros((2049, 256), np.uint16)  # several tiles of rows and of groups
    values[:, ::2] = LARGEST_ENCODED[rule]
    encoded(values, rule)  # without them there is no error
    for bits in (0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F81, 0xFFFF):
        values[row, column] = bits
        with pytest.raises(ValueError, match="infinite or NaN"):
            encoded(values, rule)


@rules
def test_every_nan_is_refused(rule):
    assert len(NAN_AND_INFINITY) == 256
    for bits in NAN_AND_INFINITY:
        with pytest.raises(ValueError, match="infinite or NaN"):
            encoded(np.full((1, 32), bits, np.uint16), rule)


def decoded_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and largest codes of rows of one block that are finite in bfloat16: each scale
    with blocks of each largest code."""
    rng = np.random.default_rng(3)
    scale, largest, copy = (axis.ravel() for axis in np.mgrid[:255, :8, :12])
    codes = rng.integers(0, largest[:, None] + 1, (len(scale), 32))
    codes[np.arange(len(scale)), rng.integers(32, size=len(scale))] = largest
    codes[copy == 0] = largest[copy == 0, None]
    codes += 8 * rng.integers(2, size=codes.shape)
    finite = MAGNITUDES[largest] * np.ldexp(1.0, scale - 127) < 2.0**128
    return codes[finite].astype(np.uint8), scale[finite].astype(np.uint8), largest[finite]


@rules
def test_decoded_values_are_encoded_to_the_same_values(rule):
    codes, source, largest = decoded_rows()
    assert {int(s) for s in source} == set(range(255))
    stored = codes[:, 0::2] | codes[:, 1::2] << 4
    values = np.empty(codes.shape, np.uint16)
    decode(stored[:, None], source[:, None], values, DType.BF16)
    blocks, scales = encoded(values, rule)
    again = np.empty_like(values)
    decode(blocks, scales, again, DType.BF16)
    # openai's smallest byte is 1: it cannot write odd multiples of 2^-128, half of 2^-127.
    lost = np.zeros(codes.shape, bool)
    if rule == "openai":
        lost = (source == 0)[:, None] & np.isin(codes & 7, (1, 3))
        assert lost.any()
    np.testing.assert_array_equal(floats(again) != floats(values), lost)
    if rule != "modelopt":  # which has no +0
        np.testing.assert_array_equal(again[~lost], values[~lost])
    # The largest code becomes 4 or 6.
    smaller = np.array([255, 3, 2, 2, 1, 1, 0, 0])[largest]
    lowest = np.where(largest > 0, rule == "openai", 0)
    np.testing.assert_array_equal(scales[:, 0], np.maximum(source.astype(int) - smaller, lowest))
    same = (source == scales[:, 0]) & ~lost.any(axis=1)
    if rule != "modelopt":
        np.testing.assert_array_equal(blocks[same, 0], stored[same])
    assert same.sum() > len(same) // 5


def test_threads_encode_at_the_same_time():
    values = values_of("as in gpt-oss")
    names = list(RULES) * 3
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(encoded, [values] * 12, names))
    for rule, result in zip(names, found, strict=True):
        assert_same(result, reference_of("as in gpt-oss", rule))


@rules
@pytest.mark.parametrize(("step", "first_row"), [(1, 0), (1, 5), (3, 0), (3, 5), (7, 215)])
@pytest.mark.parametrize("case", ["an odd number of rows", "every value below 6 to 8"])
def test_the_loss_is_that_of_the_decoded_values(rule, case, step, first_row):
    values = values_of(case)
    blocks, scales = reference_of(case, rule)
    exact = floats(values).reshape(*scales.shape, 32)
    written = decoded(blocks, scales)
    loss = EncodingLoss(step=step)
    encoded(values, rule, loss, first_row)
    measured = (np.arange(len(values)) + first_row) // 32 % step == 0
    assert loss.blocks == scales.size
    assert loss.kept == 0
    assert loss.flushed == np.count_nonzero((exact != 0) & (written == 0))
    largest = 6 * np.ldexp(1.0, scales.astype(int) - 127)[..., None]
    assert loss.clipped == np.count_nonzero(np.abs(exact) > largest)
    error = step * np.sum((exact - written)[measured] ** 2)
    norm = step * np.sum(exact[measured] ** 2)
    assert loss.squared_error == pytest.approx(error, rel=1e-12)
    assert loss.squared_norm == pytest.approx(norm, rel=1e-12)
    assert loss.relative_error == pytest.approx(np.sqrt(error / norm), rel=1e-12)


def test_losses_are_added():
    values = values_of("an odd number of rows")
    whole, parts = EncodingLoss(step=3), EncodingLoss(step=3)
    encoded(values, "ocp", whole)
    for first in (0, 100, 1000):
        part = EncodingLoss(step=3)
        encoded(values[first : {0: 100, 100: 1000}.get(first)], "ocp", part, first)
        parts.add(part)
    assert whole.clipped > 0
    assert whole.flushed > 0
    assert parts.step == 3
    assert (parts.blocks, parts.kept, parts.flushed, parts.clipped) == (
        whole.blocks, whole.kept, whole.flushed, whole.clipped
    )  # fmt: skip
    assert parts.squared_error == pytest.approx(whole.squared_error, rel=1e-12)
    assert parts.squared_norm == pytest.approx(whole.squared_norm, rel=1e-12)


def test_the_relative_error_of_zeros_is_zero():
    loss = EncodingLoss()
    encoded(np.zeros((2, 32), np.uint16), "openai", loss)
    assert (loss.blocks, loss.squared_norm, loss.relative_error) == (2, 0, 0)


def test_the_error_of_some_rows_of_a_large_tensor_stands_for_all():
    rows = 20_000
    assert measured_step(5760) == 1
    assert measured_step(rows) > 1
    values = bits_of(np.random.default_rng(4).standard_normal((rows, 96)))
    estimated, exact = EncodingLoss(step=measured_step(rows)), EncodingLoss()
    encoded(values, "openai", estimated)
    encoded(values, "openai", exact)
    assert estimated.squared_error == pytest.approx(exact.squared_error, rel=0.05)
    assert estimated.squared_norm == pytest.approx(exact.squared_norm, rel=0.05)
    assert 0.1 < exact.relative_error < 0.13  # as of all tensors of normal numbers
