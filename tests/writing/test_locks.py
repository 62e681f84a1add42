"""Two runs never write to one folder, also where `flock` lets everybody in or fails.

`flock` is replaced in real processes by a preloaded library. Another host is a process that thinks
that it runs on another kernel; a minute is a second there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from threading import Event

import pytest
from runs import (
    ROOT,
    WORK_NAME,
    Conversion,
    assert_clean_error,
    assert_nothing_half_written,
    assert_one_wrote,
    digests,
    finish,
    run,
    run_in_process,
    stamps,
    wait_until,
)

import gptoss_stream
from gptoss_stream.errors import OutputError
from gptoss_stream.writing.output_run import OutputRun
from gptoss_stream.writing.shard_file import ShardFile

GUARD = f"{WORK_NAME}/run.guard"
FLOCKS = ["works", "0", "ENOSYS", "EOPNOTSUPP", "ENOLCK"]
MANY = [*FLOCKS[:2], *(pytest.param(one, marks=pytest.mark.slow) for one in FLOCKS[2:])]
LYING = ["0", pytest.param("ENOSYS", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def small(checkpoints, tmp_path_factory) -> Conversion:
    return Conversion.done(checkpoints(), tmp_path_factory.mktemp("small") / "out")


@pytest.fixture(scope="module")
def large(checkpoints, tmp_path_factory) -> Conversion:
    """A conversion that spends most of its time writing shards."""
    source = checkpoints(layers=4, experts=5, hidden_size=352, intermediate_size=288)
    output = tmp_path_factory.mktemp("large") / "out"
    return Conversion.done(source, output, "--workers=3", "--max-shard-size=3MB")


@pytest.fixture
def flock(request, flock_library, monkeypatch) -> str:
    """How `flock` ends in processes that the test starts."""
    if request.param != "works":
        monkeypatch.setenv("LD_PRELOAD", flock_library(request.param))
    return request.param


def killed(conversion: Conversion, output: Path) -> None:
    """Kill a run that has finished a shard more; its guard stays."""
    finished = len(stamps(output))
    with conversion.running(output) as process:
        wait_until(lambda: len(stamps(output)) > finished, process)
    assert (output / GUARD).exists()


def elsewhere(guard: Path) -> None:
    """Make a guard one of another host."""
    holder = json.loads(guard.read_bytes())
    guard.write_text(json.dumps({**holder, "host": "node7", "kernel": "another"}))


@pytest.mark.parametrize("flock", MANY, indirect=True)
@pytest.mark.parametrize("races", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_races_for_one_output(races, flock, small, tmp_path):
    """Of runs that start at nearly the same time, one writes the output undisturbed."""
    random = Random(races)
    for number in range(races):
        output = tmp_path / f"{number}"
        assert_one_wrote(small.race(output, random), output, small.whole)


@pytest.mark.parametrize("flock", LYING, indirect=True)
def test_a_run_beside_a_stopped_one(flock, large, tmp_path):
    """The second is refused as long as the process of the first exists."""
    output = tmp_path / "out"
    with large.running(output) as process:
        wait_until((output / f"{WORK_NAME}/run.json").exists, process)
        process.send_signal(signal.SIGSTOP)
        old = time.time() - 1000
        os.utime(output / GUARD, (old, old))
        done = run(large.command(output))
        assert_clean_error(done, 2)
        assert f"another run (process {process.pid}) is writing to it; wait" in done.stderr
        process.send_signal(signal.SIGCONT)
        assert finish(process, 60).returncode == 0
    assert digests(output) == large.whole


@pytest.mark.parametrize("flock", LYING, indirect=True)
def test_a_killed_run_is_resumed_at_once(flock, large, tmp_path):
    """Its guard is not believed, since its process is gone; after two kills too."""
    output = tmp_path / "out"
    for number in range(2):
        finished = stamps(output)
        killed(large, output)
        assert len(list(output.glob(f"{GUARD}*"))) == number + 1
        assert finished.items() <= stamps(output).items()
    large.assert_sound(output)


@pytest.mark.parametrize("flock", FLOCKS[:2], indirect=True)
def test_a_killed_run_of_another_host(flock, large, tmp_path):
    """Its guard is believed for a minute, by the clock of the file system."""
    output = tmp_path / "out"
    killed(large, output)
    pid = json.loads((output / GUARD).read_bytes())["pid"]
    elsewhere(output / GUARD)
    for age in (0, 40):
        then = time.time() - age
        os.utime(output / GUARD, (then, then))
        done = run(large.command(output))
        assert_clean_error(done, 2)
        assert f"another run (process {pid} on host node7, since 20" in done.stderr
        assert "if it was killed, run the same command again in " in done.stderr
        assert int(done.stderr.split()[-2]) <= 61 - age
    os.utime(output / GUARD, (time.time() - 62,) * 2)
    large.assert_sound(output)


@pytest.mark.parametrize("flock", FLOCKS[:2], indirect=True)
def test_a_killed_run_of_another_container(flock, large, tmp_path):
    """Its process cannot be looked for. Where `flock` works, to hold it is proof enough."""
    output = tmp_path / "out"
    killed(large, output)
    holder = json.loads((output / GUARD).read_bytes())
    (output / GUARD).write_text(json.dumps({**holder, "pid": 1, "pid_space": "pid:[1]"}))
    if flock == "works":
        large.assert_sound(output)
    else:
        assert_clean_error(run(large.command(output)), 2)


@pytest.mark.parametrize("text", [b"", b"{}", b"\0" * 300, b'{"token": "../../x"}'])
def test_a_damaged_guard(text, large, tmp_path):
    """Whose it was is not known: it is believed for a minute."""
    output = tmp_path / "out"
    killed(large, output)
    (output / GUARD).write_bytes(text)
    done = run(large.command(output))
    assert_clean_error(done, 2)
    assert "another run (process 0 on host unknown, since unknown) is writing" in done.stderr
    os.utime(output / GUARD, (time.time() - 62,) * 2)
    large.assert_sound(output)


# --- a run that was suspended for too long ------------------------------------------------------

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
    output, pipe = tmp_path / "out", subprocess.PIPE
    command = on_host("A", large.command(output))
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
    try:
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
    finally:
        process.kill()
        process.communicate()
    assert_clean_error(ended, 2, 3)
    assert "this run no longer holds it" in ended.stderr
    assert digests(output) == found
    assert run(large.command(tmp_path / "alone", "--dtype", "float32")).returncode == 0
    assert found == digests(tmp_path / "alone")


@pytest.mark.parametrize("flock", LYING[:1], indirect=True)
def test_a_run_wakes_up_while_another_has_its_folder(flock, large, tmp_path):
    """It ends, and the other one, or the next, completes the output."""
    output, pipe = tmp_path / "out", subprocess.PIPE
    processes = []
    try:
        for name in "AB":
            command = on_host(name, large.command(output))
            process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
            processes.append(process)
            count = len(stamps(output)) + 1
            wait_until(lambda number=count: len(stamps(output)) >= number, process)
            process.send_signal(signal.SIGSTOP)
            time.sleep(1.2)
        for process in processes:
            process.send_signal(signal.SIGCONT)
        first, second = (finish(process, 60) for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
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
    output, pipe = tmp_path / "out", subprocess.PIPE
    command = ["", "", "", "convert", str(checkpoints(layers=2)), str(output), "--workers=1"]
    code = ON_HOST.replace("from gptoss_stream.cli", LATE + "from gptoss_stream.cli")
    first, second = ([sys.executable, "-c", code, name, *command[3:]] for name in "AB")
    process = subprocess.Popen(first, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
    try:
        stopped = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: stopped.read_text().rpartition(") ")[2][0] == "T", process)
        time.sleep(1.2)
        done = run(second)
        assert done.returncode == 0, done.stderr
        found = digests(output)
        process.send_signal(signal.SIGCONT)
        ended = finish(process, 60)
    finally:
        process.kill()
        process.communicate()
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
    ShardFile(partial, tmp_path / "final", 4096).close(keep=False)
    assert not partial.exists()


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


# --- the guard alone ----------------------------------------------------------------------------

RACES = """
import os, random, signal, sys, time
from pathlib import Path
from gptoss_stream.writing import guard_file
guard_file._POLL_SECONDS = 0.001
if sys.argv[3] == "without links":
    def link(*paths):
        raise OSError(guard_file.errno.EPERM, "no links")
    os.link = link
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])

