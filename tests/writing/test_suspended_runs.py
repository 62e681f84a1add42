"""A run that was suspended so long that another one took its folder over leaves that one alone.

`flock` lets everybody in, by a preloaded library. A host is a process that thinks that it runs on
another kernel; a minute is a second there.
"""

from __future__ import annotations

import signal
import sys
import time
from contextlib import ExitStack
from threading import Event

import pytest
from runs import (
    WORK_NAME,
    assert_clean_error,
    assert_nothing_half_written,
    digests,
    finish,
    run,
    run_in_process,
    stamps,
    started,
    status,
    wait_until,
)

import gptoss_stream
from gptoss_stream.errors import OutputError
from gptoss_stream.writing.output_run import OutputRun
from gptoss_stream.writing.receipts import Receipts
from gptoss_stream.writing.shard_file import ShardFile

LYING = ["0", pytest.param("ENOSYS", marks=pytest.mark.slow)]
"""How `flock` ends in processes that a test starts."""


@pytest.fixture
def flock(request, flock_library, monkeypatch) -> str:
    monkeypatch.setenv("LD_PRELOAD", flock_library(request.param))
    return request.param


ON_HOST = """
import sys
from gptoss_stream.writing import guard_file, process_identity
process_identity.kernel = lambda: sys.argv[1]
guard_file._STALE_SECONDS, guard_file._HEARTBEAT_SECONDS = 1.0, 0.1
from gptoss_stream.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def on_host(name: str, command: list[str]) -> list[str]:
    """Return a command line of this tool, to be run as on a host of its own."""
    return [sys.executable, "-c", ON_HOST, name, *command[3:]]


@pytest.mark.parametrize("flock", LYING, indirect=True)
@pytest.mark.parametrize("files", [0, 1])
def test_a_run_that_lost_its_folder_ends(files, flock, large, tmp_path):
    """It wakes up when another one, with other options, has ended; it changes nothing."""
    output = tmp_path / "out"
    with started(on_host("A", large.command(output))) as process:
        began = output / f"{WORK_NAME}/run.json"
        wait_until(lambda: began.exists() and len(stamps(output)) >= files, process)
        process.send_signal(signal.SIGSTOP)
        other = on_host("B", large.command(output, "--overwrite", "--dtype", "float32"))
        done = run(other)
        while "if it was killed, run the same command again" in done.stderr:
            time.sleep(0.2)
            done = run(other)
        assert (done.returncode, done.stderr) == (0, "")
        found = digests(output)
        process.send_signal(signal.SIGCONT)
        ended = finish(process, 60)
    assert_clean_error(ended, 2, 3)
    assert "this run no longer holds it" in ended.stderr
    assert digests(output) == found
    assert run(large.command(tmp_path / "alone", "--dtype", "float32")).returncode == 0
    assert found == digests(tmp_path / "alone")


@pytest.mark.parametrize("flock", LYING[:1], indirect=True)
def test_a_run_wakes_up_while_another_has_its_folder(flock, large, tmp_path):
    """It ends, and the other one, or the next, completes the output."""
    output, processes = tmp_path / "out", []
    with ExitStack() as stack:
        for name in "AB":
            process = stack.enter_context(started(on_host(name, large.command(output))))
            processes.append(process)
            count = len(stamps(output)) + 1
            wait_until(lambda number=count: len(stamps(output)) >= number, process)
            process.send_signal(signal.SIGSTOP)
            time.sleep(1.2)
        for process in processes:
            process.send_signal(signal.SIGCONT)
        first, second = (finish(process, 60) for process in processes)
    assert_clean_error(first, 2)
    assert "took it over" in first.stderr
    assert second.returncode in (0, 3), second.stderr
    assert_nothing_half_written(output, large.whole)
    large.assert_sound(output)


LATE = """
import os, signal, time
from gptoss_stream.writing import executor, shard_in_progress
from gptoss_stream.writing.shard_file import ShardFile
executor.CHUNK_NBYTES, shard_in_progress.JOURNAL_SECONDS = 1 << 14, 0
write = ShardFile.write
def late(file, chunk, offset):
    if offset + len(chunk) >= file._nbytes and sys.argv[1] == "A":
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.2)
    write(file, chunk, offset)
