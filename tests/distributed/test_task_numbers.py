"""Which shards an array task writes, and which task numbers are valid."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings, strategies as st
from runs import (
    assert_clean_error,
    run_in_process,
)

import gptoss_stream
from gptoss_stream.errors import OptionError
from gptoss_stream.planning.array_task import ArrayTask
from gptoss_stream.planning.shards import write_nbytes

SIZE = "150KB"


@pytest.fixture(scope="module")
def source(checkpoints):
    return checkpoints(layers=3)


def task(source: Path, output: object, index: int | None = None, count: int = 3, *options: str):
    """Run one task, or the whole conversion, in this process."""
    numbers = () if index is None else ("--task-index", index, "--num-tasks", count)
    return run_in_process(
        "convert", source, output, "--max-shard-size", SIZE, "--checksums", *numbers, *options
    )


@settings(deadline=None, max_examples=200)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 10**10), st.integers(0, 10**9)), max_size=60),
    count=st.integers(1, 12),
)
def test_array_tasks_partition_the_shards_evenly(sizes, count):
    """Each shard is in one task, and no two tasks differ by more than the largest shard."""
    shards = [
        SimpleNamespace(name=f"{n}", nbytes=nbytes, spill_nbytes=spill_nbytes)
        for n, (nbytes, spill_nbytes) in enumerate(sizes)
    ]
    parts = [ArrayTask(index, count).select(shards) for index in range(count)]
    assert sorted((s.name for part in parts for s in part), key=int) == [s.name for s in shards]
    loads = [sum(map(write_nbytes, part)) for part in parts]
    assert max(loads) - min(loads) <= max(map(write_nbytes, shards), default=0)


@pytest.mark.parametrize(
    "numbers", [(-1, 3), (3, 3), (0, 0), (0, -1), (0, 10_001), (5, 2)], ids=str
)
def test_invalid_task_numbers_are_refused(source, tmp_path, numbers):
    with pytest.raises(OptionError):
        gptoss_stream.convert(source, tmp_path / "out", task=numbers)
    index, count = numbers
    assert_clean_error(task(source, tmp_path / "out", index, count), 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("--task-index", 0), ("--num-tasks", 2)])
def test_one_number_without_the_other_is_refused(source, tmp_path, options):
    assert_clean_error(run_in_process("convert", source, tmp_path / "out", *options), 2)


SLURM = "SLURM_ARRAY_TASK_"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ID": "0", "COUNT": "3"}, (0, 3)),
        ({"ID": "2", "COUNT": "3", "MIN": "0", "MAX": "2"}, (2, 3)),
        ({"ID": "1", "COUNT": "3", "MIN": "1", "MAX": "3"}, (0, 3)),
        ({"ID": "14", "COUNT": "3", "MIN": "10", "STEP": "2"}, (2, 3)),
        ({"ID": "7", "COUNT": "1", "MIN": "7"}, (0, 1)),
        ({}, "not a task of a SLURM array"),
        ({"ID": "1"}, "not a task of a SLURM array"),
        ({"ID": "one", "COUNT": "3"}, "not a task of a SLURM array"),
        ({"ID": "9", "COUNT": "3", "MIN": "1"}, "not in a contiguous array"),
        ({"ID": "11", "COUNT": "3", "MIN": "10", "STEP": "2"}, "not in a contiguous array"),
    ],
)
def test_task_numbers_of_slurm(source, tmp_path, monkeypatch, environment, expected):
    """They come from the environment of an array task, which may start at any number."""
    for name in [name for name in os.environ if name.startswith(SLURM)]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(SLURM + name, value)
    done = run_in_process("convert", source, tmp_path / "out", "--slurm-array")
    if isinstance(expected, str):
        assert_clean_error(done, 2)
        assert expected in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert f"task {expected[0]} of {expected[1]} is done" in done.stdout
    assert_clean_error(
        run_in_process("convert", source, tmp_path / "out", "--slurm-array", "--task-index", 0), 2
    )
