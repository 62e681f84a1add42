"""Runs that are killed, signalled or raced, or whose calls fail: all end in the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from itertools import product
from math import inf
from pathlib import Path
from random import Random

import numpy
import pytest
from runs import (
    INDEX_NAME,
    WORK_NAME,
    Conversion,
    assert_clean_error,
    assert_nothing_half_written,
    assert_one_wrote,
    catches,
    digests,
    finish,
    run,
    stamps,
    status,
    wait_until,
)
from tracing import CALLS, Call, attached, end_failing, paused, stop_after, trace

slow = pytest.mark.slow
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
STATE_NAME = f"{WORK_NAME}/run.json"
WRITES = {"write", "pwrite64", "pwritev", "ftruncate"}


@pytest.fixture(scope="module")
def small(checkpoints, tmp_path_factory) -> Conversion:
    """Five shards, written by one thread, so that system calls come in the same order each time."""
    return Conversion.done(checkpoints(), tmp_path_factory.mktemp("small") / "out", "--workers=1")


@pytest.fixture(scope="module")
def strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    try:
        with paused(["true"]) as process, attached(process):
            process.wait(10)
    except RuntimeError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def calls(strace, small, tmp_path_factory) -> list[Call]:
    """The system calls of the small conversion on its folder, when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("calls")
    return trace(small.command(folder / "out"), folder / "out", folder / "log")


def paths(calls: list[Call], output: Path) -> list[Path]:
    """Return the paths of the calls, in another output folder."""
    return [output / path for path in sorted({path for call in calls for path in call.paths})]


@pytest.mark.parametrize("which", ["some renames", pytest.param("all calls", marks=slow)])
def test_a_kill_after_any_system_call(which, small, calls, tmp_path):
    """The run is killed after its first call on the output folder, after its second, and so on."""
    points = range(1, len(calls) + 1)
    if which == "some renames":
        points = [point for point in points if calls[point - 1].name.startswith("rename")][::2]
    for point in points:
        output = tmp_path / f"{point}"
        with paused(small.command(output)) as process:
            names = stop_after(process, point, paths(calls, output))
            assert names == [call.name for call in calls[:point]]
            process.kill()
            assert process.wait() == -signal.SIGKILL
        small.assert_sound(output)
        shutil.rmtree(output)
    print(f"{len(points)} kills, after {which}")
    assert len(points) >= 6


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=slow)])
def test_kills_at_any_time(kills, large, tmp_path):
    """Also kill the runs that resume, up to five times; no finished shard is written again."""
    random = Random(kills)
    done = while_writing = 0
    while done < kills:
        output = tmp_path / f"{done}"
        for _ in range(min(random.randint(1, 6), kills - done)):
            finished = stamps(output)
            with large.running(output) as process:
                if done % 2:
                    time.sleep(random.uniform(0.05, 1.05 * large.seconds))
                else:  # after the run has finished its first shard, however long that took
                    before = stamps(output)
                    while process.poll() is None and stamps(output) == before:
                        time.sleep(0.001)
                    time.sleep(random.uniform(0, 0.2 * large.seconds))
                while_writing += process.poll() is None and (output / STATE_NAME).exists()
            done += 1
            assert_nothing_half_written(output, large.whole)
            assert finished.items() <= stamps(output).items()
            if (output / INDEX_NAME).exists():
                break
        large.assert_sound(output)
        shutil.rmtree(output, ignore_errors=True)
    print(f"{done} kills, {while_writing} of them while a run was writing")
    assert while_writing >= kills / 10


