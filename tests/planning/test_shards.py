"""Plans made of headers alone, with the released models' exact numbers, and sizes of shards."""

from __future__ import annotations

import pytest

import gptoss_stream
from gptoss_stream.errors import OptionError
from gptoss_stream.planning.shards import balanced_groups, parse_size
from gptoss_stream.random_checkpoint import random_checkpoint
from gptoss_stream.tensors.safetensors_header import INDEX_NAME, build_index


def sparse_checkpoint(folder, preset):
    """Write a checkpoint with a released model's shapes, as sparse files without data."""
    checkpoint = random_checkpoint(preset)
    for shard in checkpoint.shards:
        with open(folder / shard.name, "wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    weight_map = {t.name: shard.name for shard in checkpoint.shards for t in shard.tensors}
    nbytes = sum(shard.data_nbytes for shard in checkpoint.shards)
    (folder / INDEX_NAME).write_bytes(build_index(nbytes, weight_map))
    (folder / "config.json").write_bytes(checkpoint.files["config.json"])
    return folder


@pytest.mark.parametrize(
    ("preset", "raw", "raw_nbytes", "tensors", "nbytes", "parameters"),
    [
        ("20b", 459, 13_761_264_768, 4_924, 41_829_916_544, 20_914_757_184),
        ("120b", 687, 65_248_815_744, 28_120, 233_658_715_520, 116_829_156_672),
    ],
)
def test_the_released_models(preset, raw, raw_nbytes, tensors, nbytes, parameters, tmp_path):
    planned = gptoss_stream.plan(sparse_checkpoint(tmp_path, preset))
    assert len(planned.info.tensors) == raw
    assert planned.source_nbytes == raw_nbytes
    assert planned.num_tensors == tensors
    assert planned.data_nbytes == nbytes
    assert planned.model.num_parameters == parameters
    assert planned.unmapped == ()
    assert all(shard.data_nbytes <= 5 * 10**9 for shard in planned.shards)
    assert len(planned.shards) == -(-nbytes // (5 * 10**9))
    assert planned.shards[0].name == f"model-00001-of-{len(planned.shards):05d}.safetensors"
    assert planned.spill_nbytes == 201_088 * 2880 * 2  # unembed.W_U alone


def test_a_plan_writes_nothing(checkpoints, tmp_path):
    source = checkpoints()
    before = {file: file.stat().st_mtime_ns for file in source.iterdir()}
    gptoss_stream.plan(source)
    assert {file: file.stat().st_mtime_ns for file in source.iterdir()} == before


@pytest.mark.parametrize(
    ("sizes", "limit", "groups"),
    [
        ([6, 6, 2, 6, 2, 2], 10, [1, 2, 3]),
        ([1] * 10, 5, [5, 5]),
        ([1] * 11, 10, [6, 5]),  # not 10 and 1: even shards are even work
        ([30, 1, 1], 10, [1, 2]),
        ([1, 30, 1], 10, [1, 1, 1]),
        ([5, 5], 10, [2]),
        ([0, 0], 10, [2]),
        ([], 10, []),
    ],
)
def test_shards_are_few_and_of_even_size(sizes, limit, groups):
    assert balanced_groups(sizes, limit) == groups


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("1.5 MB", 1_500_000),
        ("200kb", 200_000),
        ("7", 7),
        (12, 12),
        ("1T", 10**12),
    ],
)
def test_sizes_are_decimal(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5GiB", "5 G B", "1e3", "nan"])
def test_other_sizes_are_refused(text):
    with pytest.raises(OptionError, match="not a size"):
        parse_size(text)
