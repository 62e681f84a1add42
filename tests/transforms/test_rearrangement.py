"""Any byte range of a rearranged operand is equal to what einops gives for the whole array."""

from __future__ import annotations

import numpy as np
import pytest
from einops import rearrange

from gptoss_stream.tensors.cast import STORAGE
from gptoss_stream.tensors.dtypes import DType
from gptoss_stream.tensors.raw_tensor import RawTensor
from gptoss_stream.transforms.materialize import materialize, materialize_rows
from gptoss_stream.transforms.operands import DenseOperand, InterleavedOperand, ZeroOperand
from gptoss_stream.transforms.output_tensor import OutputTensor, Segment, element_ranges
from gptoss_stream.transforms.rearrangement import make_rearrangement
from gptoss_stream.transforms.row_encoding import BLOCKS, RowEncoding
from gptoss_stream.transforms.tiles import TargetRows

# axes of the input and of the output, shape of the input
CASES = [
    ("v m", "v m", (7, 5)),
    ("v m", "m v", (7, 5)),
    ("n h m", "n m h", (4, 3, 5)),
    ("n m h", "n h m", (4, 5, 3)),
    ("m x", "x m", (70, 12)),
    ("m", "m", (7,)),
]


class ArrayReader:
    """A `Reader` whose only raw tensor is an array."""

    def __init__(self, array):
        self.array = array

    def read(self, tensor, first, shape):
        from contextlib import nullcontext

        flat = self.array.reshape(-1)[first : first + int(np.prod(shape))]
        return nullcontext(flat.reshape(shape))


def sample(shape, dtype=DType.F32) -> tuple[np.ndarray, RawTensor]:
    array = np.arange(np.prod(shape)).astype(STORAGE[dtype]).reshape(shape)
    return array, RawTensor("raw", dtype, shape, "x.safetensors", 0)


def check_every_byte_range(operand, source, target, expected, reader):
    """Make every byte range of a segment, so that ranges begin and end within rows."""
    segment = Segment(operand, make_rearrangement(tuple(source), tuple(target), operand.shape))
    tensor = OutputTensor("t", DType.F32, expected.shape, (segment,))
    data = np.ascontiguousarray(expected).view(np.uint8).reshape(-1)
    assert tensor.nbytes == segment.elements * 4 == data.size

    def make(segment, targets, dtype):
        materialize_rows(segment, targets, dtype, reader)

    step = 4 if data.size < 500 else 404
    for begin in range(0, data.size, step):
        for end in range(begin + 4, data.size + 1, step):
            out = np.zeros(end - begin, np.uint8)
            materialize(tensor, begin, end, out, make)
            np.testing.assert_array_equal(out, data[begin:end])
    return tensor


@pytest.mark.parametrize(("source", "target", "shape"), CASES)
def test_every_byte_range_is_that_of_the_whole(source, target, shape):
    array, raw = sample(shape)
    expected = rearrange(array, f"{source} -> {target}")
    operand = DenseOperand(raw, 0, shape)
    check_every_byte_range(operand, source.split(), target.split(), expected, ArrayReader(array))


@pytest.mark.parametrize("selected", [range(0, 12, 2), range(1, 12, 2), range(3, 9)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("target", ["a b", "b a"])
def test_selected_rows_or_columns(target, axis, selected):
    array, raw = sample((12, 12))
    operand = DenseOperand(raw, 0, (12, 12), axis, selected)
    part = array[selected] if axis == 0 else array[:, selected]
    assert operand.shape == part.shape
    expected = rearrange(part, f"a b -> {target}")
    check_every_byte_range(operand, "ab", target.split(), expected, ArrayReader(array))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("target", ["a b", "b a"])
def test_interleaved_rows_or_columns(target, axis):
    """For example gate and up projection, which are halves of one stored tensor."""
    array, raw = sample((12, 5))
    halves = DenseOperand(raw, 0, (6, 5)), DenseOperand(raw, 30, (6, 5))
    operand = InterleavedOperand(halves, axis)
    interleaved = np.stack([array[:6], array[6:]], axis + 1).reshape(operand.shape)
    expected = rearrange(interleaved, f"a b -> {target}")
    check_every_byte_range(operand, "ab", target.split(), expected, ArrayReader(array))
    read = [(e.first, e.count) for e in operand.element_ranges((0, 1))]
    assert read == ([(0, 5)] if axis == 0 else [(0, 5), (30, 5)])


def test_interleaved_elements_of_two_dtypes():
    """As in biases. Both are cast to the output's dtype."""
    array, raw = sample((10,))
    wide = DenseOperand(raw, 0, (5,))
    narrow = DenseOperand(RawTensor("raw", DType.BF16, (10,), "x", 0), 0, (5,))

    class Both(ArrayReader):
        def read(self, tensor, first, shape):
            if tensor.dtype is DType.BF16:
                return ArrayReader(np.full(10, 0x3F80, np.uint16)).read(tensor, first, shape)
            return super().read(tensor, first, shape)

    expected = np.stack([array[:5], np.ones(5, np.float32)], 1).reshape(10)
    check_every_byte_range(InterleavedOperand((wide, narrow), 0), "x", "x", expected, Both(array))


@pytest.mark.parametrize("encoding", [None, RowEncoding("openai", BLOCKS)])
def test_rows_that_alternate_are_read_operand_by_operand(encoding):
    """In the order in which a reader reads ahead: no tile waits for the last operand."""
    array = np.full((1500, 2048), 0x3F80, np.uint16)
    raw, half = RawTensor("raw", DType.BF16, array.shape, "x", 0), 750 * 2048
    reads = []

    class Noting(ArrayReader):
        def read(self, tensor, first, shape):
            reads.append((first, int(np.prod(shape))))
            return super().read(tensor, first, shape)

    halves = tuple(DenseOperand(raw, n * half, (750, 2048)) for n in (0, 1))
    operand, axes = InterleavedOperand(halves, 0), ("a", "b") if encoding else ("b", "a")
    segment = Segment(operand, make_rearrangement(("a", "b"), axes, operand.shape), encoding)
    shape = (1500, 1024) if encoding else (2048, 1500)
    out = np.empty(shape, np.uint8 if encoding else np.uint16)
    materialize_rows(segment, [TargetRows(0, out)], DType.BF16, Noting(array))
    assert len(reads) > 2
    assert reads == sorted(reads)
    assert sum(count for _, count in reads) == array.size
    assert [e.first for e in operand.element_ranges((0, 1500))] == [0, half]


def test_zeros_read_nothing():
    zeros = np.zeros(7, np.float32)
    tensor = check_every_byte_range(ZeroOperand((7,)), "x", "x", zeros, reader=None)
    assert list(element_ranges(tensor, 0, tensor.nbytes)) == []


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("a b", "a"),
        ("a", "a b"),
        ("a a", "a a"),
        ("a b c", "b a c"),  # a row of the output needs all rows of the input
        ("a b c", "c a b"),
    ],
)
def test_patterns_that_cannot_be_applied_row_by_row_are_refused(source, target):
    axes = tuple(source.split())
    with pytest.raises(ValueError, match="pattern"):
        make_rearrangement(axes, tuple(target.split()), (2,) * len(axes))