@pytest.mark.parametrize("workers", [1, 3])
def test_the_order_in_which_things_become_durable(workers, strace, small, tmp_path):
    """First the run's state; then, for each shard, its data before its name; last the index, data
    before name."""
    command = small.command(tmp_path / "out", f"--workers={workers}")
    log = trace(command, tmp_path, tmp_path / "log")
    changes = [call for call in log if call.name in WRITES or call.name.startswith("rename")]

    def synced(path: str, after: int) -> float:
        """Return the line of the log after which a file or folder is on the disk as of `after`."""
        ends = (c.end for c in log if "sync" in c.name and path in c.paths and c.begin > after)
        return min(ends, default=inf)

    named = {}  # final name to the line in which it was given, and that after which it is durable
    for call in changes:
        if call.name.startswith("rename"):
            partial, final = call.paths
            written = max(c.end for c in changes if c.name in WRITES and partial in c.paths)
            assert synced(partial, written) < call.begin, final
            later = [c.begin for c in changes if c.thread == call.thread and c.begin > call.end]
            named[final] = (call.begin, synced(os.path.dirname(final), call.end))
            assert named[final][1] < min(later, default=inf), final
    state_named, state_durable = named.pop(f"out/{STATE_NAME}")
    index_named, _ = named.pop(f"out/{INDEX_NAME}")
    assert {*named} == {f"out/{name}" for name in small.whole} - {f"out/{INDEX_NAME}"}
    shards = [call for call in log if call.paths[0].endswith(".safetensors")]
    assert state_named < state_durable < min(call.begin for call in shards)
    assert all(durable < index_named for _, durable in named.values())


def test_a_new_output_folder_is_durable(strace, small, tmp_path):
    """Its name in the parent folder is synced before the run ends."""
    log = trace(small.command(tmp_path / "out"), tmp_path, tmp_path / "log")
    created = next(
        call.end for call in log if call.name.startswith("mkdir") and "out" in call.paths
    )
    assert any("sync" in c.name and c.paths == (".",) and c.begin > created for c in log)


def fail_call(number, error, small, calls, output, *, lasting=False) -> None:
    """Let one call of a run fail, or all calls from it on, and assert that the run handles it."""
    call, within = calls[number], paths(calls, output)
    with paused(small.command(output)) as process:
        stop_after(process, number, within)
        names, within = (CALLS, within) if lasting else (call.name, paths([call], output))
        log = output.with_suffix(".log")
        done = end_failing(process, names, error, within, log, lasting=lasting)
    print(number, call.name, *call.paths, error, done.returncode, done.stderr.strip())
    final = {c.paths[0]: c.paths[1] for c in calls if c.name.startswith("rename")}
    file = final.get(call.paths[0])
    closed = [c.paths for c in calls[:number] if c.name == "close"]
    if call.name == "close" and call.paths in closed:
        file = None  # opened again to be read: all of it is on the disk already
    if done.returncode == 0:
        assert (done.stdout, done.stderr) == ("", "")
        assert digests(output) == small.whole
        assert error == "EINTR" or not (file or "sync" in call.name), "the error was ignored"
    else:
        assert_clean_error(done, 2, 3)
        assert not (file and (output / file).exists()), (
            "the file has its final name in spite of the error"
        )
        assert not (file and error == "EINTR") or call.name in ("close", "rename", "unlink"), (
            "the call was not repeated"
        )
    small.assert_sound(output)
    shutil.rmtree(output)


@pytest.mark.parametrize(
    ("name", "path", "error"),
    [
        ("flock", "lock", "ENOLCK"),
        ("openat", "-00002-of-", "EACCES"),
        ("pwrite64", "-00002-of-", "ENOSPC"),
        ("pwrite64", "-00002-of-", "EINTR"),
        ("fsync", "-00002-of-", "EIO"),
        ("close", "-00002-of-", "EDQUOT"),
        ("rename", "-00002-of-", "EROFS"),
        ("rename", "index", "EIO"),
    ],
)
def test_a_call_that_fails(name, path, error, small, calls, tmp_path):
    """The run fails with one line, or continues; a file that was not written gets no final name."""
    numbers = [n for n, c in enumerate(calls) if c.name == name and path in c.paths[0]]
    fail_call(numbers[0], error, small, calls, tmp_path / "out")


