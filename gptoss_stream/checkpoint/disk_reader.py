"""Reads the tensor data of a checkpoint on a disk by a schedule, past the page cache.

Filling the page cache and copying from it takes more of the processor's time than converting. So
threads read blocks of the files (`disk_blocks`) into memory of this process, ahead of the steps
that need them and in the order of these. Memory is bounded: blocks are read ahead within a budget,
and beyond it only what the earliest step that is running needs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from .._utils.buffers import aligned_buffer
from ..storage.local_folder import LocalFile
from ..storage.location import NEVER_STOP
from ..tensors.raw_tensor import RawTensor
from .disk_blocks import Block, NeededBlocks, Piece
from .metadata import CheckpointInfo
from .open_files import OpenFiles
from .reader import ElementRange, ReadSchedule, StoppedError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BLOCK_NBYTES", "BUDGET_NBYTES", "DiskReader"]

BLOCK_NBYTES = 2 << 20
"""Bytes that are read at a time, at most. With 1 MiB the system takes half as much time again."""
BUDGET_NBYTES = 32 << 20
"""Memory for blocks by default, in bytes: as much as one expert of floats, or four in MXFP4."""
_THREADS = 3
_POLL_SECONDS = 0.1  # how often waiting threads look at the stop event


class DiskReader:
    """A `Reader` of a local checkpoint, from any thread; a context manager.

    What a step reads beyond its schedule is read when it is needed. Methods raise `CheckpointError`
    if a file has changed since its header was read, and `MachineError` if reading fails.

    Args:
        info: The checkpoint.
        budget_nbytes: Memory for blocks, in bytes.
        block_nbytes: The most bytes of a block, a multiple of 4096.
    """

    def __init__(
        self,
        info: CheckpointInfo,
        budget_nbytes: int = BUDGET_NBYTES,
        block_nbytes: int = BLOCK_NBYTES,
    ) -> None:
        self.info = info
        self._files = OpenFiles(info)
        self._sizes = budget_nbytes, block_nbytes
        self._blocks = NeededBlocks(ReadSchedule(0, lambda step: ()), *self._sizes)
        self._stop = NEVER_STOP
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()  # of all that follows, and of the blocks
        self._block_arrived = threading.Condition(self._lock)
        self._blocks_changed = threading.Condition(self._lock)
        self._error: BaseException | None = None
        self._is_closed = False
        self._copies: dict[int, list[np.ndarray[Any, Any]]] = {}
        """Memory of each thread for what is in several blocks."""

    def __enter__(self) -> DiskReader:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._is_closed = True
            self._block_arrived.notify_all()
            self._blocks_changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._files.close()

    def set_schedule(self, schedule: ReadSchedule, stop: threading.Event) -> None:
        """Begin to read what the first steps need (see `Reader.set_schedule`)."""
        self._blocks = NeededBlocks(schedule, *self._sizes)
        self._stop = stop
        for _ in range(_THREADS):
            thread = threading.Thread(target=self._read_blocks, daemon=True)
            self._threads.append(thread)
            thread.start()

    def begin_step(self, step: int) -> None:
        """Read what this step needs, even beyond the budget once it is the earliest."""
        with self._lock:
            self._blocks.begin_step(step)
            self._blocks_changed.notify_all()

    def end_step(self, step: int) -> None:
        """Drop the blocks that no other step needs."""
        with self._lock:
            self._blocks.end_step(step)
            self._blocks_changed.notify_all()

    @contextmanager
    def read(
        self, tensor: RawTensor, first: int, shape: tuple[int, ...]
    ) -> Iterator[np.ndarray[Any, Any]]:
        """Read elements of a tensor (see `Reader.read`)."""
        from ..tensors.cast import STORAGE

        one = ElementRange(tensor, first, prod(shape))
        with self._lock:
            pieces = [(piece, self._blocks.hold(piece)) for piece in self._blocks.pieces(one)]
        try:
            with self._bytes_of(one, pieces) as found:
                array = found.view(STORAGE[tensor.dtype]).reshape(shape)
                array.flags.writeable = False
                yield array
        finally:
            with self._lock:
                for piece, block in pieces:
                    if block is not None:
                        self._blocks.release(piece, block)
                self._blocks_changed.notify()

    @contextmanager
    def _bytes_of(
        self, one: ElementRange, pieces: list[tuple[Piece, Block | None]]
    ) -> Iterator[np.ndarray[Any, Any]]:
        """Give the memory of elements: that of their block, or a copy if there are several."""
        with self._lock:
            for _, block in pieces:
                if block is not None:
                    self._wait_for(block)
        if len(pieces) == 1 and pieces[0][1] is not None:
            yield pieces[0][1].bytes_of(pieces[0][0])
            return
        nbytes, done = one.byte_range[1], 0
        free = self._copies.setdefault(threading.get_ident(), [])
        memory = free.pop() if free else aligned_buffer(nbytes)
        if len(memory) < nbytes:
            memory = aligned_buffer(nbytes)
        for piece, block in pieces:
            part = memory[done : done + piece.end - piece.begin]
            if block is None:
                file = self._files.file(one.raw.shard)
                file.read_into(part.data, piece.begin, self._stop)
            else:
                part[:] = block.bytes_of(piece)
            done += len(part)
        yield memory[:nbytes]
        free.append(memory)

    def _wait_for(self, block: Block) -> None:
        """Wait, with the lock, until a block has been read."""
        while not block.has_arrived:
            if self._error is not None:
                raise self._error
            if self._stop.is_set() or self._is_closed:
                raise StoppedError
            self._block_arrived.wait(_POLL_SECONDS)

    def _read_blocks(self) -> None:
        """Read one block after another; run by each of the threads."""
        try:
            while (block := self._next_block()) is not None:
                file, memory = self._files.file(block.cell[0]), block.memory
                assert isinstance(file, LocalFile)
                assert memory is not None
                file.read_past_cache(memory[: block.end - block.begin], block.begin, self._stop)
                with self._lock:
                    self._blocks.arrived(block)
                    self._block_arrived.notify_all()
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
                self._block_arrived.notify_all()

    def _next_block(self) -> Block | None:
        """Wait until a block is to be read; None at the end of the run."""
        with self._lock:
            while not (self._stop.is_set() or self._is_closed or self._error):
                block = self._blocks.next_to_read()
                if block is not None:
                    return block
                self._blocks_changed.wait(_POLL_SECONDS)
        return None

    def check_unchanged(self) -> None:
        """Check that no file has changed since it was opened (see `Reader.check_unchanged`)."""
        self._files.check_unchanged()
