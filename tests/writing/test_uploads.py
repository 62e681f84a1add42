"""Shards on their way to a store: their order, how many there are, and how it ends."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
from memory_location import Memory
from runs import digests, time_limit

from gptoss_stream import convert
from gptoss_stream.errors import MachineError
from gptoss_stream.writing.uploads import Uploads

NEVER_STOP = threading.Event()


class Gated(Memory):
    """A store that takes nothing until its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.asked = threading.Event()

    def put(self, files, sums):
        if any(name.endswith(".safetensors") for name in files):
            files = {name: file.read_bytes() for name, file in files.items()}
            self.asked.set()
            self.gate.wait(20)
        super().put(files, sums)


@pytest.fixture
def near(checkpoints, tmp_path):
    convert(checkpoints(), tmp_path / "near", max_shard_size="150KB")
    return digests(tmp_path / "near")


def make(folder, uploads: Uploads, name: str) -> None:
    uploads.start(name, NEVER_STOP)
    (folder / name).write_text(name)
    uploads.add(name)


def wait_for(event: threading.Event) -> None:
    assert event.wait(10)


def test_files_are_sent_in_their_order_with_their_sums_and_deleted(tmp_path):
    store, asked = Memory(), []
    names = [f"{n}.safetensors" for n in range(20)]
    with Uploads(store, tmp_path, 3, asked.append) as uploads:
        for name in names:
            make(tmp_path, uploads, name)
        uploads.finish()
    assert store.puts == asked == names
    assert {n: d.decode() for n, d in store.files.items()} == {n: n for n in names}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("most", [1, 2, 5])
def test_there_are_never_more_than_the_most(tmp_path, most):
    """However many make them, and however fast these and the store are."""
    store, seen, chance = Memory(), [], random.Random(most)
    store.pause = 0.003

    def making(uploads, number):
        for n in range(10):
            name = f"{number}-{n}"
            uploads.start(name, NEVER_STOP)
            (tmp_path / name).write_text(name)
            seen.append(len([*tmp_path.iterdir()]))
            time.sleep(chance.uniform(0, 0.005))
            uploads.add(name)

    with Uploads(store, tmp_path, most, lambda name: None) as uploads:
        makers = [threading.Thread(target=making, args=(uploads, n)) for n in range(3)]
        for maker in makers:
            maker.start()
        for maker in makers:
            maker.join()
        uploads.finish()
    assert len(store.files) == 30
    assert max(seen) == most


def test_what_an_earlier_run_has_made_counts(tmp_path):
    store, begun = Gated(), threading.Event()
    for name in ("1.safetensors", "2.safetensors"):
        (tmp_path / name).write_text(name)
    with Uploads(store, tmp_path, 1, lambda name: None) as uploads:
        uploads.add_finished("1.safetensors")
        uploads.add_finished("2.safetensors")

        def begin():
            make(tmp_path, uploads, "3.safetensors")
            begun.set()

        threading.Thread(target=begin, daemon=True).start()
        assert not begun.wait(0.3)
        store.gate.set()
        wait_for(begun)
        uploads.finish()
    assert [name[0] for name in store.puts] == ["1", "2", "3"]


@pytest.mark.parametrize("where", ["begin", "finish"])
def test_what_the_store_raises_is_raised(tmp_path, where):
    store = Memory()
    store.fails_at = "b"
    with Uploads(store, tmp_path, 2 if where == "finish" else 1, lambda name: None) as uploads:
        make(tmp_path, uploads, "a")
        make(tmp_path, uploads, "b")
        with pytest.raises(MachineError, match="b: the store is gone"):
            uploads.finish() if where == "finish" else make(tmp_path, uploads, "c")
    assert [file.name for file in tmp_path.iterdir()] == ["b"]


def test_what_waits_at_the_end_stays_and_is_not_sent(tmp_path):
    """Also what was being sent: whether it arrived shows at the store."""
    store = Gated()
    with Uploads(store, tmp_path, 5, lambda name: None) as uploads:
        for n in range(3):
            make(tmp_path, uploads, f"{n}.safetensors")
        wait_for(store.asked)
    store.gate.set()
    time.sleep(0.2)
    assert store.puts == ["0.safetensors"]
    assert len([*tmp_path.iterdir()]) == 3


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("to", ["transformer-lens", "hf"])
def test_one_shard_here_and_everything_through_scratch_files(
    checkpoints, tmp_path, monkeypatch, workers, to
):
    """All transposes begin before their shards, and none waits for what waits for it."""
    monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", 1000)
    options = {"to": to, "max_shard_size": "60KB", "workers": workers}
    store = Memory()
    store.pause = 0.002
    with time_limit(20):
        convert(checkpoints(), tmp_path / "near", **options)
        convert(checkpoints(), store, staging=tmp_path / "here", max_staged=1, **options)
    assert store.sums == digests(tmp_path / "near")


def test_a_slow_store_slows_the_making(checkpoints, near, tmp_path):
    store, made, ahead = Memory(), [], []
    store.pause = 0.02

    def on_progress(nbytes):
        made.append(nbytes)
        sent = [len(data) for name, data in [*store.files.items()] if name in near]
        ahead.append(sum(made) - sum(sent))

    options = {"max_shard_size": "150KB", "staging": tmp_path / "here", "max_staged": 2}
    convert(checkpoints(), store, on_progress=on_progress, **options)
    assert store.sums == near
    assert max(ahead) <= 2 * max(map(len, store.files.values()))


def interrupt(checkpoints, store: Gated, staging, **options) -> None:
    """Begin a run, and press Ctrl-C when all wait for the store to take the first shard."""

    def press():
        wait_for(store.asked)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    # A command line that ran in this process before may have left another handler.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=press, daemon=True).start()
    try:
        with time_limit(8), pytest.raises(KeyboardInterrupt):
            convert(checkpoints(), store, max_shard_size="150KB", staging=staging, **options)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_an_interrupted_run_goes_on(checkpoints, near, tmp_path):
    store = Gated()
    interrupt(checkpoints, store, tmp_path / "here")
    assert [*store.files] == [".gptoss_stream/run.json"]
    store.gate.set()
    convert(checkpoints(), store, max_shard_size="150KB", staging=tmp_path / "here")
    assert store.sums == near
    assert list((tmp_path / "here").iterdir()) == []


def test_nothing_of_an_interrupted_run_arrives_during_the_next(checkpoints, near, tmp_path):
    """What is being sent when a run of this process is interrupted goes on being sent: the next
    run waits for it, since its shards have the same names."""
    store = Gated()
    interrupt(checkpoints, store, tmp_path / "here", dtype="float16")
    threading.Timer(0.5, store.gate.set).start()
    put, quick = Memory.put, []

    def put_at_once(files, sums):
        quick.append(files)
        put(store, files, sums)

    store.put = put_at_once
    convert(checkpoints(), store, max_shard_size="150KB", staging=tmp_path / "here", overwrite=True)
    time.sleep(1)
    assert quick
    assert store.sums == near