@slow
@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EDQUOT", "EINTR", "EROFS", "EACCES"])
def test_every_call_may_fail(error, small, calls, tmp_path):
    """In each run, another call on its folder fails."""
    for number in range(len(calls)):
        fail_call(number, error, small, calls, tmp_path / f"{number}")


@pytest.mark.parametrize("every", [40, pytest.param(1, marks=slow)])
def test_a_disk_that_fails(every, small, calls, tmp_path):
    """From some call on all calls fail, including those that clean up."""
    for number in range(every - 1, len(calls), every):
        fail_call(number, "EIO", small, calls, tmp_path / f"{number}", lasting=True)


@linux
@pytest.mark.parametrize("signals", [6, pytest.param(100, marks=slow)])
def test_signals_at_any_time(signals, large, tmp_path):
    """SIGINT and SIGTERM end a run soon, with one line and the signal's exit code."""
    random = Random(1000 + signals)
    ended = number = 0
    # How many runs have ended before their signal depends on how busy the machine is.
    while number < signals or (ended <= signals / 2 and number < 10 * signals):
        output = tmp_path / f"{number}"
        signum = random.choice((signal.SIGINT, signal.SIGTERM))
        with large.running(output) as process:
            wait_until(lambda p=process: catches(p, signal.SIGTERM), process)
            time.sleep(random.uniform(0, large.seconds))
            process.send_signal(signum)
            done = finish(process, 20)
        assert done.returncode in (0, 128 + signum, -signum), done.stderr
        ended += done.returncode != 0
        # When the run is complete and Python is exiting, a signal prints nothing.
        silent = done.returncode == 0 or (done.stderr == "" and digests(output) == large.whole)
        assert done.stderr.count("\n") == (not silent), done.stderr
        assert done.stdout == ""
        large.assert_sound(output)
        shutil.rmtree(output)
        number += 1
    print(f"{number} signals, {ended} of them ended a run")
    assert ended > signals / 2


@pytest.mark.parametrize("module", ["multiarray", pytest.param("", marks=slow)])
def test_a_signal_while_modules_load(module, strace, small, tmp_path):
    """It ends the run as at any time, although numpy replaces exceptions raised in its import."""
    opened = {}
    for folder in (Path(os.__file__).parent, Path(numpy.__file__).parent):
        for call in trace(small.command(tmp_path / "traced"), folder, tmp_path / "log"):
            if call.name == "openat" and module in call.paths[0]:
                opened[folder / call.paths[0]] = True
        shutil.rmtree(tmp_path / "traced")
    tried, wrong = 0, []
    for number, file in enumerate(opened):
        signum = (signal.SIGINT, signal.SIGTERM)[number % 2]
        output = tmp_path / f"{number}"
        with paused(small.command(output)) as process:
            stop_after(process, 1, [file])
            if not catches(process, signal.SIGTERM):
                continue
            process.send_signal(signum)
            process.send_signal(signal.SIGCONT)
            done = finish(process, 30)
        tried += 1
        if done.returncode not in (128 + signum, -signum) or done.stderr.count("\n") != 1:
            wrong.append((file, signum.name, done.returncode, done.stderr[-200:]))
        small.assert_sound(output)
    assert tried > 0
    assert not wrong, f"{len(wrong)} of {tried}"


def test_a_second_signal_does_not_wait(strace, small, tmp_path):
    """If a write takes six seconds, the second SIGINT ends the run at once."""
    output = tmp_path / "out"
    delayed = ["-e", "trace=pwrite64", "-e", "inject=pwrite64:delay_enter=6000000"]
    with paused(small.command(output)) as process, attached(process, *delayed, "-o", os.devnull):
        wait_until(lambda: [*output.glob(f"{WORK_NAME}/*.safetensors")], process)
        for _ in range(2):
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        signalled = time.monotonic()
        wait_until(
            lambda: status(process, "State") == "Z", process
        )  # only the slow write is pending
        assert time.monotonic() - signalled < 4
        done = finish(process, 30)
    assert done.returncode in (128 + signal.SIGINT, -signal.SIGINT)
    assert done.stderr.count("\n") <= 1, done.stderr
    small.assert_sound(output)


