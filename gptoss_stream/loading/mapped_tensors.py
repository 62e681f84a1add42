"""Tensors that are views of memory-mapped files: their data is read when it is used.

An output tensor is one if its elements are stored as they are wanted, in whatever order of axes:
`W_U` [hidden, vocabulary] is `lm_head` [vocabulary, hidden] with other strides.
"""

from __future__ import annotations

import mmap
import threading
from math import prod
from typing import TYPE_CHECKING

from .._utils.failures import machine_error
from ..checkpoint.metadata import CheckpointInfo
from ..checkpoint.open_files import OpenFiles
from ..storage.local_folder import LocalFile
from ..tensors.raw_tensor import RawTensor
from ..transforms.operands import DenseOperand
from ..transforms.output_tensor import OutputTensor
from .torch_dtypes import torch_dtype

if TYPE_CHECKING:
    import torch

__all__ = ["MappedTensors"]


class MappedTensors:
    """The tensors of a checkpoint as views of its mapped files, from any thread.

    A file is mapped when one of its tensors is first used, and unmapped with its last view.

    Args:
        info: The checkpoint; nothing of a remote one can be mapped.
    """

    def __init__(self, info: CheckpointInfo) -> None:
        self._info = info
        self._files = OpenFiles(info)
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close all files. Views stay valid."""
        self._files.close()
        self._maps.clear()

    def can_map(self, tensor: OutputTensor) -> bool:
        """Return whether `view` can give a tensor. No data is read."""
        import torch

        operand = _operand(tensor)
        if operand is None or not self._info.location.is_local:
            return False
        try:
            _arranged(torch.empty(operand.stored_shape, device="meta"), operand, tensor)
        except RuntimeError:  # no strides give the axes in this order
            return False
        return True

    def view(self, tensor: OutputTensor) -> torch.Tensor:
        """Return a tensor that can be mapped, as a view of its file.

        Raises:
            CheckpointError: If the file has changed since its header was read.
            MachineError: If it cannot be mapped.
        """
        operand = _operand(tensor)
        assert operand is not None
        end = operand.first + prod(operand.stored_shape)
        stored = self._flat(operand.raw)[operand.first : end].view(operand.stored_shape)
        return _arranged(stored, operand, tensor)

    def _flat(self, raw: RawTensor) -> torch.Tensor:
        """Return all elements of a raw tensor, [elements]."""
        import torch

        dtype = torch_dtype(raw.dtype, raw.name)
        count = raw.nbytes // raw.dtype.itemsize
        if count == 0:
            return torch.empty(0, dtype=dtype)
        file = self._files.file(raw.shard)
        file.check_unchanged()
        assert isinstance(file, LocalFile)
        with self._lock:
            if raw.shard not in self._maps:
                try:
                    self._maps[raw.shard] = file.map()
                except OSError as error:
                    where = self._info.location.display_path(raw.shard)
                    raise machine_error(error, f"mapping {where}") from error
            mapped = self._maps[raw.shard]
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=raw.offset)


def _operand(tensor: OutputTensor) -> DenseOperand | None:
    """Return the operand that holds a tensor's elements as they are wanted, if there is one."""
    if len(tensor.segments) != 1:
        return None
    segment = tensor.segments[0]
    operand = segment.operand
    if not isinstance(operand, DenseOperand) or segment.encoding is not None:
        return None
    raw = operand.raw
    is_aligned = raw.offset % raw.dtype.itemsize == 0
    is_of_source = raw.checkpoint == 0
    return operand if raw.dtype is tensor.dtype and is_aligned and is_of_source else None


def _arranged(stored: torch.Tensor, operand: DenseOperand, tensor: OutputTensor) -> torch.Tensor:
    """Return a view of stored elements [*stored_shape] as the tensor that they make."""
    if operand.selected is not None:
        chosen = operand.selected
        index = slice(chosen.start, chosen.stop, chosen.step)
        stored = stored[(*[slice(None)] * operand.axis, index)]
    rearrangement = tensor.segments[0].rearrangement
    source = rearrangement.source_axes
    return stored.permute([source.index(axis) for axis in rearrangement.axes]).view(tensor.shape)
