"""Runs many commands against the stand-in for the Hub.

Each run is a process of its own, forked from one that has already imported everything. Runs differ
from `python -m gptoss_stream` in three ways: retries wait for milliseconds instead of half a
second, blocks are so small that a tiny checkpoint has many, and `fsync` does nothing (other tests
cover a power loss).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count, cycle
from pathlib import Path

from runs import ROOT, wait_for
from stand_in_hub import Fault, Request

BLOCK_NBYTES = 40_000
Spoiling = Callable[[Request], "Fault | None"]

_LAUNCHER = f"""
import gc, json, os, signal, sys
import gptoss_stream.storage.hub
import gptoss_stream.storage.hub_requests as hub_requests
import gptoss_stream.storage.retries as retries
from gptoss_stream import conversion, formats
from gptoss_stream.checkpoint.remote_reader import BUDGET_NBYTES, RemoteReader
from gptoss_stream.cli.main import main
from gptoss_stream.verification import verify
from gptoss_stream.writing import executor, remote_output, uploads
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download
from huggingface_hub.utils import get_session

retries.FIRST_DELAY = 0.002
RemoteReader.__init__.__defaults__ = (BUDGET_NBYTES, {BLOCK_NBYTES})
os.fsync = os.fdatasync = lambda descriptor: None
run = None

def report(what, value):
    with open(run["name"] + ".partial", "w") as file:
        file.write(str(value))
    os.rename(run["name"] + ".partial", run["name"] + "." + what)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
gc.freeze()
for line in sys.stdin:
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    run = json.loads(line)
    os.chdir(run["folder"])
    pid = os.fork()
    if pid:
        report("pid", pid)
        report("code", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    break
if run is not None:
    os.environ.update(run["environment"])
    retries._MAX_RETRY_AFTER = float(os.environ.get("MAX_RETRY_AFTER", "4000"))
    hub_requests._SAID_SECONDS = float(os.environ.get("SAID_SECONDS", "30"))
    uploads.PUBLISH_SECONDS = float(os.environ.get("PUBLISH_SECONDS", "0"))
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(run["name"] + "." + name, os.O_WRONLY | os.O_CREAT), number)
    sys.exit(main(run["arguments"]))
"""


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a run; no setting of the Hub is inherited."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
    variables |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home / "hf")}
    variables |= {"XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(ROOT)}
    return variables | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | more


class Run:
    """A run that was started in the background."""

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

    def begin(self, folder: Path, *arguments: object, **more: str) -> Run:
        """Start a run in a folder, with additions to its environment."""
        self._count += 1
        name = self.home / f"run-{self._count}"
        words = [str(argument) for argument in arguments]
        run = {"name": str(name), "folder": str(folder), "arguments": words, "environment": more}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(run) + "\n")
        self._process.stdin.flush()
        return Run(name, words)

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate(timeout=30)


def _matches(match: str, request: Request) -> bool:
    return bool(re.search(match, f"{request.origin} {request.method} {request.path}"))


def after(n: int, fault: Fault, match: str) -> Spoiling:
    """Return a fault for all requests that match (see `stand_in_hub.first`) after the first `n`."""
    turns = count()
    return lambda request: fault if _matches(match, request) and next(turns) >= n else None


def at_first(faults: list[Fault], match: str) -> Spoiling:
    """Return a fault for the first request for each path, one fault after another."""
    turns, known = cycle(faults), set()

    def spoil(request: Request) -> Fault | None:
        request_key = (request.method, request.path, request.range)
        if not _matches(match, request) or request_key in known:
            return None
        known.add(request_key)
        return next(turns)

    return spoil
