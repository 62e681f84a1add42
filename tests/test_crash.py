"""Real runs that are killed, hindered, signalled and raced; each must end in the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from math import inf
from pathlib import Path
from random import Random

import pytest
from runs import (
    INDEX_NAME,
    ROOT,
    WORK_NAME,
    assert_clean_error,
    assert_nothing_half_written,
    assert_resumes,
    convert_command,
    digests,
    run,
)
from tracing import CALLS, Call, attached, end_failing, held, stop_after, trace

slow = pytest.mark.slow
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
STATE_NAME = f"{WORK_NAME}/run.json"
WRITES = {"write", "pwrite64", "pwritev", "ftruncate"}


@dataclass(frozen=True)
class Conversion:
    """A conversion that has been done undisturbed: what it gives, and how long it took."""

    source: Path
    options: tuple[str, ...]
    whole: dict[str, str]
    seconds: float

    @classmethod
    def done(cls, source: Path, output: Path, *options: str) -> Conversion:
        seconds = []
        for _ in range(3):
            shutil.rmtree(output, ignore_errors=True)
            begin = time.monotonic()
            assert run(convert_command(source, output, *options)).returncode == 0
            seconds.append(time.monotonic() - begin)
        return cls(source, options, digests(output), min(seconds))

    def command(self, output: Path, *options: str) -> list[str]:
        return convert_command(self.source, output, *self.options, *options)

    def start(self, output: Path, *options: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = self.command(output, *options)
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)

    def assert_sound(self, output: Path) -> None:
        """As an end of any kind must leave it: nothing half-written, and no hand needed."""
        assert_nothing_half_written(output, self.whole)
        finished = stamps(output)
        assert_resumes(self.source, output, self.whole, *self.options)
        assert finished.items() <= stamps(output).items()


@pytest.fixture(scope="module")
def small(checkpoints, tmp_path_factory) -> Conversion:
    """Five shards, and no two calls of the run at once."""
    return Conversion.done(checkpoints(), tmp_path_factory.mktemp("small") / "out", "--workers=1")


@pytest.fixture(scope="module")
def large(checkpoints, tmp_path_factory) -> Conversion:
    """Most of its time is spent on making shards, three at once."""
    source = checkpoints(layers=5, experts=6, hidden_size=352, intermediate_size=288)
    output = tmp_path_factory.mktemp("large") / "out"
    return Conversion.done(source, output, "--workers=3", "--max-shard-size=3MB")


@pytest.fixture(scope="module")
def strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    try:
        with held(["true"]) as process, attached(process):
            process.wait(10)
    except RuntimeError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def calls(strace, small, tmp_path_factory) -> list[Call]:
    """What the small run does to its folder, undisturbed, call by call."""
    folder = tmp_path_factory.mktemp("calls")
    return trace(small.command(folder / "out"), folder / "out", folder / "log")


def paths(calls: list[Call], output: Path) -> list[Path]:
    return [output / path for path in sorted({path for call in calls for path in call.paths})]


def stamps(output: Path) -> dict[str, tuple[int, int]]:
    """What tells a finished shard from one that was made again."""
    found = {file.name: file.stat() for file in output.glob("*.safetensors")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def wait_until(condition, process: subprocess.Popen[str]) -> None:
    """Until a process has come so far, or is at its end."""
    deadline = time.monotonic() + 30
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("when", ["rename", pytest.param("any call", marks=slow)])
def test_a_kill_after_any_system_call(when, small, calls, tmp_path):
    """The run dies after its first call on the output folder, after its second, and so on."""
    points = [n for n, call in enumerate(calls, 1) if when in (call.name, "any call")]
    for point in points:
        output = tmp_path / f"{point}"
        with held(small.command(output)) as process:
            names = stop_after(process, point, paths(calls, output))
            assert names == [call.name for call in calls[:point]]
            process.kill()
            assert process.wait() == -signal.SIGKILL
        small.assert_sound(output)
        shutil.rmtree(output)
    print(f"{len(points)} kills, after each {when}")


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=slow)])
def test_kills_at_any_time(kills, large, tmp_path):
    """Also of a run that resumes a killed one, up to five in a chain; no shard is made twice."""
    random = Random(kills)
    done = at_work = 0
    while done < kills:
        output = tmp_path / f"{done}"
        for _ in range(min(random.randint(1, 6), kills - done)):
            finished = stamps(output)
            process = large.start(output)
            time.sleep(random.uniform(0.05, 1.05 * large.seconds))
            at_work += process.poll() is None and (output / STATE_NAME).exists()
            process.kill()
            process.communicate()
            done += 1
            assert_nothing_half_written(output, large.whole)
            assert finished.items() <= stamps(output).items()
            if (output / INDEX_NAME).exists():
                break
        large.assert_sound(output)
        shutil.rmtree(output, ignore_errors=True)
    print(f"{done} kills, {at_work} of them of a run at work")
    assert at_work >= kills / 5


@pytest.mark.parametrize("workers", [1, 3])
def test_the_order_in_which_things_become_durable(workers, strace, small, tmp_path):
    """The state; then of each shard its data, then its name; then, likewise, the index, last."""
    command = small.command(tmp_path / "out", f"--workers={workers}")
    log = trace(command, tmp_path, tmp_path / "log")

    def synced(path: str, after: int) -> float:
        """When a file or folder was first on the disk as it had been after some line."""
        ends = (c.end for c in log if "sync" in c.name and path in c.paths and c.begin > after)
        return min(ends, default=inf)

    named = {}  # when each final name was given, and when it was on the disk
    for call in log:
        if call.name.startswith("rename"):
            partial, final = call.paths
            written = max(c.end for c in log if c.name in WRITES and partial in c.paths)
            assert synced(partial, written) < call.begin, final
            named[final] = (call.begin, synced(os.path.dirname(final), call.end))
    begun, state_durable = named.pop(f"out/{STATE_NAME}")
    index_named, index_durable = named.pop(f"out/{INDEX_NAME}")
    assert {*named} == {f"out/{name}" for name in small.whole} - {f"out/{INDEX_NAME}"}
    shards = [call for call in log if call.paths[0].endswith(".safetensors")]
    assert begun < state_durable < min(call.begin for call in shards)
    assert all(durable < index_named for _, durable in named.values())
    assert index_durable < inf


def test_a_new_output_folder_is_durable_itself(strace, small, tmp_path):
    """Its name, in the folder that it lies in, before the run says that it is done."""
    log = trace(small.command(tmp_path / "out"), tmp_path, tmp_path / "log")
    made = next(call.end for call in log if call.name.startswith("mkdir") and "out" in call.paths)
    assert any("sync" in c.name and c.paths == (".",) and c.begin > made for c in log)


def fault(
    number: int,
    error: str,
    small: Conversion,
    calls: list[Call],
    output: Path,
    *,
    lasting: bool = False,
) -> None:
    """Let one call of a run fail, or all from one on, and hold the run to what it may do then."""
    call, log = calls[number], output.with_suffix(".log")
    with held(small.command(output)) as process:
        stop_after(process, number, paths(calls, output))
        if lasting:
            done = end_failing(process, CALLS, error, paths(calls, output), log, lasting=True)
        else:
            done = end_failing(process, call.name, error, paths([call], output), log)
    print(number, call.name, *call.paths, error, done.returncode, done.stderr.strip())
    if done.returncode == 0:
        assert (done.stdout, done.stderr) == ("", "")
        assert digests(output) == small.whole
    else:
        assert_clean_error(done, 2, 3)
        final = {c.paths[0]: c.paths[1] for c in calls if c.name.startswith("rename")}
        if voided := final.get(call.paths[0]):
            assert not (output / voided).exists(), "it was given its name all the same"
            assert error != "EINTR" or call.name in ("close", "rename"), "not tried again"
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
    """The run says so in a line, or goes on; a file that could not be written gets no name."""
    numbers = [n for n, c in enumerate(calls) if c.name == name and path in c.paths[0]]
    fault(numbers[0], error, small, calls, tmp_path / "out")


@slow
@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EDQUOT", "EINTR", "EROFS", "EACCES"])
def test_every_call_may_fail(error, small, calls, tmp_path):
    """Each of the run's calls on its folder, one in each run."""
    for number in range(len(calls)):
        fault(number, error, small, calls, tmp_path / f"{number}")


