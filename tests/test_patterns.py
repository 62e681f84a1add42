"""Patterns in pieces give what einops gives of the whole."""

from __future__ import annotations

import numpy as np
import pytest
from einops import rearrange

from gptoss_stream.cast import STORAGE
from gptoss_stream.checkpoint import RawTensor
from gptoss_stream.dtypes import DType
from gptoss_stream.operands import Plain, take_rows
from gptoss_stream.patterns import rearrangement
from gptoss_stream.recipe import OutputTensor, Part, fill, make_pieces

# pattern, shape of the input, sizes that it leaves open
CASES = [
    ("v m -> v m", (7, 5), {}),
    ("v m -> m v", (7, 5), {}),
    ("(n h) m -> n m h", (12, 5), {"n": 4}),
    ("(n h) m -> n h m", (12, 5), {"n": 4}),
    ("m (n h) -> n h m", (70, 12), {"n": 3}),
    ("(n h) -> n h", (12,), {"n": 4}),
    ("m -> m", (7,), {}),
    ("(n h) m -> (n h) m", (12, 5), {"n": 4}),
]


class ArrayReader:
    """Raw tensors that are arrays; see `operands.Reader`."""

    def __init__(self, array):
        self.array = array

    def read(self, tensor, first, shape):
        from contextlib import nullcontext

        flat = self.array.reshape(-1)[first : first + int(np.prod(shape))]
        return nullcontext(flat.reshape(shape))


def sample(shape, dtype=DType.F32) -> tuple[np.ndarray, RawTensor]:
    array = np.arange(np.prod(shape)).astype(STORAGE[dtype]).reshape(shape)
    return array, RawTensor("raw", dtype, shape, "x.safetensors", 0)


@pytest.mark.parametrize(("pattern", "shape", "known"), CASES)
def test_every_run_of_bytes_is_that_of_the_whole(pattern, shape, known):
    """From every begin to every end, so that units are cut everywhere."""
    array, raw = sample(shape)
    part = Part(Plain(raw, 0, shape), rearrangement(pattern, shape, tuple(known.items())))
    expected = rearrange(array, pattern, **known)
    assert part.rearrangement.shape == expected.shape
    tensor = OutputTensor("t", DType.F32, expected.shape, (part,))
    data = np.ascontiguousarray(expected).view(np.uint8).reshape(-1)

    def make(part, pieces, dtype):
        make_pieces(part, pieces, dtype, ArrayReader(array))

    step = 4 if data.size < 500 else 404
    for begin in range(0, data.size, step):
        for end in range(begin + 4, data.size + 1, step):
            out = np.zeros(end - begin, np.uint8)
            fill(tensor, begin, end, out, make)
            np.testing.assert_array_equal(out, data[begin:end])


@pytest.mark.parametrize("start", [0, 1])
def test_every_second_row(start):
    array, raw = sample((12, 5))
    operand = take_rows(Plain(raw, 0, (12, 5)), start, 2)
    with operand.load(ArrayReader(array), (1, 5), (1, 4), DType.F32) as (block, dtype):
        np.testing.assert_array_equal(block, array[start::2][1:5, 1:4])
        assert dtype is DType.F32


def test_every_second_column():
    array, raw = sample((6, 10))
    operand = Plain(raw, 0, (6, 10), is_transposed=True, start=1, step=2)
    assert operand.shape == (6, 5)
    with operand.load(ArrayReader(array), (2, 5), (1, 4), DType.F32) as (block, _):
        np.testing.assert_array_equal(block, array[2:5, 1::2][:, 1:4])


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [
        ("a b -> a", (2, 3)),
        ("a -> a b", (2,)),
        ("a b -> a b", (2, 3, 4)),
        ("(a b) c -> b a c", (6, 2)),  # b is in pieces all over the rows
        ("a (b c) -> b a c", (2, 6)),  # the rows do not come last
        ("(a b) c -> a b c", (7, 2)),
        ("a b c -> c a b", (2, 3, 4)),
    ],
)
def test_patterns_that_cannot_be_made_in_pieces_are_refused(pattern, shape):
    with pytest.raises(ValueError, match="pattern"):
        rearrangement(pattern, shape, (("a", 2),) if "(a" in pattern else (("b", 3),))
