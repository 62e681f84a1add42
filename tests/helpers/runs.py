"""Run the command line as users do, disturb runs, and compare outputs with undisturbed ones."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    redirect_stderr,
    redirect_stdout,
)
from dataclasses import dataclass
from pathlib import Path
from random import Random

import gptoss_stream
from gptoss_stream.cli.main import main

WORK_NAME = ".gptoss_stream"
INDEX_NAME = "model.safetensors.index.json"
ROOT = Path(__file__).parents[2]
OPTIONS = ("--max-shard-size", "300KB", "--quiet")


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    """Return the SHA-256 of the files in a folder that match a pattern, by path in the folder."""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob(pattern))
        if f.is_file()
    }


def shards_in(folder: Path) -> set[str]:
    """Return the shards that a folder has at one moment, partial or finished.

    Listing takes time, in which files are created and deleted: only files in two listings count.
    """
    listings = [{name for _, _, names in os.walk(folder) for name in names} for _ in range(2)]
    return {name for name in listings[0] & listings[1] if name.endswith(".safetensors")}


def convert_command(source: Path, output: Path, *options: str) -> list[str]:
    """Return the command line of a conversion into several shards."""
    command = [sys.executable, "-m", "gptoss_stream", "convert", str(source), str(output)]
    return [*command, *OPTIONS, *options]


def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    """Run a command, for one minute at most."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, **options)


class TimeLimitExceeded(BaseException):
    """A block exceeded its time limit. No `Exception`, so that tested code cannot catch it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimitExceeded` in a block that takes longer."""

    def stop(signum, frame):
        raise TimeLimitExceeded(f"more than {seconds} s")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def run_in_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command line in this process, which is faster, for 20 seconds at most."""
    out, err = io.StringIO(), io.StringIO()
    command = [str(argument) for argument in arguments]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with redirect_stdout(out), redirect_stderr(err), time_limit(20):
            code = main(command)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def assert_clean_error(done: subprocess.CompletedProcess[str], *codes: int) -> None:
    """Assert an error as users must see it: one line on stderr and one of these exit codes."""
    assert done.returncode in codes, (done.returncode, done.stderr)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("gptoss_stream: ")


def assert_nothing_half_written(output: Path, whole: dict[str, str]) -> None:
    """Assert that each file with a final name is as in the undisturbed output, and that no file is
    missing if there is an index."""
    found = {n: d for n, d in digests(output).items() if not n.startswith(f"{WORK_NAME}/")}
    assert found.items() <= whole.items(), sorted(found.keys() - whole.keys()) or sorted(
        name for name in found if found[name] != whole[name]
    )
    if INDEX_NAME in found:
        assert found == whole


def assert_resumes(source: Path, output: Path, whole: dict[str, str], *options: str) -> None:
    """Assert that running the same command again gives the undisturbed output."""
    done = run(convert_command(source, output, *options))
    assert done.returncode == 0, done.stderr
    assert digests(output) == whole


def assert_one_wrote(ends, output: Path, whole: dict[str, str]) -> None:
    """Assert that of several runs with --json into one folder, one wrote all shards, and the others
    were refused or found the output complete."""
    reports = [json.loads(end.stdout) for end in ends if end.returncode == 0]
    written = [report["bytes_out"] - report["bytes_resumed"] for report in reports]
    for end in ends:
        if end.returncode != 0:
            assert_clean_error(end, 2)
            assert "another run" in end.stderr
    assert digests(output) == whole
    assert sum(written) == sum(file.stat().st_size for file in output.glob("*.safetensors"))


def limit_file_size(nbytes: int) -> Callable[[], None]:
    """Return a `preexec_fn` that limits the size of each file of a process."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def interrupted(source: Path, output: Path) -> None:
    """Run a conversion that fails at its first shard."""
    done = run(convert_command(source, output), preexec_fn=limit_file_size(150_000))
    assert_clean_error(done, 3)
    assert (output / WORK_NAME).exists()


class Stopped(Exception):
    """Ends a run in the middle."""


