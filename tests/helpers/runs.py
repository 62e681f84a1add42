"""Runs of the command line as users start it: ended, hindered, and held to a whole one."""

from __future__ import annotations

import hashlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from gptoss_stream.cli.main import main

WORK_NAME = ".gptoss_stream"
INDEX_NAME = "model.safetensors.index.json"
ROOT = Path(__file__).parents[2]
OPTIONS = ("--max-shard-size", "300KB", "--quiet")


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of every file in a folder whose name fits, by its path in the folder."""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob(pattern))
        if f.is_file()
    }


def shards_there(folder: Path) -> set[str]:
    """The shards in a folder, in the making or finished, all of them at one moment: looking takes
    a while, in which one goes and another comes."""
    looks = [{name for _, _, names in os.walk(folder) for name in names} for _ in range(2)]
    return {name for name in looks[0] & looks[1] if name.endswith(".safetensors")}


def convert_command(source: Path, output: Path, *options: str) -> list[str]:
    """The command line of a conversion into several shards."""
    command = [sys.executable, "-m", "gptoss_stream", "convert", str(source), str(output)]
    return [*command, *OPTIONS, *options]


def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a minute at most."""
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, **options)


class Hung(BaseException):
    """Something took too long; nothing takes this for an error that it knows."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `Hung` in what takes longer."""

    def stop(signum, frame):
        raise Hung(f"more than {seconds} s")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def run_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command line in this process: for runs by the hundred. In 20 seconds at most."""
    out, err = io.StringIO(), io.StringIO()
    command = [str(argument) for argument in arguments]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with redirect_stdout(out), redirect_stderr(err), at_most(20):
            code = main(command)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def assert_clean_error(done: subprocess.CompletedProcess[str], *codes: int) -> None:
    """An error as the user must see it: one line, and an exit code that was meant."""
    assert done.returncode in codes, (done.returncode, done.stderr)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("gptoss_stream: ")


def assert_nothing_half_written(output: Path, whole: dict[str, str]) -> None:
    """Whatever stands under a final name is as in the whole output; with an index, all is there."""
    found = {n: d for n, d in digests(output).items() if not n.startswith(f"{WORK_NAME}/")}
    assert found.items() <= whole.items(), sorted(found.keys() - whole.keys()) or sorted(
        name for name in found if found[name] != whole[name]
    )
    if INDEX_NAME in found:
        assert found == whole


def assert_resumes(source: Path, output: Path, whole: dict[str, str], *options: str) -> None:
    """The same command again, with nothing done by hand, gives the whole output."""
    done = run(convert_command(source, output, *options))
    assert done.returncode == 0, done.stderr
    assert digests(output) == whole


def limit_file_size(nbytes: int) -> Callable[[], None]:
    """What a new process does so that none of its files can grow beyond a size."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def interrupted(source: Path, output: Path) -> None:
    """Begin a conversion, and let it fail at its first shard."""
    done = run(convert_command(source, output), preexec_fn=limit_file_size(150_000))
    assert_clean_error(done, 3)
    assert (output / WORK_NAME).exists()


def strike(
    command: list[str], output: Path, blow: Callable[[], None], files: int | None, pause: float = 0
) -> tuple[subprocess.CompletedProcess[str], bool]:
    """Run a conversion and deal it a blow in the midst of it, or (`files` None) when it has ended.

    The midst is some seconds, `pause`, after it began to write and so many files of the output
    stood under their names. Gives the ended process, and whether it ran when the blow fell.
    """
    work = output / WORK_NAME
    before = _changed(work)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    with process:
        try:
            if files is None:
                process.wait(60)
            else:
                while process.poll() is None and (
                    _changed(work) == before or len([*output.iterdir()]) <= files
                ):
                    time.sleep(0.0003)
                time.sleep(pause)
            running = process.poll() is None
            blow()
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr), running


def seconds_of_writing(command: list[str], output: Path) -> float:
    """How long a conversion runs from when it begins to write."""
    began: list[float] = []
    done, _ = strike(command, output, lambda: began.append(time.perf_counter()), files=0)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - began[0]


def _changed(folder: Path) -> int | None:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return None


def stamps(output: Path) -> dict[str, tuple[int, int]]:
    """What tells a finished shard from one that was made again."""
    found = {file.name: file.stat() for file in output.glob("*.safetensors")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


@dataclass(frozen=True)
class Conversion:
    """A conversion that has been done undisturbed: what it gives, and how long it takes."""

    source: Path
    options: tuple[str, ...]
    whole: dict[str, str]
    seconds: float

    @classmethod
    def done(cls, source: Path, output: Path, *options: str) -> Conversion:
        """Do it, several times for the least time."""
        seconds = []
        for _ in range(3):
            shutil.rmtree(output, ignore_errors=True)
            begin = time.monotonic()
            assert run(convert_command(source, output, *options)).returncode == 0
            seconds.append(time.monotonic() - begin)
        return cls(source, options, digests(output), min(seconds))

    def command(self, output: Path, *options: str) -> list[str]:
        """The same conversion into another folder."""
        return convert_command(self.source, output, *self.options, *options)

    @contextmanager
    def running(self, output: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
        """A process that does it, and is killed in the end."""
        pipe, command = subprocess.PIPE, self.command(output, *options)
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def assert_sound(self, output: Path) -> None:
        """As any end must leave it: nothing half-written, nothing to do by hand or twice."""
        assert_nothing_half_written(output, self.whole)
        finished = stamps(output)
        assert_resumes(self.source, output, self.whole, *self.options)
        assert finished.items() <= stamps(output).items()


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until a process has come so far, or is at its end."""
    deadline = time.monotonic() + 30
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def finish(process: subprocess.Popen[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """The end of a process that has so much time left."""
    out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def status(process: subprocess.Popen[str], field: str) -> str:
    """What Linux says of a process in /proc."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{field}:")).split()[1]


def catches(process: subprocess.Popen[str], signum: int) -> bool:
    """Whether a process has come to handling a signal; before, Python itself is starting."""
    return bool(int(status(process, "SigCgt"), 16) >> (signum - 1) & 1)
