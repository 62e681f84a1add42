"""Runs of the command line against the stand-in for the Hub, by the hundred.

Each is a process of its own, forked from one that has imported everything before. What they do not
have in common with `python -m gptoss_stream`: they wait for milliseconds where that waits for
half of a second, they read blocks so small that a tiny checkpoint has many, and they call no
fsync (what a power loss does is tried elsewhere).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count, cycle
from pathlib import Path

from runs import ROOT
from stand_in_hub import Fault, Request

BLOCK_NBYTES = 40_000
Spoiling = Callable[[Request], "Fault | None"]

_LAUNCHER = f"""
import gc, json, os, signal, sys
import gptoss_stream.storage.hub
import gptoss_stream.storage.retries as retries
from gptoss_stream import conversion, formats
from gptoss_stream.checkpoint.remote_reader import BUDGET_NBYTES, RemoteReader
from gptoss_stream.cli.main import main
from gptoss_stream.verification import verify
from gptoss_stream.writing import executor, remote_output
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download
from huggingface_hub.utils import get_session

retries.FIRST_DELAY = 0.002
RemoteReader.__init__.__defaults__ = (BUDGET_NBYTES, {BLOCK_NBYTES})
os.fsync = os.fdatasync = lambda descriptor: None
job = None

def tell(what, value):
    with open(job["name"] + ".partial", "w") as file:
        file.write(str(value))
    os.rename(job["name"] + ".partial", job["name"] + "." + what)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
gc.freeze()
for line in sys.stdin:
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    job = json.loads(line)
    os.chdir(job["here"])
    pid = os.fork()
    if pid:
        tell("pid", pid)
        tell("code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    break
if job is not None:
    os.environ.update(job["environment"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job["name"] + "." + name, os.O_WRONLY | os.O_CREAT), number)
    sys.exit(main(job["arguments"]))
"""


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """What the environment of a run says: of the Hub only this."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
    mine |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home / "hf")}
    mine |= {"XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(ROOT)}
    return mine | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | more


class Job:
    """A run that was started."""

    def __init__(self, name: Path, arguments: list[str]) -> None:
        self._name = name
        self._arguments = arguments

    def _read(self, what: str) -> str | None:
        try:
            return Path(f"{self._name}.{what}").read_text()
        except FileNotFoundError:
            return None

    @property
    def is_over(self) -> bool:
        return self._read("code") is not None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the run a signal."""
        wait_for(lambda: self._read("pid"))
        if not self.is_over:
            os.kill(int(str(self._read("pid"))), number)

    def done(self, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Wait for its end, and return the result."""
        try:
            wait_for(lambda: self.is_over, seconds)
        except BaseException:
            self.kill()
            raise
        code, out, err = (self._read(what) or "" for what in ("code", "out", "err"))
        return subprocess.CompletedProcess(self._arguments, int(code), out, err)


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.003)


class Launcher:
    """Starts runs against one endpoint."""

    def __init__(self, endpoint: str, home: Path) -> None:
        self.home = home
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER],
            stdin=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(endpoint, home),
        )
        self._count = 0

    def begin(self, here: Path, *arguments: object, **more: str) -> Job:
        """Start a run in a folder, with additions to its environment."""
        self._count += 1
        name = self.home / f"run-{self._count}"
        words = [str(argument) for argument in arguments]
        job = {"name": str(name), "here": str(here), "arguments": words, "environment": more}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Job(name, words)

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate(timeout=30)


def _matches(match: str, request: Request) -> bool:
    return bool(re.search(match, f"{request.origin} {request.method} {request.path}"))


def after(n: int, fault: Fault, match: str) -> Spoiling:
    """A fault of all requests that match (as in `stand_in_hub.first`) but the first `n`."""
    turns = count()
    return lambda request: fault if _matches(match, request) and next(turns) >= n else None


def at_first(faults: list[Fault], match: str) -> Spoiling:
    """Return a fault for the first request for each path, one fault after another."""
    turns, known = cycle(faults), set()

    def spoil(request: Request) -> Fault | None:
        what = (request.method, request.path, request.range)
        if not _matches(match, request) or what in known:
            return None
        known.add(what)
        return next(turns)

    return spoil
