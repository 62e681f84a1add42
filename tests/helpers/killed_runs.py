"""Runs that are killed within a shard. Import `small_chunks` and `written` as fixtures."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from runs import ROOT, WORK_NAME

from gptoss_stream.writing import shard_in_progress
from gptoss_stream.writing.shard_file import ShardFile

CHUNK = 1 << 14
SHARD = "model.safetensors"
JOURNAL = f"{WORK_NAME}/{SHARD}.journal"

CHILD = """
import itertools, os, sys, time
import gptoss_stream.cli.main
import gptoss_stream.planning.shards
from gptoss_stream.writing import executor, shard_in_progress
from gptoss_stream.writing.shard_file import ShardFile
executor.CHUNK_NBYTES = 1 << 14
shard_in_progress.JOURNAL_SECONDS = 0
gptoss_stream.planning.shards.SPILL_NBYTES = 1000
write, numbers = ShardFile.write, itertools.count(1)
def disturbed(self, chunk, offset):
    write(self, chunk, offset)
    number = next(numbers)
    {disturbance}
ShardFile.write = disturbed
sys.exit(gptoss_stream.cli.main.main())
"""


def child(disturbance: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command line in a process that calls `disturbance` after each write."""
    code = CHILD.format(disturbance=disturbance)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)


def killed_at(number: int, *arguments: object) -> None:
    """Run a command line in a process that kills itself after a number of writes."""
    done = child(f"if number == {number}: os.kill(os.getpid(), 9)", *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 16 KiB, and a journal after each."""
    monkeypatch.setattr("gptoss_stream.writing.executor.CHUNK_NBYTES", CHUNK)
    monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", 1000)
    monkeypatch.setattr(shard_in_progress, "JOURNAL_SECONDS", 0)


@pytest.fixture
def written(monkeypatch) -> list[int]:
    """The offsets of the chunks that this process writes."""
    offsets: list[int] = []
    write = ShardFile.write

    def noting(self, chunk, offset):
        offsets.append(offset)
        write(self, chunk, offset)

    monkeypatch.setattr(ShardFile, "write", noting)
    return offsets