def stop_run(source: Path, output: Path, finished: int, **options) -> list[str]:
    """End a run of one thread when so many shards are finished; return their names.

    With several threads, how many shards are finished at some moment is a matter of chance.
    """

    def names() -> list[str]:
        return sorted(file.name for file in output.glob("*.safetensors"))

    def stop(nbytes: int) -> None:
        if len(names()) == finished:
            raise Stopped

    try:
        gptoss_stream.convert(source, output, workers=1, on_progress=stop, **options)
    except Stopped:
        return names()
    raise AssertionError(f"the run ended before {finished} shards were finished")


def disturb(
    command: list[str],
    output: Path,
    disturbance: Callable[[], None],
    files: int | None,
    pause: float = 0,
) -> tuple[subprocess.CompletedProcess[str], bool]:
    """Run a conversion and call `disturbance` while it runs.

    Args:
        command: The conversion.
        output: Its output folder.
        disturbance: What to do meanwhile.
        files: Wait until this number of output files have their final names; None waits until the
            conversion has ended.
        pause: Then wait this many seconds more.

    Returns:
        The ended process, and whether it was running when `disturbance` was called.
    """
    work = output / WORK_NAME
    before = _changed(work)
    with started(command) as process:
        if files is None:
            process.wait(60)
        else:
            while process.poll() is None and (
                _changed(work) == before or len([*output.iterdir()]) <= files
            ):
                time.sleep(0.0003)
            time.sleep(pause)
        running = process.poll() is None
        disturbance()
        return finish(process, 60), running


def seconds_of_writing(command: list[str], output: Path) -> float:
    """Return how long a conversion runs after it begins to write."""
    began: list[float] = []
    done, _ = disturb(command, output, lambda: began.append(time.perf_counter()), files=0)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - began[0]


def _changed(folder: Path) -> int | None:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None


def stamps(output: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of each shard, which change if it is written again."""
    found = {file.name: file.stat() for file in output.glob("*.safetensors")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


@dataclass(frozen=True)
class Conversion:
    """A conversion that has run undisturbed: its output's checksums, and how long it takes."""

    source: Path
    options: tuple[str, ...]
    whole: dict[str, str]
    seconds: float

    @classmethod
    def done(cls, source: Path, output: Path, *options: str) -> Conversion:
        """Run it three times, and keep the shortest time."""
        seconds = []
        for _ in range(3):
            shutil.rmtree(output, ignore_errors=True)
            begin = time.monotonic()
            assert run(convert_command(source, output, *options)).returncode == 0
            seconds.append(time.monotonic() - begin)
        return cls(source, options, digests(output), min(seconds))

    def command(self, output: Path, *options: str) -> list[str]:
        """Return the command line of the same conversion into another folder."""
        return convert_command(self.source, output, *self.options, *options)

    def running(self, output: Path, *options: str) -> AbstractContextManager[subprocess.Popen[str]]:
        """Start it in a process, which is killed at the end of the block."""
        return started(self.command(output, *options))

    def race(self, output: Path, random: Random) -> list[subprocess.CompletedProcess[str]]:
        """Start several runs with --json into one folder at nearly the same time; return how each
        ended."""
        with ExitStack() as stack:
            processes = []
            for _ in range(random.randint(2, 4)):
                processes.append(stack.enter_context(self.running(output, "--json")))
                time.sleep(random.choice((0, random.uniform(0, 1.2 * self.seconds))))
            return [finish(process, 30) for process in processes]

    def assert_sound(self, output: Path) -> None:
        """Assert what must hold after any end of a run: no partial file has a final name, the same
        command completes the output, and it writes no finished shard again."""
        assert_nothing_half_written(output, self.whole)
        finished = stamps(output)
        assert_resumes(self.source, output, self.whole, *self.options)
        assert finished.items() <= stamps(output).items()


@contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a process, which is killed at the end of the block."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.001)


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until a condition holds, or the process has ended."""
    wait_for(lambda: process.poll() is not None or condition())


def finish(process: subprocess.Popen[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Wait for the end of a process, for this many seconds at most."""
    out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def status(process: subprocess.Popen[str], field: str) -> str:
    """Return a field of a process's status in /proc."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{field}:")).split()[1]


def catches(process: subprocess.Popen[str], signum: int) -> bool:
    """Return whether a process handles a signal yet; it does not while Python is starting."""
    return bool(int(status(process, "SigCgt"), 16) >> (signum - 1) & 1)
