"""An output that goes to a store: few shards here at a time, and what has arrived stays there."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from memory_location import Memory
from runs import digests, shards_in

from gptoss_stream import convert
from gptoss_stream.errors import MachineError, OptionError, OutputError
from gptoss_stream.writing.uploads import Uploads

SHARD = "150KB"


@pytest.fixture
def near(checkpoints, tmp_path):
    convert(checkpoints(), tmp_path / "near", max_shard_size=SHARD)
    return digests(tmp_path / "near")


def send(checkpoints, store: Memory, staging: Path, **options):
    return convert(checkpoints(), store, **{"max_shard_size": SHARD, "staging": staging, **options})


def test_the_store_holds_what_a_folder_would_and_the_index_comes_last(checkpoints, near, tmp_path):
    store = Memory()
    send(checkpoints, store, tmp_path / "staging")
    assert store.sums == near
    assert store.puts[0] == ".gptoss_stream/run.json"
    assert store.puts[-1] == "model.safetensors.index.json"
    assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize("most", [1, 2, 3])
def test_few_shards_are_here_at_a_time(checkpoints, near, tmp_path, monkeypatch, most):
    """Also where a large transpose begins long before its shard, and a store is slow."""
    monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", 100_000)
    store, seen, over = Memory(), [], threading.Event()
    store.pause = 0.05

    def callbacks():
        while not over.wait(0.002):
            seen.append(len(shards_in(tmp_path / "staging")))

    watcher = threading.Thread(target=callbacks)
    watcher.start()
    try:
        send(checkpoints, store, tmp_path / "staging", max_staged=most)
    finally:
        over.set()
        watcher.join()
    assert store.sums == near
    assert max(seen) == most


def test_what_has_arrived_is_not_sent_again(checkpoints, near, tmp_path):
    store = Memory()
    store.fails_at = "model-00006-of-00011.safetensors"
    assert store.fails_at in near
    with pytest.raises(MachineError, match="the store is gone"):
        send(checkpoints, store, tmp_path / "here")
    arrived = [name for name in store.puts if name.endswith(".safetensors")]
    assert 1 < len(arrived) < 11  # shards are finished, and sent, in about their order
    assert store.fails_at not in arrived
    store.fails_at = None
    store.puts.clear()
    report = send(checkpoints, store, tmp_path / "elsewhere")
    assert store.sums == near
    assert not {*arrived} & {*store.puts}
    assert report.bytes_resumed == sum(len(store.files[name]) for name in arrived)


def test_what_was_finished_here_is_sent_and_not_made_again(checkpoints, near, tmp_path):
    store = Memory()
    store.fails_at = "model-00002-of-00011.safetensors"
    with pytest.raises(MachineError):
        send(checkpoints, store, tmp_path / "here", max_staged=3)
    staged = next((tmp_path / "here").iterdir())
    finished = [*staged.glob("*.safetensors")]
    assert finished
    times = {file.name: file.stat().st_mtime_ns for file in finished}
    store.fails_at = "model-00011-of-00011.safetensors"
    made = []
    put = store.put
    store.put = lambda files, sums: (
        made.extend(f.stat().st_mtime_ns == times[n] for n, f in files.items() if n in times),
        put(files, sums),
    )
    with pytest.raises(MachineError):
        send(checkpoints, store, tmp_path / "here", max_staged=3)
    assert made == [True] * len(times)


def test_a_finished_run_does_nothing(checkpoints, tmp_path):
    store = Memory()
    send(checkpoints, store, tmp_path)
    store.puts.clear()
    report = send(checkpoints, store, tmp_path)
    assert store.puts == []
    assert report.bytes_resumed == report.bytes_out


def test_a_file_that_got_lost_is_made_again(checkpoints, near, tmp_path):
    store = Memory()
    send(checkpoints, store, tmp_path)
    del store.files["model-00003-of-00011.safetensors"]
    del store.files["tl_config.json"]
    send(checkpoints, store, tmp_path)
    assert store.sums == near


def test_other_runs_and_foreign_files_are_refused(checkpoints, near, tmp_path):
    store = Memory()
    send(checkpoints, store, tmp_path)
    before = dict(store.files)
    with pytest.raises(OutputError, match="differs in dtype"):
        send(checkpoints, store, tmp_path, dtype="float32")
    assert store.files == before
    send(checkpoints, store, tmp_path, dtype="float32", overwrite=True)
    assert store.sums != near
    store.files["notes.txt"] = b"mine"
    with pytest.raises(OutputError, match=r"not this tool's \(notes\.txt\)"):
        send(checkpoints, store, tmp_path, overwrite=True)
    assert store.files["notes.txt"] == b"mine"


def test_checksums_are_those_of_a_folder(checkpoints, tmp_path):
    store = Memory()
    send(checkpoints, store, tmp_path / "staging", checksums=True)
    lines = store.files["SHA256SUMS"].decode().splitlines()
    listed = dict(reversed(line.split("  ")) for line in lines)
    assert listed == {n: d for n, d in store.sums.items() if n != "SHA256SUMS"}


def test_there_must_be_room_for_one_shard(checkpoints, tmp_path):
    with pytest.raises(OptionError, match="at least one"):
        send(checkpoints, Memory(), tmp_path, max_staged=0)


def test_waiting_for_room_ends_with_the_run(tmp_path):
    stop = threading.Event()
    with Uploads(Memory(), tmp_path, 1, lambda name: None) as uploads:
        uploads.start("one", stop)
        threading.Timer(0.05, stop.set).start()
        uploads.start("two", stop)
    assert stop.is_set()