@pytest.mark.parametrize("every", [40, pytest.param(1, marks=slow)])
def test_a_disk_that_dies(every, small, calls, tmp_path):
    """From some call on all of them fail, those too by which the run would clean up."""
    for number in range(every - 1, len(calls), every):
        fault(number, "EIO", small, calls, tmp_path / f"{number}", lasting=True)


@linux
@pytest.mark.parametrize("signals", [10, pytest.param(100, marks=slow)])
def test_signals_at_any_time(signals, large, tmp_path):
    """SIGINT and SIGTERM end a run in two seconds, with a line and the code that they call for."""
    random = Random(signals)
    ended = 0
    for number in range(signals):
        output = tmp_path / f"{number}"
        signum = random.choice((signal.SIGINT, signal.SIGTERM))
        process = large.start(output)
        wait_until(lambda p=process: catches(p, signal.SIGTERM), process)
        time.sleep(random.uniform(0, large.seconds))
        process.send_signal(signum)
        out, err = process.communicate(timeout=2)
        assert process.returncode in (0, 128 + signum, -signum), err
        finished = digests(output) == large.whole  # Python itself is ending, and has no words
        silent = process.returncode == 0 or (finished and not err)
        assert err.count("\n") == (not silent), err
        assert out == ""
        ended += process.returncode != 0
        large.assert_sound(output)
        shutil.rmtree(output)
    print(f"{signals} signals, {ended} of them ended a run")
    assert ended > signals / 2