def holds(number):
    random.seed(number)
    for _ in range(rounds):
        guard = guard_file.GuardFile(folder, "run", lambda: False)
        assert guard.acquire(wait=True) is None
        os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
        assert guard.is_held()
        with open(folder / "count", "a") as count:
            count.write("x")
        time.sleep(random.choice((0, 0.001)))
        os.unlink(folder / "inside")
        if random.random() < 0.3:
            os.kill(os.getpid(), signal.SIGKILL)
        guard.release()

def child(number):
    if pid := os.fork():
        return pid
    try:
        holds(number)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)

running, number, killed = {child(n) for n in range(8)}, 8, 0
while running:
    pid, status = os.wait()
    running.remove(pid)
    killed += os.WIFSIGNALED(status)
    assert os.WIFSIGNALED(status) or status == 0
    if os.WIFSIGNALED(status) and number < 8 * rounds:
        running.add(child(number))
        number += 1
print(killed, (folder / "count").stat().st_size, sorted(os.listdir(folder)))
"""


@pytest.mark.parametrize("links", ["links", "without links"])
@pytest.mark.parametrize("rounds", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_races_for_the_guards_of_dead_processes(rounds, links, tmp_path):
    """Eight processes at a time acquire one guard; of each three who do, one is killed with it."""
    command = [sys.executable, "-c", RACES, str(tmp_path), str(rounds), links]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    killed, held = map(int, done.stdout.split()[:2])
    print(f"{killed} of {held} holders killed")
    assert killed >= rounds
    assert held > 2 * killed
