"""The reader of checkpoints on a disk, which reads past the page cache and by a schedule."""

from __future__ import annotations

import errno
import os
import threading
from functools import partial
from pathlib import Path

import pytest
from runs import digests

from gptoss_stream import convert, formats, plan, verify
from gptoss_stream.checkpoint import disk_reader, open_reader
from gptoss_stream.checkpoint.disk_reader import DiskReader
from gptoss_stream.checkpoint.metadata import read_metadata
from gptoss_stream.errors import CheckpointError, MachineError
from gptoss_stream.storage import local_folder
from gptoss_stream.storage.local_folder import LocalFile, LocalFolder
from gptoss_stream.writing import spill_file
from gptoss_stream.writing.executor import Callbacks
from gptoss_stream.writing.thread_executor import ThreadExecutor

PAIRS = [(source, to) for source in formats.names() for to in formats.names()]
TRANSPOSING = [("transformer-lens", "hf"), ("hf", "hf-unfused"), ("hf-unfused", "hf")]
CELL = 8192


@pytest.fixture
def reads(monkeypatch):
    """Bytes read past the page cache, and the times that something was read through it."""
    counts = {"past": 0, "through": 0}
    past, through = LocalFile.read_past_cache, LocalFile.read_into

    def read_past_cache(self, memory, begin, stop):
        counts["past"] += min(len(memory), self.info.nbytes - begin)
        past(self, memory, begin, stop)

    def read_into(self, out, begin, stop):
        counts["through"] += 1
        return through(self, out, begin, stop)

    monkeypatch.setattr(LocalFile, "read_past_cache", read_past_cache)
    monkeypatch.setattr(LocalFile, "read_into", read_into)
    return counts


def write(reader, planned, folder: Path, threads: int) -> None:
    """Convert by a reader, in small chunks."""
    for name in ("parts", "out"):
        (folder / name).mkdir()
    executor = ThreadExecutor(reader, threads, chunk_nbytes=CELL)
    executor.write_shards(planned.shards, folder / "out", folder / "parts", Callbacks())


def expected(planned, folder: Path) -> dict[str, str]:
    """The digests of what the reader through the page cache gives."""
    folder.mkdir()
    with open_reader.LocalReader(planned.info) as reader:
        write(reader, planned, folder, 2)
    return digests(folder / "out")


@pytest.mark.parametrize(("source", "to"), PAIRS)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_output_is_that_of_the_page_cache(checkpoints, tmp_path, source, to, threads, reads):
    planned = plan(checkpoints(format=source), to=to, max_shard_size="300KB")
    by_page_cache = expected(planned, tmp_path / "expected")
    reads["through"] = 0
    with DiskReader(planned.info, 20_000, CELL) as reader:
        write(reader, planned, tmp_path, threads)
        assert not reader._blocks._blocks, "a block was not dropped"
        assert reader._blocks._used_nbytes == 0
    assert digests(tmp_path / "out") == by_page_cache
    # A row that is read twice may have been dropped in between, but nothing else.
    assert reads["through"] < planned.nbytes / CELL / 10


@pytest.mark.parametrize(("source", "to"), [("hf-mxfp4", "transformer-lens"), *TRANSPOSING])
def test_bytes_are_read_once_but_for_pages_at_the_edges(checkpoints, tmp_path, source, to, reads):
    planned = plan(checkpoints(format=source), to=to)
    with DiskReader(planned.info, 10**9, 1 << 20) as reader:
        write(reader, planned, tmp_path, 1)
    steps = planned.nbytes / CELL
    assert planned.source_nbytes <= reads["past"] <= planned.source_nbytes + steps * 4 * 4096


@pytest.mark.parametrize("budget", [0, 60_000, 10**9])
def test_blocks_in_memory_stay_within_the_budget(checkpoints, monkeypatch, tmp_path, budget):
    """Except for what the earliest step needs, which is read in any case."""
    used, needs = [], []
    next_block, set_schedule = DiskReader._next_block, DiskReader.set_schedule

    def recording(self):
        block = next_block(self)
        used.append(self._blocks._used_nbytes)
        return block

    def summing(self, schedule, stop):
        for step in range(schedule.num_steps):
            ranges = [one.byte_range[1] for one in schedule.element_ranges(step)]
            needs.append(sum(ranges) + 2 * 4096 * len(ranges))
        set_schedule(self, schedule, stop)

    monkeypatch.setattr(DiskReader, "_next_block", recording)
    monkeypatch.setattr(DiskReader, "set_schedule", summing)
    planned = plan(checkpoints(format="transformer-lens"), to="hf")
    with DiskReader(planned.info, budget, 4096) as reader:
        write(reader, planned, tmp_path, 4)
    assert max(needs) < planned.source_nbytes / 4
    assert 4096 < max(used) <= budget + max(needs)


