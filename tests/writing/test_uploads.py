"""Uploads of shards: their order, how many files are staged, and how they end."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
from memory_location import MemoryLocation
from runs import digests, time_limit

from gptoss_stream import convert
from gptoss_stream.errors import MachineError
from gptoss_stream.writing.remote_folder import RemoteFolder
from gptoss_stream.writing.uploads import Uploads

NEVER_STOP = threading.Event()


class GatedLocation(MemoryLocation):
    """A location whose uploads of shards wait until its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.waiting = threading.Event()

    def put(self, files, checksums):
        if any(name.endswith(".safetensors") for name in files):
            files = {name: file.read_bytes() for name, file in files.items()}
            self.waiting.set()
            self.gate.wait(20)
        super().put(files, checksums)


@pytest.fixture
def local(checkpoints, tmp_path):
    """The checksums of the same output in a local folder."""
    convert(checkpoints(), tmp_path / "local", max_shard_size="150KB")
    return digests(tmp_path / "local")


def write_file(folder, uploads: Uploads, name: str) -> None:
    """Write a file that is then uploaded."""
    uploads.start(name, NEVER_STOP)
    (folder / name).write_text(name)
    uploads.add(name)


def wait_for(event: threading.Event) -> None:
    assert event.wait(10)


def test_files_are_uploaded_in_order_with_their_checksums_and_deleted(tmp_path):
    remote, requested = MemoryLocation(), []
    names = [f"{n}.safetensors" for n in range(20)]
    with Uploads(RemoteFolder(remote), tmp_path, 3, requested.append) as uploads:
        for name in names:
            write_file(tmp_path, uploads, name)
        uploads.finish()
    assert remote.uploaded == requested == names
    assert {n: d.decode() for n, d in remote.files.items()} == {n: n for n in names}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("max_staged", [1, 2, 5])
