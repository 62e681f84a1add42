"""Decoded matrices of experts that are kept for later passes."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..loading.tensor_loader import TensorLoader
from ..transforms.output_tensor import OutputTensor

__all__ = ["ExpertCache"]


class _Kept:
    """The memory of a decoded matrix, and how many callers are using it."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.users = 1


class ExpertCache:
    """Keeps the matrices that were used last, from any thread.

    The memory of those that go is used again, since new pages cost more than decoding.

    Args:
        loader: Decodes the matrices.
        nbytes: The most bytes of matrices that are kept while none is in use.
    """

    def __init__(self, loader: TensorLoader, nbytes: int) -> None:
        self.nbytes = nbytes
        self._loader = loader
        self._kept: OrderedDict[OutputTensor, _Kept] = OrderedDict()
        self._kept_nbytes = 0
        self._spare: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, tensor: OutputTensor) -> Iterator[torch.Tensor]:
        """Give the memory of a decoded matrix, [nbytes] uint8, valid within the context."""
        with self._lock:
            kept = self._kept.get(tensor)
            if kept is not None:
                kept.users += 1
                self._kept.move_to_end(tensor)
            spare = self._spare[tensor.nbytes]
            memory = spare.pop() if kept is None and spare else None
        if kept is None:
            if memory is None:
                memory = torch.empty(tensor.nbytes, dtype=torch.uint8)
            self._loader.make_into(tensor, 0, tensor.nbytes, memory.numpy())
            kept = self._keep(tensor, _Kept(memory))
        try:
            yield kept.memory
        finally:
            with self._lock:
                kept.users -= 1
                self._drop_oldest()

    def _keep(self, tensor: OutputTensor, decoded: _Kept) -> _Kept:
        """Keep a decoded matrix, unless another thread has decoded it meanwhile."""
        with self._lock:
            if tensor in self._kept:
                self._spare[tensor.nbytes].append(decoded.memory)
                self._kept[tensor].users += 1
                return self._kept[tensor]
            self._kept[tensor] = decoded
            self._kept_nbytes += tensor.nbytes
            return decoded

    def _drop_oldest(self) -> None:
        """Drop what was used longest ago and is not in use; one spare of each size is left."""
        for tensor in [*self._kept]:
            if self._kept_nbytes <= self.nbytes:
                return
            if self._kept[tensor].users == 0:
                self._kept_nbytes -= tensor.nbytes
                spare = self._spare[tensor.nbytes]
                spare[:] = [self._kept.pop(tensor).memory]
