"""What writes the shards of a plan, and how the rest of the run follows it.

An executor is threads of this process (`thread_executor`) or workers of a Dask cluster
(`distributed.dask_executor`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

from ..planning.shards import PlannedShard
from .shard_summary import ShardSummary

__all__ = [
    "CHUNK_NBYTES",
    "Callbacks",
    "Executor",
    "count_shards",
    "memory_nbytes",
    "num_writers",
]

CHUNK_NBYTES = 8 << 20
"""Bytes of a shard that a thread converts, and then writes, at a time."""

_INTERPRETER_NBYTES = 45_000_000  # Python with numpy, einops and tqdm
_THREAD_NBYTES = 6_000_000  # tiles, indices, a row that two chunks share
_REFERENCE_NBYTES = 10_000_000  # of each thread: the blocks of a reference
_ADAPTERS_NBYTES = 30_000_000  # factors in use, a tensor that is being regrouped, BLAS
_MERGING_NBYTES = 8_000_000  # of each thread: tiles in float32
_COMPILED_NBYTES = 130_000_000  # numba and LLVM
_DISK_NBYTES = 70_000_000  # what is read ahead: an expert that is transposed, or 34 MB
_REMOTE_NBYTES = 200_000_000  # blocks that are needed at the same time, and the clients' code


def num_writers(threads: int) -> int:
    """Return the number of threads that only write what others have converted.

    Args:
        threads: Threads that convert. A single one also writes, so that chunks are made and
            written one after another.
    """
    return 2 if threads > 1 else 0


def memory_nbytes(
    threads: int,
    *,
    is_local: bool = True,
    upload_nbytes: int = 0,
    has_reference: bool = False,
    has_adapters: bool = False,
    is_compiled: bool = False,
) -> int:
    """Estimate the peak resident memory of a process that writes shards.

    Args:
        threads: Threads that convert.
        is_local: Whether source and output are local; what is remote takes more memory.
        upload_nbytes: What the client that uploads takes (`open_location.upload_nbytes`).
        has_reference: Whether blocks of a reference are kept.
        has_adapters: Whether adapters are merged.
        is_compiled: Whether compiled code decodes, merges or encodes.

    Returns:
        An upper estimate in bytes.
    """
    per_thread = CHUNK_NBYTES + _THREAD_NBYTES + (_REFERENCE_NBYTES if has_reference else 0)
    nbytes = _INTERPRETER_NBYTES + threads * per_thread + upload_nbytes
    nbytes += num_writers(threads) * CHUNK_NBYTES
    if has_adapters:
        nbytes += _ADAPTERS_NBYTES + threads * _MERGING_NBYTES
    if is_compiled:
        nbytes += _COMPILED_NBYTES
    return nbytes + (_DISK_NBYTES if is_local else _REMOTE_NBYTES)


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Functions that an executor calls as it goes on, from any thread.

    An exception that one of them raises ends the run.
    """

    on_progress: Callable[[int], None] = lambda nbytes: None
    """Called with the number of bytes written since the last call."""
    on_shard_start: Callable[[str, threading.Event], None] = lambda name, stop: None
    """Called before a shard's file is created, with the shard's name and an event. The file is
    created when the call returns; if the call waits, it must return once the event is set."""
    before_commit: Callable[[str, ShardSummary], None] = lambda name, summary: None
    """Called with the name and the summary of a shard that is completely written. The shard gets
    its final name when the call returns."""
    on_shard_finished: Callable[[str], None] = lambda name: None
    """Called with the name of a shard that is finished."""
    on_upload: Callable[[str, bytes], None] = lambda name, receipt: None
    """Called with the name and the receipt (`RemoteFolder.upload`) of a shard that another process
    has uploaded and that is not visible yet."""


def count_shards(
    on_shard: Callable[[int, int], None], finished: int, total: int
) -> Callable[[str], None]:
    """Report how many shards are finished; return an `on_shard_finished` that goes on counting.

    Args:
        on_shard: Called with the number of finished shards and of all, now and later.
        finished: The shards that are finished.
        total: The shards of the run, or of the array task.
    """
    on_shard(finished, total)
    numbers = count(finished + 1)
    return lambda name: on_shard(next(numbers), total)


class Executor(Protocol):
    """Writes the shards of one run."""

    @property
    def in_process(self) -> bool:
        """Whether shards are written by this process, which then also uploads them."""

    @property
    def peak_rss(self) -> int:
        """The peak resident memory, in bytes, of the process that used most."""

    def setup(self, work: Path | None) -> None:
        """Get ready before anything is written.

        Args:
            work: The run's work folder, for a local output.

        Raises:
            OptionError: If workers cannot take part.
        """

    def find_written(self, shards: Sequence[PlannedShard], partial_folder: Path, run: str) -> int:
        """Find what an interrupted run has written of shards, for `write_shards` to go on from.

        Args:
            shards: Shards that are not finished.
            partial_folder: Where they are written.
            run: The fingerprint of the run's state (`run_state.fingerprint`).

        Returns:
            The bytes that are not written again; 0 where interrupted shards are not resumed.
        """

    def write_shards(
        self,
        shards: Sequence[PlannedShard],
        folder: Path,
        partial_folder: Path,
        callbacks: Callbacks,
        *,
        run: str,
        checksums: bool,
    ) -> None:
        """Write shards; when this returns, each is complete, durable and under its final name.

        Args:
            shards: The shards to write.
            folder: Where finished shards go.
            partial_folder: Where shards and spill files are written, on the same file system.
            callbacks: Functions to call on the way.
            run: The fingerprint of the run's state (`run_state.fingerprint`).
            checksums: Whether to compute the SHA-256 of each shard.

        Raises:
            OSError: If writing fails.
            TensorError: If a value cannot be converted.
        """