def test_the_limit_of_staged_files_is_kept(tmp_path, max_staged):
    """With several writing threads, and random speeds of writing."""
    remote, counts, chance = MemoryLocation(), [], random.Random(max_staged)
    remote.pause = 0.003

    def write_files(uploads, number):
        for n in range(10):
            name = f"{number}-{n}"
            uploads.start(name, NEVER_STOP)
            (tmp_path / name).write_text(name)
            counts.append(len([*tmp_path.iterdir()]))
            time.sleep(chance.uniform(0, 0.005))
            uploads.add(name)

    with Uploads(RemoteFolder(remote), tmp_path, max_staged, lambda name: None) as uploads:
        writers = [threading.Thread(target=write_files, args=(uploads, n)) for n in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        uploads.finish()
    assert len(remote.files) == 30
    assert max(counts) == max_staged


def test_files_of_an_earlier_run_count(tmp_path):
    """A new file is not started while two finished files exceed the limit of one."""
    remote, started = GatedLocation(), threading.Event()
    for name in ("1.safetensors", "2.safetensors"):
        (tmp_path / name).write_text(name)
    with Uploads(RemoteFolder(remote), tmp_path, 1, lambda name: None) as uploads:
        uploads.add_finished("1.safetensors")
        uploads.add_finished("2.safetensors")

        def write_third():
            write_file(tmp_path, uploads, "3.safetensors")
            started.set()

        threading.Thread(target=write_third, daemon=True).start()
        assert not started.wait(0.3)
        remote.gate.set()
        wait_for(started)
        uploads.finish()
    assert [name[0] for name in remote.uploaded] == ["1", "2", "3"]


@pytest.mark.parametrize("where", ["start", "finish"])
def test_an_error_of_an_upload_is_raised(tmp_path, where):
    remote = MemoryLocation()
    remote.fails_at = "b"
    with Uploads(
        RemoteFolder(remote), tmp_path, 2 if where == "finish" else 1, lambda name: None
    ) as uploads:
        RemoteFolder(remote), tmp_path, 2 if where == "finish" else 1, lambda name: None
        write_file(tmp_path, uploads, "b")
        with pytest.raises(MachineError, match="b: the connection is lost"):
            uploads.finish() if where == "finish" else write_file(tmp_path, uploads, "c")
    assert [file.name for file in tmp_path.iterdir()] == ["b"]


def test_files_that_wait_at_the_end_are_kept_and_not_uploaded(tmp_path):
    """Also the file that is being uploaded: the next run sees whether it has arrived."""
    remote = GatedLocation()
    with Uploads(RemoteFolder(remote), tmp_path, 5, lambda name: None) as uploads:
        for n in range(3):
            write_file(tmp_path, uploads, f"{n}.safetensors")
        wait_for(remote.waiting)
    remote.gate.set()
    time.sleep(0.2)
    assert remote.uploaded == ["0.safetensors"]
    assert len([*tmp_path.iterdir()]) == 3


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("to", ["transformer-lens", "hf"])
def test_one_staged_shard_and_every_transposition_spilled(
    checkpoints, tmp_path, monkeypatch, workers, to
):
    """Transpositions begin before their shards, and no two threads wait for each other."""
    monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", 1000)
    options = {"to": to, "max_shard_size": "60KB", "workers": workers}
    remote = MemoryLocation()
    remote.pause = 0.002
    with time_limit(20):
        convert(checkpoints(), tmp_path / "local", **options)
        convert(checkpoints(), remote, staging=tmp_path / "staging", max_staged=1, **options)
    assert remote.checksums == digests(tmp_path / "local")


def test_slow_uploads_slow_the_conversion_down(checkpoints, local, tmp_path):
    remote, written, ahead = MemoryLocation(), [], []
    remote.pause = 0.02

    def on_progress(nbytes):
        written.append(nbytes)
        uploaded = [len(data) for name, data in [*remote.files.items()] if name in local]
        ahead.append(sum(written) - sum(uploaded))

    options = {"max_shard_size": "150KB", "staging": tmp_path / "staging", "max_staged": 2}
    convert(checkpoints(), remote, on_progress=on_progress, **options)
    assert remote.checksums == local
    assert max(ahead) <= 2 * max(map(len, remote.files.values()))


def interrupt(checkpoints, remote: GatedLocation, staging, **options) -> None:
    """Start a run, and send SIGINT when all threads wait for the upload of the first shard."""

    def send_signal():
        wait_for(remote.waiting)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    # An earlier command line in this process may have set another handler.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=send_signal, daemon=True).start()
    try:
        with time_limit(8), pytest.raises(KeyboardInterrupt):
            convert(checkpoints(), remote, max_shard_size="150KB", staging=staging, **options)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_an_interrupted_run_resumes(checkpoints, local, tmp_path):
    remote = GatedLocation()
    interrupt(checkpoints, remote, tmp_path / "staging")
    assert [*remote.files] == [".gptoss_stream/run.json"]
    remote.gate.set()
    convert(checkpoints(), remote, max_shard_size="150KB", staging=tmp_path / "staging")
    assert remote.checksums == local
    assert list((tmp_path / "staging").iterdir()) == []


def test_no_upload_of_an_interrupted_run_ends_during_the_next(checkpoints, local, tmp_path):
    """An upload continues when its run is interrupted, and the next run in this process waits for
    it, since its shards have the same names."""
    remote = GatedLocation()
    interrupt(checkpoints, remote, tmp_path / "staging", dtype="float16")
    threading.Timer(0.5, remote.gate.set).start()
    put, later = MemoryLocation.put, []

    def put_at_once(files, checksums):
        later.append(files)
        put(remote, files, checksums)

    remote.put = put_at_once
    convert(
        checkpoints(), remote, max_shard_size="150KB", staging=tmp_path / "staging", overwrite=True
    )
    time.sleep(1)
    assert later
    assert remote.checksums == local