ShardFile.write = late
"""


@pytest.mark.parametrize("flock", LYING[:1], indirect=True)
def test_a_run_wakes_up_in_its_last_write(flock, checkpoints, tmp_path):
    """Which is padded to whole pages, and would make the finished shard too long. The other run has
    begun a file of its own."""
    output = tmp_path / "out"
    command = ["", "", "", "convert", str(checkpoints(layers=2)), str(output), "--workers=1"]
    code = ON_HOST.replace("from gptoss_stream.cli", LATE + "from gptoss_stream.cli")
    first, second = ([sys.executable, "-c", code, name, *command[3:]] for name in "AB")
    with started(first) as process:
        wait_until(lambda: status(process, "State") == "T", process)
        time.sleep(1.2)
        done = run(second)
        assert done.returncode == 0, done.stderr
        found = digests(output)
        process.send_signal(signal.SIGCONT)
        ended = finish(process, 60)
    assert_clean_error(ended, 2)
    assert digests(output) == found
    assert gptoss_stream.verify(checkpoints(layers=2), output).equal


def test_a_run_that_lost_its_folder_deletes_only_its_own_partial_file(tmp_path):
    partial = tmp_path / "partial"
    file = ShardFile(partial, tmp_path / "final", 4096)
    partial.unlink()
    partial.write_bytes(b"another run's")
    file.close(keep=False)
    assert partial.read_bytes() == b"another run's"
    partial.unlink()
    ShardFile(partial, tmp_path / "final", 4096).close(keep=False)
    assert not partial.exists()


def test_a_shard_that_another_run_has_begun_is_not_emptied(tmp_path):
    partial = tmp_path / "partial"
    partial.write_bytes(b"another run's")
    with pytest.raises(FileExistsError):
        ShardFile(partial, tmp_path / "final", 4096)
    assert partial.read_bytes() == b"another run's"


def test_a_run_that_lost_its_folder_keeps_no_receipt(tmp_path):
    def check():
        raise OutputError("another run took it over")

    with pytest.raises(OutputError):
        Receipts(tmp_path, check).keep("model.safetensors", b"receipt")
    assert Receipts(tmp_path).read() == {}


def test_a_run_that_lost_its_folder_writes_no_journal(checkpoints, tmp_path, monkeypatch):
    """What it has written is in a file that the other run has deleted."""
    source, taken = checkpoints(layers=2), Event()

    def check(run):
        if taken.is_set():
            raise OutputError("another run took it over")

    monkeypatch.setattr("gptoss_stream.writing.executor.CHUNK_NBYTES", 1 << 14)
    monkeypatch.setattr("gptoss_stream.writing.shard_in_progress.JOURNAL_SECONDS", 0)
    monkeypatch.setattr(ShardFile, "sync", lambda file: taken.set())
    monkeypatch.setattr(OutputRun, "check_lock", check)
    done = run_in_process("convert", source, tmp_path / "out", "--workers=1")
    assert (done.returncode, taken.is_set()) == (2, True)
    assert not [*tmp_path.rglob("*.journal")]


STOPS = """
import os, signal, time
from gptoss_stream.writing import executor, output_folder, shard_in_progress, thread_executor
from gptoss_stream.writing.shard_file import ShardFile
executor.CHUNK_NBYTES, shard_in_progress.JOURNAL_SECONDS = 1 << 14, 0
stops = 1

def stop():
    global stops
    if stops:
        stops -= 1
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.2)  # the signal may reach another thread first

def stopping(owner, name, before):
    function = getattr(owner, name)
    def stopping_function(*arguments, **options):
        if before:
            stop()
        result = function(*arguments, **options)
        stop()
        return result
    setattr(owner, name, stopping_function)

points = {
    "before it creates a shard": (ShardFile, "__init__", True),
    "before it writes a journal": (shard_in_progress.ShardJournal, "write", True),
    "before it writes a checksum": (output_folder, "write_durably", True),
    "before it commits a shard": (ShardFile, "commit", True),
    "before it checks a shard": (thread_executor, "_check_header", True),
    "before it renames a shard": (thread_executor, "_check_header", False),
    "after it has written a chunk": (ShardFile, "write", False),
}
stopping(*points[sys.argv.pop(2)])
"""
POINTS = [
    "before it creates a shard",
    "before it writes a journal",
    "before it writes a checksum",
    "before it commits a shard",
    "before it checks a shard",
    "before it renames a shard",
]


@pytest.mark.parametrize("flock", LYING[:1], indirect=True)
@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_wakes_up_leaves_the_next_one_alone(point, flock, checkpoints, tmp_path):
    """Which has begun the same shard: it is neither renamed nor written to, and is completed."""
    source, output = checkpoints(layers=2), tmp_path / "out"
    code = ON_HOST.replace("from gptoss_stream.cli", STOPS + "from gptoss_stream.cli")
    processes = []
    with ExitStack() as stack:
        for name, where in (("A", point), ("B", "after it has written a chunk")):
            command = [sys.executable, "-c", code, name, where, "convert", str(source), str(output)]
            command += ["--workers=1", "--max-shard-size=100KB", "--checksums"]
            process = stack.enter_context(started(command))
            processes.append(process)
            wait_until(lambda process=process: status(process, "State") == "T", process)
            time.sleep(1.2)
        work = output / WORK_NAME
        [partial] = work.glob("*.safetensors")
        before, names = partial.read_bytes(), {file.name for file in work.iterdir()}
        processes[0].send_signal(signal.SIGCONT)
        first = finish(processes[0], 60)
        assert_clean_error(first, 2)
        assert "took it over" in first.stderr
        assert partial.read_bytes() == before
        found = {file.name for file in work.iterdir() if not file.name.endswith(".partial")}
        assert found == names
        assert not [*output.glob("*.safetensors")]
        processes[1].send_signal(signal.SIGCONT)
        second = finish(processes[1], 60)
    assert second.returncode == 0, second.stderr
    assert gptoss_stream.verify(source, output).equal
