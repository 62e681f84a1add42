"""The system calls of a run, by strace: seen in order, stopped after, made to fail.

strace counts its `when=` for every thread apart, so that "the tenth call of the run" has no name
in it. But a run can be stopped after each of its calls, and counted by who looks on; and a tracer
that comes to a stopped run counts from there.
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
"""Those that change a folder, or say whether a change was made; `?` where not every machine has
them."""


@dataclass(frozen=True)
class Call:
    """A system call on files of a folder: their paths in it, and the log's lines that it spans."""

    thread: str
    name: str
    paths: tuple[str, ...]
    begin: int
    end: int


def parse(log: Iterable[str], folder: Path) -> list[Call]:
    """The calls of a log that name something in a folder, or the folder, in order of their end."""
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
            arguments = text.partition(") = ")[0]  # an opened file is named again as the result
            paths = tuple(path or "." for path in within.findall(arguments))
            calls.append(Call(thread, name[1], paths, begin, end))
    return calls


def trace(command: Sequence[str], folder: Path, log: Path) -> list[Call]:
    """Run a command to its good end; the calls it made on a folder."""
    strace = ["strace", "-f", "-qq", "-y", "-s0", "-o", str(log), "-e", f"trace={CALLS}"]
    subprocess.run([*strace, *command], cwd=ROOT, check=True, timeout=60)
    with log.open(errors="replace") as lines:
        return parse(lines, folder)


@contextmanager
def held(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that stands before its first instruction until SIGCONT; killed in the end."""
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
    """strace at a held process, which goes on; when strace leaves, the process is as it is then.

    Of all calls only those on exactly these `paths` count, if any are given.
    """
    only = [option for path in paths for option in ("-P", str(path))]
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-s0", *only, *options, "-p", str(process.pid)],
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )
    try:
        said = ""
        while "attached" not in said:
            if not (said := tracer.stderr.readline()):
                raise RuntimeError("strace cannot attach to a process here")
        process.send_signal(signal.SIGCONT)
        yield
    finally:
        tracer.terminate()
        tracer.communicate()


def stop_after(process: subprocess.Popen[str], number: int, paths: Iterable[Path]) -> list[str]:
    """Let a held process make so many of `CALLS` on `paths`, then hold it again.

    Returns the calls' names: fewer, if the process came to its end.
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
                # Every thread says so. The caller's own word means that all will stop, and that
                # a SIGCONT now does not come before what it is to undo.
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
    """Let a held process go on to its end, with an error as its next such call on `paths`, or,
    where the fault is `lasting`, as that and all later ones."""
    fault = f"inject={calls}:error={error}:when={'1+' if lasting else '1'}"
    with attached(process, "-e", f"trace={calls}", "-e", fault, "-o", str(log), paths=paths):
        done = finish(process, 60)
    assert "(INJECTED)" in log.read_text(errors="replace")
    return done