def status(process: subprocess.Popen[str], field: str) -> str:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{field}:")).split()[1]


def catches(process: subprocess.Popen[str], signum: int) -> bool:
    """Whether a process has come to handling a signal; before, Python itself is starting."""
    return bool(int(status(process, "SigCgt"), 16) >> (signum - 1) & 1)


def test_a_second_signal_does_not_wait(strace, small, tmp_path):
    """On a disk that takes three seconds for a write, the second SIGINT ends the run at once."""
    output = tmp_path / "out"
    slowly = ["-e", "trace=pwrite64", "-e", "inject=pwrite64:delay_enter=3000000"]
    with held(small.command(output)) as process, attached(process, *slowly, "-o", os.devnull):
        wait_until(lambda: [*output.glob(f"{WORK_NAME}/*.safetensors")], process)
        for _ in range(2):
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        signalled = time.monotonic()
        wait_until(lambda: status(process, "State") == "Z", process)  # all but the slow write
        assert time.monotonic() - signalled < 1
        out, err = process.communicate(timeout=30)
    assert process.returncode in (128 + signal.SIGINT, -signal.SIGINT)
    assert err.count("\n") <= 1, err
    assert out == ""
    small.assert_sound(output)


@pytest.mark.parametrize("races", [5, pytest.param(50, marks=slow)])
def test_races_for_one_output(races, small, tmp_path):
    """Of some runs started at once, or nearly, one does the work and no other hinders it."""
    random = Random(races)
    for number in range(races):
        output = tmp_path / f"{number}"
        processes = []
        for _ in range(random.randint(2, 4)):
            processes.append(small.start(output, "--json"))
            time.sleep(random.choice((0, random.uniform(0, 1.2 * small.seconds))))
        written = []
        for process in processes:
            out, err = process.communicate(timeout=60)
            if process.returncode == 0:
                report = json.loads(out)
                written.append(report["bytes_out"] - report["bytes_resumed"])
            else:
                ended = subprocess.CompletedProcess(process.args, process.returncode, out, err)
                assert_clean_error(ended, 2)
                assert "another run (process" in err
        assert sum(written) == sum(file.stat().st_size for file in output.glob("*.safetensors")), (
            written
        )
        assert digests(output) == small.whole
        shutil.rmtree(output)


@pytest.mark.parametrize("which", ["on the work folder", pytest.param("any call", marks=slow)])
def test_a_run_beside_one_that_stands_still(which, small, calls, tmp_path):
    """Whatever call the one has come to, another does all of the work or none, and so does it."""
    around = [
        n for n, c in enumerate(calls, 1) if c.paths == (WORK_NAME,) and "close" not in c.name
    ]
    points = around if which == "on the work folder" else range(1, len(calls) + 1)
    for point in points:
        output = tmp_path / f"{point}"
        with held(small.command(output)) as first:
            stop_after(first, point, paths(calls, output))
            second = run(small.command(output))
            first.send_signal(signal.SIGCONT)
            said = first.communicate(timeout=60)
        print(point, calls[point - 1], first.returncode, *said, second.returncode, second.stderr)
        ends = [second, subprocess.CompletedProcess(first.args, first.returncode, *said)]
        for end in ends:
            if end.returncode == 0:
                assert end.stderr == ""
            else:
                assert_clean_error(end, 2)
        assert 0 in [end.returncode for end in ends]
        assert digests(output) == small.whole
        shutil.rmtree(output)


def test_a_killed_run_holds_nothing(large, tmp_path):
    """While a run lives, even stopped, others are refused at once; when it is dead, one goes on."""
    output = tmp_path / "out"
    process = large.start(output)
    wait_until((output / STATE_NAME).exists, process)
    process.send_signal(signal.SIGSTOP)
    assert_clean_error(run(large.command(output)), 2)
    process.kill()
    process.communicate()
    large.assert_sound(output)


@pytest.mark.parametrize(
    ("workers", "seeds"), [((2, 4), (1,)), pytest.param((1, 2, 3, 4), (0, 1, 2, 3, 4), marks=slow)]
)
def test_one_set_of_bytes(workers, seeds, large, tmp_path, monkeypatch):
    """Whatever the number of threads and Python's hash seed, interrupted or not."""
    for count, seed in product(workers, seeds):
        monkeypatch.setenv("PYTHONHASHSEED", str(seed))
        at_once, in_two = tmp_path / f"{count}-{seed}", tmp_path / f"{count}-{seed}-interrupted"
        assert run(large.command(at_once, f"--workers={count}")).returncode == 0
        assert digests(at_once) == large.whole
        process = large.start(in_two, f"--workers={5 - count}")
        wait_until(lambda output=in_two: stamps(output), process)
        process.kill()
        process.communicate()
        assert run(large.command(in_two, f"--workers={count}")).returncode == 0
        assert digests(in_two) == large.whole
        shutil.rmtree(at_once)
        shutil.rmtree(in_two)
