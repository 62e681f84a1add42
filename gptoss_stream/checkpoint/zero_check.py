"""Checks whether a stored tensor is zero, while a conversion is planned."""

from __future__ import annotations

from contextlib import closing

from .._utils.failures import machine_error
from ..storage.location import NEVER_STOP
from ..tensors.raw_tensor import RawTensor
from .metadata import CheckpointInfo

__all__ = ["is_zero"]

_BLOCK_NBYTES = 1 << 20


def is_zero(info: CheckpointInfo, raw: RawTensor) -> bool:
    """Read a tensor of floats and return whether all its elements are zero, of either sign."""
    import numpy as np

    integer = np.dtype(f"u{raw.dtype.itemsize}")
    try:
        with closing(info.location.open(raw.shard)) as file:
            for begin in range(0, raw.nbytes, _BLOCK_NBYTES):
                block = bytearray(min(_BLOCK_NBYTES, raw.nbytes - begin))
                file.read_into(memoryview(block), raw.offset + begin, NEVER_STOP)
                if (np.frombuffer(block, integer) << 1).any():  # without the sign
                    return False
    except OSError as error:
        raise machine_error(error, f"reading {info.location.display_path(raw.shard)}") from error
    return True
