"""Decodes matrices of experts in the background, in the order in which a pass uses them.

While one thread multiplies with a matrix, another decodes the next ones into memory that is used
again, since new pages cost more than decoding. The files are read further ahead, into the system's
page cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..transforms.output_tensor import OutputTensor

__all__ = ["DecodeAhead"]

_NUM_BUFFERS = 3
"""Matrices in memory: one in use, one that is ready, and one that is being decoded."""
_NUM_READ_AHEAD = 8
"""Matrices whose files are read before they are decoded: 53 MB in MXFP4."""


class DecodeAhead:
    """Decodes matrices into a few buffers, for one thread at a time.

    Args:
        decode: Decodes a matrix into memory, [nbytes] uint8. Called in a thread of its own.
        prefetch: Begins to read what a matrix is made of. Called in that thread too.
        buffer_nbytes: The size of the largest matrix.
    """

    def __init__(
        self,
        decode: Callable[[OutputTensor, torch.Tensor], None],
        prefetch: Callable[[OutputTensor], None],
        buffer_nbytes: int,
    ) -> None:
        self._decode = decode
        self._prefetch = prefetch
        self._buffer_nbytes = buffer_nbytes
        self.begin_again()

    def begin_again(self) -> None:
        """Begin without a thread, as a child process does after a fork."""
        self._executor: ThreadPoolExecutor | None = None
        self._free: list[torch.Tensor] = []
        self._num_buffers = 0
        self._started: dict[OutputTensor, tuple[Future[None], torch.Tensor]] = {}
        self._upcoming: deque[OutputTensor] = deque()
        self._unread: deque[OutputTensor] = deque()
        self._num_read = 0

    def run(self, call: Callable[[], None]) -> None:
        """Run a call in the background thread, after what was begun before."""
        self._background().submit(call)

    def _background(self) -> ThreadPoolExecutor:
        """Return the background thread, which is started when it is first used."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "gptoss_stream-decode")
        return self._executor

    def begin(self, order: Sequence[OutputTensor]) -> None:
        """Begin to decode matrices; what was begun before and is not among them is dropped."""
        wanted = dict.fromkeys(order)
        for tensor in [*self._started]:
            if tensor not in wanted:
                future, memory = self._started.pop(tensor)
                if not future.cancel():
                    future.exception()  # wait: it writes to the memory
                self._free.append(memory)
        self._upcoming = deque(tensor for tensor in wanted if tensor not in self._started)
        self._num_read = 0
        self._unread = deque(self._upcoming)
        self._fill()

    def take(self, tensor: OutputTensor) -> torch.Tensor | None:
        """Return the memory of a matrix that is being decoded, [nbytes] uint8, or None.

        The caller gives it back with `give_back`.
        """
        if tensor not in self._started:
            return None
        future, memory = self._started.pop(tensor)
        try:
            future.result()
        except BaseException:
            self.give_back(memory)
            raise
        return memory

    def give_back(self, memory: torch.Tensor) -> None:
        """Take memory back and decode the next matrix into it."""
        self._free.append(memory)
        self._fill()

    def _fill(self) -> None:
        """Begin to decode as many matrices as there is memory for."""
        while self._upcoming:
            if not self._free:
                if self._num_buffers == _NUM_BUFFERS:
                    return
                self._num_buffers += 1
                self._free.append(torch.empty(self._buffer_nbytes, dtype=torch.uint8))
            tensor, memory = self._upcoming.popleft(), self._free.pop()
            self._started[tensor] = self._background().submit(self._run, tensor, memory), memory

    def _run(self, tensor: OutputTensor, memory: torch.Tensor) -> None:
        """Decode a matrix, and read further ahead before."""
        while self._unread and self._num_read < _NUM_READ_AHEAD:
            self._prefetch(self._unread.popleft())
            self._num_read += 1
        self._decode(tensor, memory[: tensor.nbytes])
        self._num_read -= 1
