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

import pytest
from runs import (
    ROOT,
    WORK_NAME,
    Conversion,
    assert_clean_error,
    assert_one_wrote,
    digests,
    finish,
    run,
    stamps,
    wait_until,
)

GUARD = f"{WORK_NAME}/run.guard"
FLOCKS = ["works", "0", "ENOSYS", "EOPNOTSUPP", "ENOLCK"]
MANY = [*FLOCKS[:2], *(pytest.param(one, marks=pytest.mark.slow) for one in FLOCKS[2:])]
LYING = ["0", pytest.param("ENOSYS", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def small(checkpoints, tmp_path_factory) -> Conversion:
    return Conversion.done(checkpoints(), tmp_path_factory.mktemp("small") / "out")


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