@pytest.mark.parametrize("threads", [1, 4])
def test_what_is_not_in_the_schedule_is_read_too(checkpoints, threads):
    info = read_metadata(LocalFolder(checkpoints()))
    tensors = list(info.tensors.values())
    found: list[bool] = []

    def compare(reader, local):
        for tensor in tensors:
            count = tensor.nbytes // tensor.dtype.itemsize
            with (
                reader.read(tensor, 0, (count,)) as ours,
                local.read(tensor, 0, (count,)) as theirs,
            ):
                found.append(bool((ours == theirs).all()))

    with DiskReader(info) as reader, open_reader.LocalReader(info) as local:
        running = [threading.Thread(target=partial(compare, reader, local)) for _ in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    assert found == [True] * threads * len(tensors)


def refuse(error: int, times: int):
    """A `read_at` that fails from one call on."""
    calls = [0]

    def read_at(descriptor, views, offset):
        calls[0] += 1
        if calls[0] > times:
            raise OSError(error, os.strerror(error))
        return original(descriptor, views, offset)

    original = local_folder.read_at
    return read_at


@pytest.mark.parametrize("times", [0, 7])
def test_a_disk_that_cannot_be_read_ends_the_run(checkpoints, tmp_path, monkeypatch, times):
    planned = plan(checkpoints())
    monkeypatch.setattr(local_folder, "read_at", refuse(errno.EIO, times))
    with (
        pytest.raises(MachineError, match="Input/output error"),
        DiskReader(planned.info, 20_000, CELL) as reader,
    ):
        write(reader, planned, tmp_path, 3)
    assert not list((tmp_path / "out").iterdir())


def test_a_file_system_that_refuses_direct_reads_is_read_through_the_page_cache(
    checkpoints, tmp_path, monkeypatch, reads
):
    planned = plan(checkpoints())
    by_page_cache = expected(planned, tmp_path / "expected")
    refused = refuse(errno.EINVAL, 0)
    opened = LocalFile._opened_direct
    through = local_folder.read_at

    def read_at(descriptor, views, offset):
        reads_direct = descriptor in direct
        return (refused if reads_direct else through)(descriptor, views, offset)

    direct: set[int] = set()

    def opened_direct(self):
        direct.add(opened(self))
        return opened(self)

    monkeypatch.setattr(LocalFile, "_opened_direct", opened_direct)
    monkeypatch.setattr(local_folder, "read_at", read_at)
    reads["through"] = 0
    with DiskReader(planned.info, 20_000, CELL) as reader:
        write(reader, planned, tmp_path, 2)
    assert reads["through"] > 10
    assert digests(tmp_path / "out") == by_page_cache


def test_a_file_that_gets_shorter_ends_the_run(tiny, tmp_path):
    planned = plan(tiny)
    shard = next(tiny.glob("*.safetensors"))
    with DiskReader(planned.info, 0, CELL) as reader:
        reader._files.file(shard.name)
        os.truncate(shard, shard.stat().st_size // 3)
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            write(reader, planned, tmp_path, 2)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_its_threads_and_files_end_with_it(checkpoints):
    before = threading.active_count(), open_files()
    planned = plan(checkpoints())
    with DiskReader(planned.info) as reader:
        reader.set_schedule(disk_reader.ReadSchedule(0, lambda step: ()), threading.Event())
        for shard in planned.info.shards:
            file = reader._files.file(shard.name)
            assert isinstance(file, LocalFile)
            file._opened_direct()
        assert threading.active_count() > before[0]
    assert (threading.active_count(), open_files()) == before


@pytest.mark.parametrize("is_cold", [True, False])
def test_what_is_in_the_page_cache_is_read_from_there(tmp_path, is_cold):
    if os.major(tmp_path.stat().st_dev) == 0:
        pytest.skip("not on a disk")
    # Large, so that no probe has the system read ahead what the next one asks for.
    (tmp_path / "file").write_bytes(bytes(64 << 20))
    with open(tmp_path / "file", "rb") as opened:
        os.fsync(opened.fileno())
        if is_cold:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    file = LocalFolder(tmp_path).open("file")
    assert file.is_on_cold_disk() == is_cold
    file.close()


def test_other_file_systems_are_read_through_the_page_cache():
    in_memory = Path("/dev/shm/gptoss-stream-test")
    in_memory.write_bytes(bytes(100_000))
    file = LocalFolder(in_memory.parent).open(in_memory.name)
    try:
        assert not file.is_on_cold_disk()
    finally:
        file.close()
        in_memory.unlink()


@pytest.mark.parametrize("to", ["transformer-lens", "hf"])
@pytest.mark.parametrize("is_cold", [True, False])
def test_convert_and_verify_choose_the_reader(
    checkpoints, tmp_path, monkeypatch, to, is_cold, reads
):
    monkeypatch.setattr(LocalFile, "is_on_cold_disk", lambda self: is_cold)
    source = checkpoints()
    convert(source, tmp_path / "out", to=to)
    assert verify(source, tmp_path / "out").equal
    needed = plan(source, to=to).source_nbytes
    assert reads["past"] > needed if is_cold else reads["past"] == 0


@pytest.mark.parametrize("source", ["hf-mxfp4", "hf"])
@pytest.mark.parametrize("is_low", [True, False])
def test_floats_are_read_further_ahead_unless_memory_is_low(
    checkpoints, tmp_path, monkeypatch, source, is_low
):
    monkeypatch.setattr(LocalFile, "is_on_cold_disk", lambda self: True)
    monkeypatch.setattr(spill_file, "available_nbytes", lambda: 10**8 if is_low else 10**10)
    budgets, init = [], DiskReader.__init__

    def note(self, info, budget_nbytes):
        budgets.append(budget_nbytes >> 20)
        init(self, info, budget_nbytes)

    monkeypatch.setattr(DiskReader, "__init__", note)
    convert(checkpoints(format=source), tmp_path / "out", to="openai")
    assert budgets == [64 if source == "hf" and not is_low else 32]
