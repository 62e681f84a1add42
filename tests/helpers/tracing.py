"""List a run's system calls with strace, stop a run after any of them, or let any of them fail.

The option `when=` of strace counts the calls of each thread separately, so it cannot select "the
tenth call of the run". Therefore a run is stopped after each call, and the calls are counted here.
A tracer that attaches to the stopped run counts from that call on.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runs import ROOT, finish

CALLS = (
    "openat,?mkdir,mkdirat,write,pwrite64,?pwritev,ftruncate,fsync,fdatasync,?rename,?renameat,"
    "renameat2,?link,linkat,?unlink,unlinkat,?rmdir,flock,close"
)
"""Calls that change a folder, or report errors of earlier changes. `?` marks those that not every
machine has."""
RANDOM_NAMES = re.compile(r"\.guard-\w")
"""In names that are others in each run. Calls on these files alone are left out."""


@dataclass(frozen=True)
class Call:
    """A system call on files of a folder: their paths in the folder, and its first and last line in
    the log."""

    thread: str
    name: str
    paths: tuple[str, ...]
    begin: int
    end: int


def parse(log: Iterable[str], folder: Path) -> list[Call]:
    """Return the calls in a log that name a folder or a file in it, in the order in which they
    ended."""
    calls, unfinished = [], {}
    within = re.compile(rf'[<"]{re.escape(str(folder))}(?:/([^">]*))?[">]')
    for end, line in enumerate(log):
        thread, text = line.split(maxsplit=1)
        begin = end
        if text.endswith("<unfinished ...>\n"):
            unfinished[thread] = (begin, text)
            continue
        if text.startswith("<... "):
            begin, text = unfinished.pop(thread)
        name = re.match(r"(\w+)\(", text)
        if name and within.search(text):
            arguments = text.partition(") = ")[0]  # the result names an opened file again
            found = [path or "." for path in within.findall(arguments)]
            paths = tuple(path for path in found if not RANDOM_NAMES.search(path))
            if paths:
                calls.append(Call(thread, name[1], paths, begin, end))
    return calls


def trace(command: Sequence[str], folder: Path, log: Path) -> list[Call]:
    """Run a command that must succeed; return its calls on a folder."""
    strace = ["strace", "-f", "-qq", "-y", "-s0", "-o", str(log), "-e", f"trace={CALLS}"]
    subprocess.run([*strace, *command], cwd=ROOT, check=True, timeout=60)
    with log.open(errors="replace") as lines:
        return parse(lines, folder)


@contextmanager
def paused(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a process that waits for SIGCONT before its first instruction, and kill it at the end
    of the block."""
    process = subprocess.Popen(
        ["sh", "-c", 'kill -STOP $$; exec "$@"', "sh", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def attached(
    process: subprocess.Popen[str], *options: str, paths: Iterable[Path] = (), **popen
) -> Iterator[None]:
    """Attach strace to a paused process and continue it; detach at the end of the block.

    If `paths` are given, only calls on exactly these are traced.
    """
    only = [option for path in paths for option in ("-P", str(path))]
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-s0", *only, *options, "-p", str(process.pid)],
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )
    try:
        line = ""
        while "attached" not in line:
            if not (line := tracer.stderr.readline()):
                raise RuntimeError("strace cannot attach to processes on this machine")
        process.send_signal(signal.SIGCONT)
        yield
    finally:
        tracer.terminate()
        tracer.communicate()


def stop_after(process: subprocess.Popen[str], number: int, paths: Iterable[Path]) -> list[str]:
    """Continue a paused process for `number` of the `CALLS` on `paths`, and pause it again.

    Returns:
        The names of these calls; fewer if the process ended.
    """
    names: list[str] = []
    if number == 0:
        return names
    reading, writing = os.pipe()
    options = ["-e", f"trace={CALLS}", "-e", f"inject={CALLS}:signal=STOP"]
    options += ["-o", f"/dev/fd/{writing}"]
    with (
        open(reading, errors="replace") as log,
        attached(process, *options, paths=paths, pass_fds=[writing]),
    ):
        os.close(writing)
        begun, caller = {}, None
        for line in log:
            thread, text = line.split(maxsplit=1)
            if name := re.match(r"(\w+)\(", text):
                begun[thread] = name[1]
            elif text.startswith("--- SIGSTOP {"):
                caller = thread
            elif text.startswith("--- stopped by SIGSTOP") and thread == caller:
                # Every thread reports this. Once the calling thread does, all threads will stop,
                # and a SIGCONT does not arrive before the stop that it must end.
                caller = None
                names.append(begun[thread])
                if len(names) == number:
                    break
                process.send_signal(signal.SIGCONT)
    return names


def end_failing(
    process: subprocess.Popen[str],
    calls: str,
    error: str,
    paths: Iterable[Path],
    log: Path,
    *,
    lasting: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Continue a paused process to its end, and let its next such call on `paths` fail with an
    error; if `lasting`, all later ones too."""
    fault = f"inject={calls}:error={error}:when={'1+' if lasting else '1'}"
    with attached(process, "-e", f"trace={calls}", "-e", fault, "-o", str(log), paths=paths):
        done = finish(process, 60)
    assert "(INJECTED)" in log.read_text(errors="replace")
    return done
