"""Reading by blocks, from a place of this machine that is taken for a far one."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from runs import digests

from gptoss_stream import Selection, convert, formats, plan, verify
from gptoss_stream.checkpoint.remote_reader import RemoteReader
from gptoss_stream.errors import CheckpointError, MachineError
from gptoss_stream.storage.local_folder import LocalFolder
from gptoss_stream.writing.executor import Callbacks
from gptoss_stream.writing.thread_executor import ThreadExecutor

PACKED = ("hf-mxfp4", "openai")
PAIRS = [(a, b) for a in formats.names() for b in formats.names() if b not in PACKED or a in PACKED]


class Far(LocalFolder):
    """A folder that is read as if it were far away, and counts what is read of it."""

    is_local = False

    def __init__(self, path, fails_at: int | None = None) -> None:
        super().__init__(path)
        self.reads: Counter[tuple[str, int]] = Counter()
        self.requests = 0
        self.fails_at = fails_at
        self.counting = threading.Lock()

    def open(self, name):
        return FarFile(self, super().open(name))

    @property
    def nbytes(self) -> int:
        return sum(nbytes * times for (_, nbytes), times in self.reads.items())


class FarFile:
    def __init__(self, location: Far, file) -> None:
        self.location, self.file, self.info = location, file, file.info

    def read_into(self, out, at, stop):
        with self.location.counting:
            self.location.requests += 1
            self.location.reads[self.info.name, len(out)] += 1
            if (
                self.location.fails_at is not None
                and self.location.requests > self.location.fails_at
            ):
                raise MachineError(f"{self.info.name}: the network is gone")
        self.file.read_into(out, at, stop)

    def check_unchanged(self):
        self.file.check_unchanged()

    def close(self):
        self.file.close()


@pytest.mark.parametrize(("source", "to"), PAIRS)
@pytest.mark.parametrize("workers", [1, 3])
def test_the_output_is_that_of_a_local_source(checkpoints, tmp_path, source, to, workers):
    checkpoint = checkpoints(format=source)
    convert(checkpoint, tmp_path / "near", to=to, max_shard_size="300KB")
    far = Far(checkpoint)
    convert(far, tmp_path / "far", to=to, max_shard_size="300KB", workers=workers)
    assert digests(tmp_path / "far", "*.safetensors") == digests(tmp_path / "near", "*.safetensors")


def test_every_byte_is_read_once(checkpoints, tmp_path):
    far = Far(checkpoints(max_shard_size="200KB"))
    needed = plan(far).source_nbytes
    before = far.nbytes
    convert(far, tmp_path / "out")
    assert needed <= far.nbytes - 2 * before <= 1.02 * needed + 1000


def test_a_part_of_the_model_needs_a_part_of_the_bytes(checkpoints, tmp_path):
    far = Far(checkpoints())
    chosen = Selection(layers="1", only=("router", "norms"))
    needed = plan(far, selection=chosen).source_nbytes
    before = far.nbytes
    convert(far, tmp_path / "out", selection=chosen)
    assert needed < 20_000
    assert needed <= far.nbytes - 2 * before <= 1.02 * needed + 1000


@pytest.mark.parametrize("room", [0, 20_000, 10**9])
def test_no_more_is_held_than_there_is_room_for(checkpoints, monkeypatch, tmp_path, room):
    """Beside what a step needs, which is had in any case."""
    held: list[int] = []
    take = RemoteReader._take

    def taking(self):
        taken = take(self)
        held.append(self._held)
        return taken

    monkeypatch.setattr(RemoteReader, "_take", taking)
    planned = plan(Far(checkpoints()))
    for folder in ("parts", "out"):
        (tmp_path / folder).mkdir()
    block, chunk = 4096, 8192
    with RemoteReader(planned.info, room, block) as reader:
        executor = ThreadExecutor(reader, 2, chunk_nbytes=chunk)
        executor.write_shards(planned.shards, tmp_path / "out", tmp_path / "parts", Callbacks())
        assert reader._held == 0, "what was read is still held"
    convert(checkpoints(), tmp_path / "near")
    assert digests(tmp_path / "out") == digests(tmp_path / "near", "*.safetensors")
    total = planned.source_nbytes
    if room < total:
        assert total / 20 < max(held) < max(room, total / 3)
    else:
        assert max(held) > total / 3


def test_verify_reads_a_far_source(checkpoints, tmp_path):
    convert(checkpoints(), tmp_path / "out")
    assert verify(Far(checkpoints()), tmp_path / "out").equal


@pytest.mark.parametrize("fails_at", [5, 7, 9, 12])
def test_a_network_that_fails_ends_the_run_and_nothing_is_lost(checkpoints, tmp_path, fails_at):
    checkpoint = checkpoints(max_shard_size="100KB")
    options = {"max_shard_size": "150KB"}
    with pytest.raises(MachineError, match="the network is gone"):
        convert(Far(checkpoint, fails_at), tmp_path / "out", **options)
    convert(Far(checkpoint), tmp_path / "out", **options)
    assert verify(checkpoint, tmp_path / "out").equal


def test_a_file_that_changes_ends_the_run(tiny, tmp_path):
    shard = next(tiny.glob("*.safetensors"))
    data = shard.read_bytes()

    def change(nbytes):
        shard.write_bytes(data[:-1] + b"\0")

    with pytest.raises(CheckpointError, match="changed while it was being read"):
        convert(Far(tiny), tmp_path / "out", on_progress=change)
    assert not list((tmp_path / "out").glob("*.safetensors"))
