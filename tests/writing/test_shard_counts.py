"""The callback that counts finished shards: of local, remote and resumed runs, and of tasks."""

from __future__ import annotations

from uuid import uuid4

import pytest
from runs import interrupted

import gptoss_stream


@pytest.mark.parametrize("to", ["folder", "memory://{id}/out"])
def test_finished_shards_are_counted(to, checkpoints, tmp_path):
    out = tmp_path / to if "://" not in to else to.format(id=uuid4().hex)
    counts = []
    options = {"max_shard_size": "300KB", "staging": tmp_path / "staging"}
    report = gptoss_stream.convert(
        checkpoints(), out, on_shard=lambda *numbers: counts.append(numbers), **options
    )
    total = len(report.shards)
    assert total > 2
    assert sorted(counts) == [(finished, total) for finished in range(total + 1)]


def test_a_resumed_task_counts_its_own_shards(checkpoints, tmp_path):
    """What is finished is counted before the first shard is written."""
    counts = []
    totals = 0
    for task in ((0, 2), (1, 2)):
        gptoss_stream.convert(
            checkpoints(), tmp_path / "out", max_shard_size="300KB", task=task,
            on_shard=lambda *numbers: counts.append(numbers),
        )  # fmt: skip
        total = counts[0][1]
        assert sorted(counts) == [(finished, total) for finished in range(total + 1)]
        totals += total
        counts.clear()
    assert totals == len([*(tmp_path / "out").glob("*.safetensors")])
    interrupted(checkpoints(), tmp_path / "other")
    gptoss_stream.convert(
        checkpoints(), tmp_path / "other", max_shard_size="300KB",
        on_shard=lambda *numbers: counts.append(numbers),
    )  # fmt: skip
    assert counts[0][0] < counts[-1][0] == counts[-1][1]


@pytest.mark.parametrize("write", [gptoss_stream.synth, gptoss_stream.synth_adapter])
def test_shards_of_random_files_are_counted(write, tmp_path):
    counts = []
    write(tmp_path / "out", on_shard=lambda *numbers: counts.append(numbers))
    assert counts == [(0, 1), (1, 1)]
