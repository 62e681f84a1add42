"""The blocks on disk: only what was written is ever read, within a bound, whatever happens."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from subprocess import Popen

import pytest
from disks import remount, tmpfs
from memory_location import MemoryLocation
from runs import started, wait_until

from gptoss_stream.storage import block_cache
from gptoss_stream.storage.block_cache import BlockCache, block_key, default_cache_folder
from gptoss_stream.storage.http_folder import HttpFolder
from gptoss_stream.storage.location import FileInfo
from gptoss_stream.storage.object_store import ObjectStore

BLOCK = 4096
FILE = BLOCK + 16
BOUND = 64 * FILE
SECRET = "tHeSeCrEtOfIt"


def content(key: str) -> bytes:
    return (key * BLOCK)[:BLOCK].encode()


def blocks(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.block"))


def nbytes_in(folder: Path) -> int:
    """The size of all files, of which some may vanish meanwhile."""
    total = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            total += entry.stat().st_size
    return total


@pytest.fixture
def cache(tmp_path):
    return BlockCache(tmp_path / "cache", BOUND)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


# ------------------------------------------------------------------------------------- right bytes


def test_a_block_is_read_as_it_was_written_also_by_others(cache, folder):
    assert cache.get("a", BLOCK) is None
    cache.put("a", content("a"))
    cache.put("b", memoryview(content("b")))
    assert cache.get("a", BLOCK) == content("a")
    assert BlockCache(folder, BOUND).get("b", BLOCK) == content("b")
    assert cache.get("c", BLOCK) is None
    assert [path.stat().st_size for path in blocks(folder)] == [FILE, FILE]


@pytest.mark.parametrize("at", [0, BLOCK // 2, BLOCK - 1, BLOCK, FILE - 1])
def test_a_flipped_bit_is_found(cache, folder, at):
    cache.put("a", content("a"))
    (path,) = blocks(folder)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert cache.get("a", BLOCK) is None
    assert blocks(folder) == [], "a damaged block was kept"
    cache.put("a", content("a"))
    assert cache.get("a", BLOCK) == content("a")


@pytest.mark.parametrize("nbytes", [0, 1, 16, BLOCK - 1, BLOCK, FILE - 1, FILE + 1, 2 * FILE])
def test_a_file_of_another_size_is_no_block(cache, folder, nbytes):
    cache.put("a", content("a"))
    (path,) = blocks(folder)
    path.write_bytes((path.read_bytes() * 2)[:nbytes])
    assert cache.get("a", BLOCK) is None
    assert blocks(folder) == []


def test_zeros_after_a_power_loss_are_no_block(cache, folder):
    cache.put("a", content("a"))
    (path,) = blocks(folder)
    path.write_bytes(bytes(FILE))
    assert cache.get("a", BLOCK) is None


def test_a_block_under_the_name_of_another_is_not_read(cache, folder):
    cache.put("a", content("a"))
    (first,) = blocks(folder)
    cache.put("b", content("b"))
    (second,) = {*blocks(folder)} - {first}
    first.rename(second)
    assert cache.get("b", BLOCK) is None


# -------------------------------------------------------------------------------------------- keys


def test_a_key_is_of_one_block_of_one_version():
    location, others = HttpFolder("http://host/a"), HttpFolder("http://host/b")
    info = FileInfo("x", 100, '"1"')
    keys = [
        block_key(location, info, 0, 10),
        block_key(location, info, 10, 10),
        block_key(location, info, 0, 11),
        block_key(location, FileInfo("y", 100, '"1"'), 0, 10),
        block_key(location, FileInfo("x", 101, '"1"'), 0, 10),
        block_key(location, FileInfo("x", 100, '"2"'), 0, 10),
        block_key(others, info, 0, 10),
    ]
    assert None not in keys
    assert len({*keys}) == len(keys)
    assert block_key(HttpFolder("http://host/a/"), info, 0, 10) == keys[0]


@pytest.mark.parametrize(
    "version",
    ['"5f-62"', "0" * 39 + "1", "d41d8cd98f00b204e9800998ecf8427e", "CJ2Nqv7d5fwCEAE=", "0x8DC"],
)
def test_a_strong_version_identifies_a_block(version):
    assert block_key(MemoryLocation(), FileInfo("x", 100, version), 0, 10) is not None


@pytest.mark.parametrize(
    "version",
    ["", 'W/"5f-62"', "Wed, 21 Oct 2015 07:28:00 GMT", "2024-01-01 00:00:00+00:00", "1700000000.5",
     1700000000, "20240101120000", "2024-01-01"],
)  # fmt: skip
def test_an_unknown_version_or_a_time_does_not(version):
    assert block_key(MemoryLocation(), FileInfo("x", 100, version), 0, 10) is None


def test_no_secret_is_in_a_key():
    info = FileInfo("x", 100, '"1"')
    for location in (
        HttpFolder(f"http://me:{SECRET}@host/a?token={SECRET}"),
        ObjectStore(f"memory://me:{SECRET}@host/a?token={SECRET}"),
    ):
        key = block_key(location, info, 0, 10)
        assert key is not None
        assert SECRET not in key


def test_the_default_folder_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_folder() == tmp_path / "xdg" / "gptoss_stream" / "blocks"
    for ignored in ("", "relative"):  # as the specification demands
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_cache_folder() == tmp_path / ".cache" / "gptoss_stream" / "blocks"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder() == tmp_path / ".cache" / "gptoss_stream" / "blocks"


def test_only_the_user_may_access_the_folder(tmp_path):
    new, existing = tmp_path / "a" / "new", tmp_path / "existing"
    existing.mkdir(mode=0o775)
    existing.chmod(0o775)
    for folder in (new, existing):
        BlockCache(folder, BOUND).put("a", content("a"))
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o077 for path in folder.iterdir()} == {0}


# ---------------------------------------------------------------------------------------- the bound


def test_the_least_recently_used_blocks_are_deleted(cache, folder):
    keys = [f"key {i}" for i in range(200)]
    for turn, key in enumerate(keys):
        cache.put(key, content(key))
        os.utime(cache._path(key), (turn, turn))
        assert cache.get("key 0", BLOCK) is not None, "a block in use was deleted"
        assert nbytes_in(folder) <= BOUND
    kept = [key for key in keys if cache.get(key, BLOCK) is not None]
    assert kept == ["key 0", *keys[-len(kept) + 1 :]]
    assert 50 <= len(kept) <= 64


def test_a_smaller_bound_holds_at_once(cache, folder):
    for i in range(50):
        cache.put(str(i), content(str(i)))
    BlockCache(folder, BOUND // 4)
    assert BOUND // 8 < nbytes_in(folder) <= BOUND // 4


@pytest.mark.parametrize("bound", [0, 100, BLOCK, FILE])
def test_a_bound_that_holds_hardly_a_block(folder, bound):
    cache = BlockCache(folder, bound)
    cache.put("a", content("a"))
    assert nbytes_in(folder) <= bound


def test_the_folder_is_not_scanned_for_each_block(folder, monkeypatch):
    cache, scans = BlockCache(folder, 640 * FILE), []
    scan = BlockCache._delete_least_recent
    monkeypatch.setattr(BlockCache, "_delete_least_recent", lambda *a: scans.append(a) or scan(*a))
    for i in range(100):
        cache.put(str(i), content(str(i)))
    assert 5 <= len(scans) <= 11


def test_files_of_others_are_not_deleted(folder):
    folder.mkdir()
    for name in ("notes.txt", "x.partial", "0.block", "lock.partial"):
        (folder / name).write_bytes(bytes(BOUND))
        os.utime(folder / name, (1, 1))
    cache = BlockCache(folder, BOUND)
    for i in range(100):
        cache.put(str(i), content(str(i)))
    assert {path.name for path in folder.iterdir()} > {"notes.txt", "x.partial", "0.block"}


def test_old_partial_files_are_deleted(cache, folder):
    old, new = folder / "17-abc.partial", folder / "17-abd.partial"
    for path in (old, new):
        path.write_bytes(b"x")
    an_hour = time.time() - block_cache._PARTIAL_SECONDS
    os.utime(old, (an_hour - 60, an_hour - 60))
    os.utime(new, (an_hour + 60, an_hour + 60))
    BlockCache(folder, BOUND)
    assert not old.exists()
    assert new.exists()


def test_while_another_process_deletes_the_bound_holds(cache, folder):
    import fcntl

    with open(folder / "lock", "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for i in range(200):
            cache.put(str(i), content(str(i)))
        assert nbytes_in(folder) <= BOUND
    cache.put("later", content("later"))
    assert cache.get("later", BLOCK) is not None, "the cache is not used again"


def test_a_fork_does_not_keep_the_lock(cache, folder, monkeypatch):
    """A child that was forked while its parent deleted has the lock's descriptor as well."""
    children = []
    scan = BlockCache._delete_least_recent

    def fork_and_scan(*args):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        children.append(child)
        scan(*args)

    with monkeypatch.context() as patched:
        patched.setattr(BlockCache, "_delete_least_recent", fork_and_scan)
        assert cache._trim(0)
    try:
        assert cache._trim(0), "the lock is still held"
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


