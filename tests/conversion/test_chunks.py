"""Neither chunks and threads nor spill files change the bytes of an output."""

from __future__ import annotations

import errno
import fcntl
import os
import time

import pytest
from format_pairs import ALL_PAIRS, MXFP4_FORMATS
from runs import digests

import gptoss_stream


def test_the_bytes_depend_only_on_source_and_options(checkpoints, tmp_path, monkeypatch):
    """Not on the number of threads, the size of chunks, or what is spilled."""
    source = checkpoints()
    gptoss_stream.convert(source, tmp_path / "a", max_shard_size="300KB", workers=1)
    expected = digests(tmp_path / "a")
    assert len(expected) > 8
    for number, (workers, chunk, spilled) in enumerate(
        [(1, 4096, 64_000_000), (2, 12_288, 1000), (3, 65_536, 1000), (7, 8 << 20, 1)]
    ):
        monkeypatch.setattr("gptoss_stream.writing.executor.CHUNK_NBYTES", chunk)
        is_memory_low = number % 2 == 0
        monkeypatch.setattr(
            "gptoss_stream.writing.spill_file.is_memory_low", lambda nbytes, low=is_memory_low: low
        )
        monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", spilled)
        out = tmp_path / str(number)
        gptoss_stream.convert(source, out, max_shard_size="300KB", workers=workers)
        assert digests(out) == expected


@pytest.mark.parametrize(("source", "target"), ALL_PAIRS)
def test_every_pair_in_chunks_of_any_size(source, target, checkpoints, tmp_path, monkeypatch):
    """Also if the dtype changes."""
    folder = checkpoints(format=source, layers=2)
    dtypes = ["keep"] if target in MXFP4_FORMATS else ["keep", "float32"]
    for dtype in dtypes:
        options = {"to": target, "dtype": dtype, "max_shard_size": "300KB"}
        gptoss_stream.convert(folder, tmp_path / f"{dtype}-whole", **options)
        expected = digests(tmp_path / f"{dtype}-whole")
        for workers, chunk, spilled in ((1, 4096, 1000), (3, 12_288, 1000), (2, 1 << 17, 10**8)):
            with monkeypatch.context() as patch:
                patch.setattr("gptoss_stream.writing.executor.CHUNK_NBYTES", chunk)
                low = workers == 3
                patch.setattr(
                    "gptoss_stream.writing.spill_file.is_memory_low", lambda nbytes, low=low: low
                )
                patch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", spilled)
                out = tmp_path / f"{dtype}-{workers}"
                gptoss_stream.convert(folder, out, workers=workers, **options)
                assert digests(out) == expected
                assert gptoss_stream.verify(folder, out).equal


@pytest.mark.parametrize(("source", "target"), ALL_PAIRS)
def test_only_the_vocabulary_is_spilled(source, target, sources, monkeypatch):
    """Experts are never spilled, whatever their size, and the vocabulary only if it is
    transposed."""
    monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", 0)
    for variant in ("bf16", "f32, one expert"):
        shards = gptoss_stream.plan(sources(source, variant)[0], to=target).shards
        spilled = {segment for shard in shards for segment, _ in shard.spilled()}
        names = [t.name for shard in shards for t in shard.tensors if spilled & {*t.segments}]
        transposed = {"transformer-lens": "unembed.W_U", "openai": "unembedding.weight"}
        head = transposed.get(target, "lm_head.weight")
        is_transposed = (source == "transformer-lens") != (target == "transformer-lens")
        assert names == ([head] if is_transposed else [])


def test_large_transposes_of_one_shard_do_not_wait_for_each_other(
    checkpoints, tmp_path, monkeypatch
):
    """Three transpositions of a shard go through spill files, with few and with many chunks ahead:
    in this test the `W_O` are spilled too, by their axis of heads."""
    source = checkpoints(layers=2)
    gptoss_stream.convert(source, tmp_path / "direct")
    monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", 20_000)
    monkeypatch.setattr("gptoss_stream.planning.shards.SPILLED_AXES", frozenset("vn"))
    assert len(list(gptoss_stream.plan(source).shards[0].spilled())) == 3
    for chunk, workers in ((4096, 1), (65_536, 3), (1 << 20, 2)):
        monkeypatch.setattr("gptoss_stream.writing.executor.CHUNK_NBYTES", chunk)
        out = tmp_path / f"{chunk}"
        gptoss_stream.convert(source, out, workers=workers)
        assert digests(out) == digests(tmp_path / "direct")


def test_reads_that_return_fewer_bytes_than_requested(checkpoints, tmp_path, monkeypatch):
    """Also reads of a spill file, where one read fills many rows of a chunk."""
    source = checkpoints()
    gptoss_stream.convert(source, tmp_path / "whole")
    preadv, requested = os.preadv, []

    def short(descriptor, views, offset, *flags):
        requested.append(len(views))
        *full, last = views[: 1 + len(requested) % 3]
        return preadv(descriptor, [*full, last[: max(1, len(last) // 2)]], offset, *flags)

    monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", 20_000)
    monkeypatch.setattr("gptoss_stream._utils.temporary_file._MAX_VIEWS", 5)
    monkeypatch.setattr(os, "preadv", short)
    gptoss_stream.convert(source, tmp_path / "short")
    assert max(requested) == 5
    assert digests(tmp_path / "short") == digests(tmp_path / "whole")


def test_a_file_system_that_refuses_direct_writes_late(checkpoints, tmp_path, monkeypatch):
    """The file system accepts O_DIRECT, then refuses each write with EINVAL: the run continues with
    buffered writing."""
    gptoss_stream.convert(checkpoints(), tmp_path / "direct")
    pwrite = os.pwrite

    def refusing(descriptor, data, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            time.sleep(0.05)
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refusing)
    monkeypatch.setattr("gptoss_stream.writing.executor.CHUNK_NBYTES", 65_536)
    gptoss_stream.convert(checkpoints(), tmp_path / "buffered", workers=4)
    assert digests(tmp_path / "buffered") == digests(tmp_path / "direct")
