"""Reading a remote checkpoint in any order: failing servers, closing, forks, and the disk cache."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
import weakref
from contextlib import suppress
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from large_server import (
    DATA,
    EXPERT,
    MIB,
    NAME,
    Gate,
    assert_nothing_twice,
    in_threads,
    info_of,
    large,
    nbytes_of,
    online,
    ranges_of,
    read_expert,
    read_tile,
    server,
    settle,
    traffic,
)
from loopback import FileServer, short, status, without
from runs import time_limit, wait_for
from stand_in_hub import StandInHub

from gptoss_stream.checkpoint.block_reader import BlockReader
from gptoss_stream.checkpoint.metadata import CheckpointInfo, read_header
from gptoss_stream.errors import CheckpointError, MachineError
from gptoss_stream.storage.block_cache import BlockCache
from gptoss_stream.storage.hub import HubRepository

__all__ = ["large", "online", "server"]  # fixtures
pytestmark = pytest.mark.usefixtures("online")
SECRET = "tHeSeCrEtOfIt"
LARGE = 10_000 * MIB
"""A bound of the cache at which threads do not look for what to delete: while one does, blocks of
others are not kept."""


@pytest.fixture
def copied(large, tmp_path):
    """The file in a folder of its own, which the test may change."""
    shutil.copytree(large.folder, tmp_path / "copied")
    return SimpleNamespace(folder=tmp_path / "copied", data=large.data)


# ---------------------------------------------------------------------------------- failing servers


@pytest.mark.parametrize(
    ("fault", "error"), [(status(503), MachineError), (status(404), CheckpointError)]
)
def test_an_error_does_not_last(server, large, fault, error):
    """Of a read, and of a prefetch that nobody has waited for."""
    with BlockReader(info_of(server)) as reader:
        server.spoil(DATA, fault)
        with reader.prefetch(ranges_of(reader.info, 0)):
            settle(server)
        raised = in_threads(*[lambda: read_tile(reader, large, "blocks", 0, 0)] * 3)
        assert [type(one) for one in raised] == [error] * 3
        with pytest.raises(error, match=NAME):
            read_tile(reader, large, "blocks", 1, 0)
        server.mend()
        for expert in range(2):
            read_expert(reader, large, expert)


def test_a_broken_connection_is_resumed(server, large):
    info = info_of(server)
    server.spoil(DATA, short, times=3)
    with BlockReader(info) as reader:
        read_expert(reader, large, 0)


def test_only_the_request_that_fails_fails(server, large):
    info = info_of(server)
    server.spoil(DATA, status(404), times=1)
    with BlockReader(info) as reader:
        with pytest.raises(CheckpointError):
            read_tile(reader, large, "blocks", 0, 0)
        read_tile(reader, large, "blocks", 1, 0)
        read_tile(reader, large, "blocks", 0, 0)


def test_a_file_that_changes(copied):
    file = copied.folder / NAME
    with FileServer(copied.folder) as server, BlockReader(info_of(server)) as reader:
        read_tile(reader, copied, "blocks", 0, 0)
        before = file.stat().st_mtime_ns
        os.utime(file, ns=(before, before + 1))
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            read_tile(reader, copied, "blocks", 2, 0)
        with pytest.raises(CheckpointError, match="changed"):
            reader.check_unchanged()
        os.utime(file, ns=(before, before))
        read_tile(reader, copied, "blocks", 2, 0)
        reader.check_unchanged()


# ------------------------------------------------------------------------------------------ closing


def test_closing_does_not_wait_for_the_server(server, large):
    info, gate = info_of(server), Gate()
    server.spoil(DATA, gate)
    reader = BlockReader(info)
    raised: list[BaseException] = []

    def read() -> None:
        try:
            read_tile(reader, large, "blocks", 0, 0)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    gate.wait_for(1)
    reader.prefetch(ranges_of(info, 1, 2))
    begin = time.monotonic()
    with reader:
        pass
    for thread in threads:
        thread.join(20)
    assert time.monotonic() - begin < 20  # the server waits longer
    assert [type(error) for error in raised] == [MachineError] * 2
    assert "closed" in str(raised[0])
    gate.opened.set()
    settle(server)
    before = len(traffic(server))
    with pytest.raises(MachineError, match="closed"):
        read_tile(reader, large, "blocks", 2, 0)
    reader.prefetch(ranges_of(info, 0, 3))
    settle(server)
    assert len(traffic(server)) == before, "a closed reader sent requests"
    assert not reader._blocks._read
    assert not reader._blocks._unread


def fetching() -> list[str]:
    """Return the names of threads that fetch blocks."""
    return [thread.name for thread in threading.enumerate() if "_fetch_all" in thread.name]


def test_closing_at_rest_does_not_wait(server, large, monkeypatch):
    monkeypatch.setattr("gptoss_stream.checkpoint.block_fetcher._CLOSING_SECONDS", 60.0)
    with BlockReader(info_of(server)) as reader:
        read_expert(reader, large, 0)
        begin = time.monotonic()
    assert time.monotonic() - begin < 30
    assert fetching() == []


# -------------------------------------------------------------------------------------------- forks


def test_a_child_reads_while_its_parent_waits_with_a_lock(server, large):
    info, gate = info_of(server), Gate()
    server.spoil(DATA, gate, times=1)
    with BlockReader(info) as reader:
        reader.prefetch(ranges_of(info, 0))
        gate.wait_for(1)
        with reader._blocks._lock, reader._blocks._source._files._opening:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    with time_limit(10):
                        read_expert(reader, large, 0)
                        read_tile(reader, large, "blocks", 1, 0)
                    code = 0
                finally:
                    os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        gate.opened.set()
        read_expert(reader, large, 0)


def test_a_child_forked_within_a_prefetch_can_end_it(server, large):
    info, gate = info_of(server), Gate()
    server.spoil(DATA, gate, times=1)
    with BlockReader(info) as reader, reader.prefetch(ranges_of(info, 0)) as prefetch:
        gate.wait_for(1)
        with reader._blocks._lock:  # as another thread might hold it
            child = os.fork()
            if child == 0:
                with suppress(BaseException), time_limit(10):
                    prefetch.close()
                    read_expert(reader, large, 0)
                    os._exit(0)
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        gate.opened.set()


def test_threads_that_cannot_be_started_are_an_error(server, large, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with BlockReader(info_of(server)) as reader:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(MachineError, match="can't start new thread"):
                read_tile(reader, large, "blocks", 0, 0)
        read_tile(reader, large, "blocks", 0, 0)


def test_a_reader_is_freed_without_being_closed(server, large):
    reader = BlockReader(info_of(server))
    read_tile(reader, large, "blocks", 0, 0)
    freed = weakref.ref(reader)
    del reader
    gc.collect()
    assert freed() is None


# -------------------------------------------------------------------------------- the cache on disk


def wait_until_cached() -> None:
    """Wait until blocks are on the disk, for which a reader that is closed waits a second only."""
    wait_for(lambda: not fetching())


def test_a_second_reader_needs_no_request(server, large, tmp_path):
    for turn in range(2):
        info, cache = info_of(server), BlockCache(tmp_path / "cache", LARGE)
        with BlockReader(info, cache=cache) as reader, reader.prefetch(ranges_of(info, 1)):
            read_expert(reader, large, 1)
        wait_until_cached()
        assert len(traffic(server)) == (2 if turn == 0 else 0)


def test_damaged_blocks_are_fetched_again(server, large, tmp_path):
    cache = BlockCache(tmp_path / "cache", LARGE)
    with BlockReader(info_of(server), cache=cache) as reader:
        read_expert(reader, large, 0)
    settle(server)
    files = sorted((tmp_path / "cache").glob("*.block"))
    for number, file in enumerate(files):
        if number % 3 == 0:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data[: -(number % 2) or None])
    info = info_of(server)
    with BlockReader(info, cache=cache) as reader, reader.prefetch(ranges_of(info, 0)):
        read_expert(reader, large, 0)
    assert_nothing_twice(server)
    assert nbytes_of(server) <= -(-len(files) // 3) * MIB
    server.requests.clear()
    with BlockReader(info, cache=cache) as reader:
        read_expert(reader, large, 0)
    assert traffic(server) == []


def test_another_version_is_not_taken_from_the_cache(copied, tmp_path):
    cache, file = BlockCache(tmp_path / "cache", LARGE), copied.folder / NAME
    with FileServer(copied.folder) as server:
        with BlockReader(info_of(server), cache=cache) as reader:
            read_tile(reader, copied, "blocks", 0, 0)
        data = bytearray(file.read_bytes())
        at = len(data) - sum(EXPERT.values()) * 3
        data[at] ^= 255
        file.write_bytes(data)
        changed = copied.data["blocks"].copy()
        changed[0, 0, 0, 0] ^= 255
        with BlockReader(info_of(server), cache=cache) as reader:
            read_tile(reader, SimpleNamespace(data={"blocks": changed}), "blocks", 0, 0)


def test_without_a_version_nothing_is_cached(server, large, tmp_path):
    server.spoil("HEAD", without("ETag"))
    cache = BlockCache(tmp_path / "cache", LARGE)
    with BlockReader(info_of(server), cache=cache) as reader:
        read_tile(reader, large, "blocks", 0, 0)
    assert not list((tmp_path / "cache").glob("*.block"))


def test_no_secret_is_in_the_cache(server, large, tmp_path, monkeypatch):
    cache, keys = BlockCache(tmp_path / "cache", LARGE), []
    put = BlockCache.put
    monkeypatch.setattr(BlockCache, "put", lambda *a: keys.append(a[1]) or put(*a))
    with BlockReader(info_of(server, f"?token={SECRET}"), cache=cache) as reader:
        read_tile(reader, large, "blocks", 0, 0)
    assert all(request.query == f"token={SECRET}" for request in server.requests)
    assert keys
    assert not any(SECRET in key for key in keys)


def test_a_cache_that_cannot_be_written_does_not_matter(server, large, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    cache = BlockCache(tmp_path / "file" / "cache", 100 * MIB)
    with BlockReader(info_of(server), cache=cache) as reader:
        read_expert(reader, large, 0)


def test_a_repository_of_the_hub(large, tmp_path, monkeypatch):
    with StandInHub() as hub:
        hub.add_folder("openai/large", large.folder)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        location = HubRepository.to_read(
            "openai/large", revision=None, subfolder=None, token=None, download=False
        )
        shard, tensors, _ = read_header(location, NAME)
        info = CheckpointInfo(location, {}, (shard,), tensors)
        for turn in range(2):
            hub.reset_counts()
            cache = BlockCache(tmp_path / "cache", LARGE)
            with BlockReader(info, cache=cache) as reader, reader.prefetch(ranges_of(info, 1)):
                read_expert(reader, large, 1)
            wait_until_cached()
            sent = [r for r in hub.requests if r.method == "GET" and r.range]
            assert len(sent) == (2 if turn == 0 else 0)