# ---------------------------------------------------------------------------------- several writers

WRITER = """
import sys, random
from pathlib import Path
from gptoss_stream.storage.block_cache import BlockCache
folder, bound, seed, rounds = Path(sys.argv[1]), *map(int, sys.argv[2:])
cache, chosen, hits = BlockCache(folder, bound), random.Random(seed), 0
print("ready", flush=True)
for i in range(rounds):
    key = f"{chosen.randrange(300)},"
    data = (key * 4096)[:4096].encode()
    found = cache.get(key, 4096)
    assert found in (None, data), key
    hits += found is not None
    if found is None:
        cache.put(key, data)
assert cache._can_write
print(hits)
"""


def writer(folder: Path, seed: int, rounds: int = 3000) -> AbstractContextManager[Popen[str]]:
    """Start a process that reads and writes blocks; it is killed at the end of the `with`."""
    arguments = [str(folder), str(BOUND), str(seed), str(rounds)]
    return started([sys.executable, "-c", WRITER, *arguments])


def test_processes_share_a_folder_under_a_small_bound(folder):
    most = 0
    with ExitStack() as stack:
        processes = [stack.enter_context(writer(folder, seed)) for seed in range(3)]
        while any(process.poll() is None for process in processes):
            if folder.exists():
                most = max(most, nbytes_in(folder))
            time.sleep(0.001)
        outputs = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert min(int(hits) for _, hits in outputs) > 100, "no block was ever found"
    assert BOUND / 2 < most <= BOUND
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("pause", [0.01, 0.03, 0.05, 0.1, 0.2])
def test_a_killed_writer_leaves_no_wrong_block(folder, pause):
    with writer(folder, 1, 10**9) as process:
        process.stdout.readline()
        wait_until(lambda: blocks(folder), process)
        time.sleep(pause)
    left = len(blocks(folder))
    assert left > 0
    cache = BlockCache(folder, BOUND)
    found = [cache.get(key, BLOCK) for key in (f"{i}," for i in range(300))]
    assert sum(data is not None for data in found) == left
    assert all(data in (None, content(f"{i},")) for i, data in enumerate(found))


