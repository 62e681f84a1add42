"""Blocks of a run's reads: every byte is in exactly one, and few are needed at the same time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from gptoss_stream import plan
from gptoss_stream.checkpoint.read_ahead import FetchBlock, plan_fetches
from gptoss_stream.checkpoint.reader import ElementRange, ReadSchedule
from gptoss_stream.tensors.dtypes import DType
from gptoss_stream.tensors.raw_tensor import RawTensor
from gptoss_stream.transforms.output_tensor import element_ranges

BLOCK = 64


def schedule_of(steps: list[list[ElementRange]]) -> ReadSchedule:
    return ReadSchedule(len(steps), lambda step: steps[step])


@st.composite
def schedules(draw) -> list[list[ElementRange]]:
    """Steps that read ranges of a few tensors in two shards, some of them several times."""
    raws, ends = [], {"a": 8, "b": 8}
    for number in range(draw(st.integers(1, 5))):
        shard, size = draw(st.sampled_from("ab")), draw(st.integers(1, 300))
        raws.append(RawTensor(f"t{number}", DType.U8, (size,), shard, ends[shard]))
        ends[shard] += size
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        step = []
        for _ in range(draw(st.integers(0, 3))):
            raw = draw(st.sampled_from(raws))
            first = draw(st.integers(0, raw.shape[0] - 1))
            step.append(ElementRange(raw, first, draw(st.integers(1, raw.shape[0] - first))))
        steps.append(step)
    return steps


def overlapped(blocks: list[FetchBlock], element_range: ElementRange) -> list[FetchBlock]:
    begin, nbytes = element_range.byte_range
    return [
        b
        for b in blocks
        if b.shard == element_range.raw.shard and b.begin < begin + nbytes and b.end > begin
    ]


@settings(max_examples=300, deadline=None)
@given(schedules())
def test_every_byte_that_is_read_is_in_one_block_and_its_step_is_known(steps):
    blocks = plan_fetches(schedule_of(steps), BLOCK)
    read = {
        (e.raw.shard, at)
        for step in steps
        for e in step
        for at in range(e.byte_range[0], sum(e.byte_range))
    }
    fetched = [(b.shard, at) for b in blocks for at in range(b.begin, b.end)]
    assert len(fetched) == len(set(fetched)), "a byte is in two blocks"
    assert read <= set(fetched)
    assert all(0 < block.nbytes <= BLOCK for block in blocks)
    for number, step in enumerate(steps):
        needed = {
            id(block) for element_range in step for block in overlapped(blocks, element_range)
        }
        assert needed == {id(block) for block in blocks if number in block.steps}
    assert [b.first for b in blocks] == sorted(b.first for b in blocks)


def test_neighbors_are_merged_only_if_they_are_needed_together():
    raws = [RawTensor(f"t{i}", DType.U8, (10,), "a", 10 * i) for i in range(3)]
    soon = plan_fetches(schedule_of([[ElementRange(raw, 0, 10)] for raw in raws]), BLOCK)
    assert [(b.begin, b.end) for b in soon] == [(0, 30)]
    apart: list[list[ElementRange]] = [[] for _ in range(1000)]
    for number, raw in zip((0, 500, 501), raws, strict=True):
        apart[number] = [ElementRange(raw, 0, 10)]
    blocks = plan_fetches(schedule_of(apart), BLOCK)
    assert [(b.begin, b.end) for b in blocks] == [(0, 10), (10, 30)]


def test_only_the_elements_that_are_read_are_fetched():
    raw = RawTensor("t", DType.BF16, (100_000,), "a", 8)
    blocks = plan_fetches(schedule_of([[ElementRange(raw, 50, 5)], [ElementRange(raw, 90_000, 1)]]))
    assert [(b.begin, b.end) for b in blocks] == [(108, 118), (180_008, 180_010)]


@pytest.mark.parametrize("to", ["transformer-lens", "hf"])
def test_a_conversion_needs_few_blocks_at_the_same_time(checkpoints, to):
    """A block is a sixteenth of the file, and no step needs more than half of the file."""
    planned = plan(checkpoints(), to=to)
    tensors = [t for shard in planned.shards for t in shard.tensors]
    schedule = ReadSchedule(
        len(tensors), lambda i: element_ranges(tensors[i], 0, tensors[i].nbytes)
    )
    total = planned.source_nbytes
    blocks = plan_fetches(schedule, total // 16)
    assert total <= sum(block.nbytes for block in blocks) <= 1.02 * total
    for step in range(schedule.num_steps):
        needed = sum(b.nbytes for b in blocks if b.first <= step <= b.last)
        assert needed <= total / 2
