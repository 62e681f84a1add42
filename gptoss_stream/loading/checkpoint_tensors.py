"""The tensors of a checkpoint by name, and the bytes of each, without torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._utils.failures import machine_error
from ..checkpoint.metadata import CheckpointInfo, read_metadata
from ..checkpoint.open_reader import open_random_access
from ..planning.plan import Plan
from ..planning.plan_readers import open_plan_random_access
from ..planning.shards import parse_size_or_zero
from ..storage.block_cache import BlockCache, default_cache_folder
from ..storage.location import Location
from ..tensors.dtypes import DType
from ..tensors.raw_tensor import RawTensor
from ..transforms.operands import DenseOperand
from ..transforms.output_tensor import OutputTensor, Segment
from ..transforms.rearrangement import make_rearrangement
from ..writing.run_state import refuse_unfinished
from .tensor_loader import TensorLoader

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CheckpointTensors", "NamedTensor", "planned_tensors", "read_finished", "stored_tensors"]

_FLOATS = (DType.BF16, DType.F16, DType.F32)
_SLICE_NBYTES = 16 << 20
"""The most bytes that are made at a time, unless a row has more."""
_TRANSPOSED_NBYTES = 128 << 20
"""The same for a transposition, of which each slice takes reading all of the source's tensor."""


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor of a checkpoint, or of what it would be converted to."""

    tensor: OutputTensor
    """How its bytes are made. Those of a stored tensor are bytes in one axis to it."""
    shape: tuple[int, ...]
    dtype: DType
    """What its bytes mean."""
    is_aligned: bool = True
    """Whether bytes that are used as they are stored begin at a multiple of an element's size."""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.tensor.nbytes


@dataclass(frozen=True, slots=True)
class CheckpointTensors:
    """The tensors of a checkpoint by name, and what makes them."""

    location: Location
    entries: Mapping[str, NamedTensor]
    loader: TensorLoader
    format: str = ""
    """The format whose names they have; empty for the source's own."""

    def slices(self, name: str) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the bytes of a tensor in order, whole elements at a time, in bounded memory.

        Yields:
            [n] uint8, which is overwritten by the next one.
        """
        import numpy as np

        tensor = self.entries[name].tensor
        transposes = any(segment.rearrangement.transposes for segment in tensor.segments)
        row_nbytes = prod(tensor.shape[1:]) * tensor.dtype.itemsize
        most = _TRANSPOSED_NBYTES if transposes else _SLICE_NBYTES
        step = max(1, most // max(1, row_nbytes)) * row_nbytes
        memory = np.empty(min(step, tensor.nbytes), np.uint8)
        for begin in range(0, tensor.nbytes, max(1, step)):
            end = min(tensor.nbytes, begin + step)
            self.loader.make_into(tensor, begin, end, memory[: end - begin])
            yield memory[: end - begin]


def read_finished(location: Location) -> CheckpointInfo:
    """Read the metadata of a checkpoint or of a finished output.

    Raises:
        CheckpointError: If there is none, or it is damaged.
        OutputError: For an unfinished output.
        MachineError: If reading fails.
    """
    try:
        refuse_unfinished(location)
    except OSError as error:
        raise machine_error(error, f"reading {location}") from error
    return read_metadata(location)


def stored_tensors(
    info: CheckpointInfo, dtype: DType | None = None, cache: int | str = 0
) -> CheckpointTensors:
    """Return the tensors that a checkpoint stores, under their names.

    Args:
        info: The checkpoint.
        dtype: What BF16, F16 and F32 are cast to; None for no casts.
        cache: Disk space for what is read of a remote checkpoint (see `open_state_dict`).
    """
    entries = {name: _stored(raw, dtype) for name, raw in info.tensors.items()}
    blocks = _block_cache(info.location, cache)
    open_readers = partial(open_random_access, info, [], Path(tempfile.gettempdir()), blocks)
    return CheckpointTensors(info.location, entries, TensorLoader(info, open_readers))


def planned_tensors(plan: Plan, cache: int | str = 0) -> CheckpointTensors:
    """Return the tensors that a plan would write.

    Args:
        plan: The plan, without a reference.
        cache: Disk space for what is read of a remote checkpoint (see `open_state_dict`).
    """
    entries = {
        tensor.name: NamedTensor(tensor, tensor.shape, tensor.dtype)
        for shard in plan.shards
        for tensor in shard.tensors
    }
    blocks = _block_cache(plan.info.location, cache)
    open_readers = partial(open_plan_random_access, plan, Path(tempfile.gettempdir()), blocks)
    return CheckpointTensors(
        plan.info.location, entries, TensorLoader(plan.info, open_readers), plan.to
    )


def _block_cache(location: Location, size: int | str) -> BlockCache | None:
    """Return the cache of blocks on the disk; None for none, and for a local source."""
    nbytes = parse_size_or_zero(size)
    if not nbytes or location.is_local:
        return None
    return BlockCache(default_cache_folder(), nbytes)


def _stored(raw: RawTensor, dtype: DType | None) -> NamedTensor:
    """Return a stored tensor: its elements if they are cast, else its bytes."""
    if dtype is None or raw.dtype is dtype or raw.dtype not in _FLOATS:
        size = (raw.nbytes,)
        tensor = _flat(replace(raw, dtype=DType.U8, shape=size), DType.U8)
        is_aligned = raw.offset % max(1, raw.dtype.itemsize) == 0
        return NamedTensor(tensor, raw.shape, raw.dtype, is_aligned)
    return NamedTensor(_flat(replace(raw, shape=(prod(raw.shape),)), dtype), raw.shape, dtype)


def _flat(raw: RawTensor, dtype: DType) -> OutputTensor:
    """Return a raw tensor of one axis as an output tensor."""
    segment = Segment(
        DenseOperand(raw, 0, raw.shape), make_rearrangement(("x",), ("x",), raw.shape)
    )
    return OutputTensor(raw.name, dtype, raw.shape, (segment,))