def test_threads_share_a_cache(cache, folder):
    errors = []

    def work(seed: int) -> None:
        for i in range(300):
            key = f"{(i * seed) % 90},"
            found = cache.get(key, BLOCK)
            if found is None:
                cache.put(key, content(key))
            elif found != content(key):
                errors.append(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 7, 11, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert nbytes_in(folder) <= BOUND
    assert cache._can_write


# ---------------------------------------------------------------------------------- disks that fail


def test_a_folder_that_cannot_be_created_is_not_used(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        cache = BlockCache(folder, BOUND)
        cache.put("a", content("a"))
        assert cache.get("a", BLOCK) is None


def test_a_full_disk(tmp_path):
    with tmpfs(tmp_path / "disk", 30 * BLOCK) as disk:
        cache = BlockCache(disk, BOUND)
        for i in range(40):
            cache.put(str(i), content(str(i)))
        assert not list(disk.glob("*.partial"))
        found = [cache.get(str(i), BLOCK) for i in range(40)]
        assert found[0] == content("0")
        assert found[-1] is None
        assert all(data in (None, content(str(i))) for i, data in enumerate(found))


def test_a_read_only_disk_is_read(tmp_path):
    with tmpfs(tmp_path / "disk", 1 << 20) as disk:
        BlockCache(disk, BOUND).put("a", content("a"))
        BlockCache(disk, BOUND).put("b", content("b"))
        path = BlockCache(disk, BOUND)._path("b")
        path.write_bytes(path.read_bytes()[:-1])
        remount(disk, "ro")
        cache = BlockCache(disk, BOUND)
        cache.put("c", content("c"))
        assert cache.get("a", BLOCK) == content("a")
        assert cache.get("b", BLOCK) is None
        assert cache.get("c", BLOCK) is None


def test_a_folder_that_is_deleted_meanwhile(cache, folder):
    cache.put("a", content("a"))
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert cache.get("a", BLOCK) is None
    cache.put("b", content("b"))
    assert cache.get("b", BLOCK) is None
