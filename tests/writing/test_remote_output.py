"""Remote outputs: few shards are on the local disk at a time, and uploaded files are kept."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from memory_location import MemoryLocation
from runs import digests, shards_in

from gptoss_stream import convert
from gptoss_stream.errors import MachineError, OptionError, OutputError
from gptoss_stream.writing.uploads import Uploads

SIZE = "150KB"


@pytest.fixture
def local(checkpoints, tmp_path):
    """The checksums of the same output in a local folder."""
    convert(checkpoints(), tmp_path / "local", max_shard_size=SIZE)
    return digests(tmp_path / "local")


def upload(checkpoints, remote: MemoryLocation, staging: Path, **options):
    """Convert to a remote location."""
    return convert(checkpoints(), remote, **{"max_shard_size": SIZE, "staging": staging, **options})


def test_the_files_are_those_of_a_local_output_and_the_index_is_last(checkpoints, local, tmp_path):
    remote = MemoryLocation()
    upload(checkpoints, remote, tmp_path / "staging")
    assert remote.checksums == local
    assert remote.uploaded[0] == ".gptoss_stream/run.json"
    assert remote.uploaded[-1] == "model.safetensors.index.json"
    assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize("max_staged", [1, 2, 3])
def test_few_shards_are_staged_at_a_time(checkpoints, local, tmp_path, monkeypatch, max_staged):
    """Also if a large transposition begins long before its shard, and uploads are slow."""
    monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", 100_000)
    remote, counts, ended = MemoryLocation(), [], threading.Event()
    remote.pause = 0.05

    def watch():
        while not ended.wait(0.002):
            counts.append(len(shards_in(tmp_path / "staging")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        upload(checkpoints, remote, tmp_path / "staging", max_staged=max_staged)
    finally:
        ended.set()
        watcher.join()
    assert remote.checksums == local
    assert max(counts) == max_staged


def test_an_uploaded_shard_is_not_uploaded_again(checkpoints, local, tmp_path):
    remote = MemoryLocation()
    remote.fails_at = "model-00006-of-00011.safetensors"
    assert remote.fails_at in local
    with pytest.raises(MachineError, match="the connection is lost"):
        upload(checkpoints, remote, tmp_path / "staging", workers=1)
    arrived = [name for name in remote.uploaded if name.endswith(".safetensors")]
    assert arrived == [f"model-{number:05}-of-00011.safetensors" for number in range(1, 6)]
    remote.fails_at = None
    remote.uploaded.clear()
    report = upload(checkpoints, remote, tmp_path / "other-staging")
    assert remote.checksums == local
    assert not {*arrived} & {*remote.uploaded}
    assert report.bytes_resumed == sum(len(remote.files[name]) for name in arrived)


def test_a_staged_shard_is_uploaded_and_not_written_again(checkpoints, local, tmp_path):
    remote = MemoryLocation()
    remote.fails_at = "model-00002-of-00011.safetensors"
    with pytest.raises(MachineError):
        upload(checkpoints, remote, tmp_path / "staging", max_staged=3)
    staged = next((tmp_path / "staging").iterdir())
    finished = [*staged.glob("*.safetensors")]
    assert finished
    times = {file.name: file.stat().st_mtime_ns for file in finished}
    remote.fails_at = "model-00011-of-00011.safetensors"
    unchanged = []
    put = remote.put
    remote.put = lambda files, checksums: (
        unchanged.extend(f.stat().st_mtime_ns == times[n] for n, f in files.items() if n in times),
        put(files, checksums),
    )
    with pytest.raises(MachineError):
        upload(checkpoints, remote, tmp_path / "staging", max_staged=3)
    assert unchanged == [True] * len(times)


def test_a_finished_run_does_nothing(checkpoints, tmp_path):
    remote = MemoryLocation()
    upload(checkpoints, remote, tmp_path)
    remote.uploaded.clear()
    report = upload(checkpoints, remote, tmp_path)
    assert remote.uploaded == []
    assert report.bytes_resumed == report.bytes_out


def test_a_file_that_is_missing_is_written_again(checkpoints, local, tmp_path):
    remote = MemoryLocation()
    upload(checkpoints, remote, tmp_path)
    del remote.files["model-00003-of-00011.safetensors"]
    del remote.files["tl_config.json"]
    upload(checkpoints, remote, tmp_path)
    assert remote.checksums == local


def test_other_runs_and_foreign_files_are_refused(checkpoints, local, tmp_path):
    remote = MemoryLocation()
    upload(checkpoints, remote, tmp_path)
    before = dict(remote.files)
    with pytest.raises(OutputError, match="differs in dtype"):
        upload(checkpoints, remote, tmp_path, dtype="float32")
    assert remote.files == before
    upload(checkpoints, remote, tmp_path, dtype="float32", overwrite=True)
    assert remote.checksums != local
    remote.files["notes.txt"] = b"mine"
    with pytest.raises(OutputError, match=r"not this tool's \(notes\.txt\)"):
        upload(checkpoints, remote, tmp_path, overwrite=True)
    assert remote.files["notes.txt"] == b"mine"


def test_checksums_are_those_of_a_folder(checkpoints, tmp_path):
    remote = MemoryLocation()
    upload(checkpoints, remote, tmp_path / "staging", checksums=True)
    lines = remote.files["SHA256SUMS"].decode().splitlines()
    listed = dict(reversed(line.split("  ")) for line in lines)
    assert listed == {n: d for n, d in remote.checksums.items() if n != "SHA256SUMS"}


def test_at_least_one_shard_must_be_staged(checkpoints, tmp_path):
    with pytest.raises(OptionError, match="at least one"):
        upload(checkpoints, MemoryLocation(), tmp_path, max_staged=0)


def test_waiting_for_an_upload_ends_with_the_run(tmp_path):
    stop = threading.Event()
    with Uploads(MemoryLocation(), tmp_path, 1, lambda name: None) as uploads:
        uploads.start("one", stop)
        threading.Timer(0.05, stop.set).start()
        uploads.start("two", stop)
    assert stop.is_set()
