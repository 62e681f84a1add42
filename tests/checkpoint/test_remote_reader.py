"""The remote reader, over a local folder that says it is remote."""

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

MXFP4_FORMATS = ("hf-mxfp4", "openai")
PAIRS = [
    (a, b)
    for a in formats.names()
    for b in formats.names()
    if b not in MXFP4_FORMATS or a in MXFP4_FORMATS
]


class RemoteFolder(LocalFolder):
    """A local folder that is read as if it were remote. It counts what is read from it."""

    is_local = False

    def __init__(self, path, fails_at: int | None = None) -> None:
        super().__init__(path)
        self.reads: Counter[tuple[str, int]] = Counter()
        self.requests = 0
        self.fails_at = fails_at
        self.counting = threading.Lock()

    def open(self, name):
        return RemoteFile(self, super().open(name))

    @property
    def nbytes(self) -> int:
        return sum(nbytes * times for (_, nbytes), times in self.reads.items())


class RemoteFile:
    def __init__(self, location: RemoteFolder, file) -> None:
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
    convert(checkpoint, tmp_path / "local", to=to, max_shard_size="300KB")
    remote = RemoteFolder(checkpoint)
    convert(remote, tmp_path / "remote", to=to, max_shard_size="300KB", workers=workers)
    assert digests(tmp_path / "remote", "*.safetensors") == digests(
        tmp_path / "local", "*.safetensors"
    )


def test_every_byte_is_read_once(checkpoints, tmp_path):
    remote = RemoteFolder(checkpoints(max_shard_size="200KB"))
    needed = plan(remote).source_nbytes
    before = remote.nbytes
    convert(remote, tmp_path / "out")
    assert needed <= remote.nbytes - 2 * before <= 1.02 * needed + 1000


def test_a_selection_reads_only_the_bytes_that_it_needs(checkpoints, tmp_path):
    remote = RemoteFolder(checkpoints())
    chosen = Selection(layers="1", only=("router", "norms"))
    needed = plan(remote, selection=chosen).source_nbytes
    before = remote.nbytes
    convert(remote, tmp_path / "out", selection=chosen)
    assert needed < 20_000
    assert needed <= remote.nbytes - 2 * before <= 1.02 * needed + 1000


@pytest.mark.parametrize("budget", [0, 20_000, 10**9])
def test_blocks_in_memory_stay_within_the_budget(checkpoints, monkeypatch, tmp_path, budget):
    """Except for what a step needs, which is fetched in any case."""
    used: list[int] = []
    next_fetch = RemoteReader._next_fetch

    def recording(self):
        fetch = next_fetch(self)
        used.append(self._used_nbytes)
        return fetch

    monkeypatch.setattr(RemoteReader, "_next_fetch", recording)
    planned = plan(RemoteFolder(checkpoints()))
    for folder in ("parts", "out"):
        (tmp_path / folder).mkdir()
    block, chunk = 4096, 8192
    with RemoteReader(planned.info, budget, block) as reader:
        executor = ThreadExecutor(reader, 2, chunk_nbytes=chunk)
        executor.write_shards(planned.shards, tmp_path / "out", tmp_path / "parts", Callbacks())
        assert reader._used_nbytes == 0, "a block was not dropped"
    convert(checkpoints(), tmp_path / "local")
    assert digests(tmp_path / "out") == digests(tmp_path / "local", "*.safetensors")
    total = planned.source_nbytes
    if budget < total:
        assert total / 20 < max(used) < max(budget, total / 3)
    else:
        assert max(used) > total / 3


def test_verify_reads_a_remote_source(checkpoints, tmp_path):
    convert(checkpoints(), tmp_path / "out")
    assert verify(RemoteFolder(checkpoints()), tmp_path / "out").equal


@pytest.mark.parametrize("fails_at", [5, 7, 9, 12])
def test_a_failing_network_ends_the_run_which_can_be_resumed(checkpoints, tmp_path, fails_at):
    checkpoint = checkpoints(max_shard_size="100KB")
    options = {"max_shard_size": "150KB"}
    with pytest.raises(MachineError, match="the network is gone"):
        convert(RemoteFolder(checkpoint, fails_at), tmp_path / "out", **options)
    convert(RemoteFolder(checkpoint), tmp_path / "out", **options)
    assert verify(checkpoint, tmp_path / "out").equal


def test_a_file_that_changes_ends_the_run(tiny, tmp_path):
    shard = next(tiny.glob("*.safetensors"))
    data = shard.read_bytes()

    def change(nbytes):
        shard.write_bytes(data[:-1] + b"\0")

    with pytest.raises(CheckpointError, match="changed while it was being read"):
        convert(RemoteFolder(tiny), tmp_path / "out", on_progress=change)
    assert not list((tmp_path / "out").glob("*.safetensors"))
