"""Writes single tensors of a checkpoint to a file of their own, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from ._utils.failures import machine_error
from .errors import OptionError, OutputError
from .loading.checkpoint_tensors import CheckpointTensors
from .tensors.dtypes import NUMPY_NAMES, DType
from .tensors.safetensors_header import build_header
from .writing.shard_file import sync_folder

__all__ = ["SUFFIXES", "export_tensors"]

SUFFIXES = (".safetensors", ".npy")
"""The kinds of files that can be written."""

_CONFIGS = ("config.json", "source_config.json", "tl_config.json", "adapter_config.json")
"""Files of which a folder of a checkpoint or an adapter has at least one."""


def export_tensors(
    tensors: CheckpointTensors, names: Sequence[str], file: Path, *, overwrite: bool = False
) -> int:
    """Write tensors to a file.

    Args:
        tensors: The tensors of a checkpoint.
        names: Which of them to write.
        file: A .safetensors file for any number of tensors, or a .npy file for one, in which
            bfloat16 becomes float32.
        overwrite: Whether an existing file is replaced.

    Returns:
        The bytes of tensor data that were written.

    Raises:
        OptionError: If the file cannot hold the tensors.
        OutputError: If it exists, and is not to be replaced.
        CheckpointError: If a tensor cannot be made.
        MachineError: If writing fails.
    """
    try:
        _check_file(tensors, names, file, overwrite=overwrite)
        with _atomic(file) as opened:
            if file.suffix == ".npy":
                _write_npy(tensors, names[0], opened)
            else:
                _write_safetensors(tensors, names, opened)
    except OSError as error:
        raise machine_error(error, f"writing {file}") from error
    return sum(tensors.entries[name].nbytes for name in names)


def _check_file(
    tensors: CheckpointTensors, names: Sequence[str], file: Path, *, overwrite: bool
) -> None:
    """Check that tensors can be written to a file; raises as `export_tensors` does."""
    if file.suffix not in SUFFIXES:
        raise OptionError(
            f"{file}: tensors are written to a file that ends in {' or '.join(SUFFIXES)}"
        )
    if file.suffix == ".npy" and len(names) != 1:
        raise OptionError(f"{file}: a .npy file holds one tensor; write .safetensors for several")
    dtype = tensors.entries[names[0]].dtype
    if file.suffix == ".npy" and dtype is not DType.BF16 and dtype not in NUMPY_NAMES:
        raise OptionError(f"{file}: numpy has no dtype for {dtype}; write .safetensors")
    if os.path.lexists(file) and not (overwrite and file.is_file()):
        what = "exists; add --overwrite to replace it" if file.is_file() else "is not a file"
        raise OutputError(f"{file}: {what}")
    folder = file.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"{folder}: there is no such folder; create it")
    if file.suffix == ".safetensors" and any((folder / name).exists() for name in _CONFIGS):
        raise OutputError(
            f"{folder}: a folder of a checkpoint, of which {file.name} would be taken for a part; "
            "write to another folder"
        )


@contextmanager
def _atomic(file: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name when it is complete and on the disk."""
    folder = file.absolute().parent
    # Not from mkstemp, whose files are for the user alone, whatever the umask.
    partial = folder / f".{file.name}-{uuid4().hex}"
    try:
        with partial.open("xb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
        sync_folder(folder)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_safetensors(tensors: CheckpointTensors, names: Sequence[str], opened: BinaryIO) -> None:
    """Write the header, then each tensor slice by slice.

    Those with the largest elements come first, so that all are aligned.
    """
    entries = tensors.entries
    names = sorted(names, key=lambda name: -entries[name].dtype.bits)
    opened.write(build_header((name, entries[name].dtype, entries[name].shape) for name in names))
    for name in names:
        for data in tensors.slices(name):
            opened.write(data.data)


def _write_npy(tensors: CheckpointTensors, name: str, opened: BinaryIO) -> None:
    """Write a tensor in numpy's format."""
    from numpy.lib import format as npy

    from .tensors.cast import STORAGE, as_float32

    entry = tensors.entries[name]
    # numpy has no bfloat16, and float32 holds all its values.
    dtype = DType.F32 if entry.dtype is DType.BF16 else entry.dtype
    header = {"descr": NUMPY_NAMES[dtype], "fortran_order": False, "shape": entry.shape}
    npy.write_array_header_1_0(opened, header)
    for data in tensors.slices(name):
        if entry.dtype is DType.BF16:
            opened.write(as_float32(data.view(STORAGE[entry.dtype]), entry.dtype).data)
        else:
            opened.write(data.data)