@pytest.mark.parametrize("races", [5, pytest.param(50, marks=slow)])
def test_races_for_one_output(races, small, tmp_path):
    """Of several runs that start at nearly the same time, one writes the output undisturbed."""
    random = Random(races)
    for number in range(races):
        output = tmp_path / f"{number}"
        assert_one_wrote(small.race(output, random), output, small.whole)
        shutil.rmtree(output)


@pytest.mark.parametrize("which", ["on the work folder", pytest.param("all calls", marks=slow)])
def test_a_run_beside_a_stopped_one(which, small, calls, tmp_path):
    """After whatever call the first run is stopped, one of both runs writes all shards."""
    points = range(1, len(calls) + 1)
    if which == "on the work folder":
        names = {"mkdir", "mkdirat", "unlinkat", "rmdir"}
        points = [
            point
            for point in points
            if calls[point - 1].name in names and calls[point - 1].paths == (WORK_NAME,)
        ]
    for point in points:
        output = tmp_path / f"{point}"
        with paused(small.command(output, "--json")) as first:
            stop_after(first, point, paths(calls, output))
            second = run(small.command(output, "--json"))
            first.send_signal(signal.SIGCONT)
            ends = [finish(first, 60), second]
        print(point, *calls[point - 1].paths, *((end.returncode, end.stderr) for end in ends))
        assert_one_wrote(ends, output, small.whole)
        shutil.rmtree(output)


def test_a_lock_file_that_was_deleted_locks_nothing(small, calls, tmp_path):
    """A run is stopped between opening and locking the lock file; then a second run ends and a
    third one starts. The first must be refused like any other."""
    output = tmp_path / "out"
    locking = next(number for number, call in enumerate(calls) if call.name == "flock")
    overwrite = small.command(output, "--overwrite")
    with paused(small.command(output)) as first, paused(overwrite) as third:
        stop_after(first, locking, paths(calls, output))
        assert run(small.command(output)).returncode == 0
        stop_after(third, len(calls) // 2, paths(calls, output))
        first.send_signal(signal.SIGCONT)
        assert_clean_error(finish(first, 60), 2)
        third.send_signal(signal.SIGCONT)
        done = finish(third, 60)
    assert (done.returncode, done.stderr) == (0, "")
    assert digests(output) == small.whole


def test_a_killed_run_holds_no_lock(large, tmp_path):
    """Others are refused while a run exists, even if it is stopped; after a kill, one resumes."""
    output = tmp_path / "out"
    with large.running(output) as process:
        wait_until((output / STATE_NAME).exists, process)
        process.send_signal(signal.SIGSTOP)
        assert_clean_error(run(large.command(output)), 2)
    large.assert_sound(output)


@pytest.mark.parametrize(
    ("workers", "seeds"), [((4,), (1,)), pytest.param((1, 2, 3, 4), (0, 1, 2, 3, 4), marks=slow)]
)
def test_the_bytes_are_always_the_same(workers, seeds, large, tmp_path, monkeypatch):
    """With any number of threads and any hash seed of Python, interrupted or not."""
    for count, seed in product(workers, seeds):
        monkeypatch.setenv("PYTHONHASHSEED", str(seed))
        at_once, in_two = tmp_path / f"{count}-{seed}", tmp_path / f"{count}-{seed}-interrupted"
        assert run(large.command(at_once, f"--workers={count}")).returncode == 0
        assert digests(at_once) == large.whole
        with large.running(in_two, f"--workers={5 - count}") as process:
            wait_until(lambda output=in_two: stamps(output), process)
        assert run(large.command(in_two, f"--workers={count}")).returncode == 0
        assert digests(in_two) == large.whole
        shutil.rmtree(at_once)
        shutil.rmtree(in_two)
