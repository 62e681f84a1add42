"""An output folder from empty, or from where an earlier run stopped, to finished.

What every producer of shards goes through: refuse what cannot end well, say how much is finished,
make the rest, and finish in the order that leaves nothing half-written looking whole.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .companions import Carried
from .errors import MachineError, machine_error
from .executor import Watch, execute
from .operands import Reader
from .planner import PlannedShard
from .run_folder import RunFolder
from .safetensors_format import build_index

__all__ = [
    "Contents",
    "check_space",
    "disk_full",
    "free_nbytes",
    "is_disk_full",
    "make_output",
]


@dataclass(frozen=True, slots=True)
class Contents:
    """What an output folder will hold.

    `identity`, of JSON values, tells one run from another and becomes the record; `companions`
    are the small files, as bytes or as what is copied.
    """

    identity: Mapping[str, Any]
    shards: Sequence[PlannedShard]
    companions: Mapping[str, bytes | Carried]
    checksums: bool = False

    @property
    def index(self) -> bytes:
        """The index file's text."""
        weight_map = {t.name: shard.name for shard in self.shards for t in shard.tensors}
        return build_index(sum(shard.data_nbytes for shard in self.shards), weight_map)


def make_output(
    folder: Path,
    contents: Contents,
    reader: Reader,
    *,
    overwrite: bool,
    workers: int,
    on_start: Callable[[int], None],
    on_bytes: Callable[[int], None],
    scarce: bool = False,
) -> int:
    """Make `contents` in `folder`; returns how many bytes of its shards were finished before.

    `on_start` is told these bytes, before anything is made; the rest as in `execute`.
    Raises `OutputError`, `MachineError` and what the reader raises.
    """
    shards = contents.shards
    run = RunFolder(
        folder, contents.identity, [s.name for s in shards], contents.companions, contents.checksums
    )
    try:
        if overwrite:
            # What is there is not deleted for a run that cannot succeed.
            check_space(folder, _needed(shards), _size_on_disk(folder))
        for data in contents.companions.values():
            if isinstance(data, Carried):
                data.check()
        with run.locked(overwrite=overwrite):
            missing = [shard for shard in shards if not run.is_finished(shard.name, shard.nbytes)]
            resumed = sum(shard.nbytes for shard in shards if shard not in missing)
            check_space(folder, _needed(missing))
            on_start(resumed)
            if missing or not run.is_complete:
                run.begin()
                execute(
                    missing,
                    reader,
                    folder,
                    partials=run.work,
                    workers=workers,
                    watch=Watch(on_bytes, run.note_sum if contents.checksums else None),
                    scarce=scarce,
                )
                run.finish(contents.index)
    except OSError as error:
        if is_disk_full(error):
            left = [shard for shard in shards if not run.is_finished(shard.name, shard.nbytes)]
            raise disk_full(error, folder, _needed(left)) from error
        raise machine_error(error, f"writing to {folder}") from error
    return resumed


def _needed(shards: Sequence[PlannedShard]) -> int:
    return sum(shard.nbytes + shard.scratch_nbytes for shard in shards)


def free_nbytes(folder: Path) -> int:
    """Bytes that can still be written to the file system of a folder, which need not exist."""
    try:
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        status = os.statvfs(there)
    except OSError as error:
        raise machine_error(error, f"asking for the free space of {folder}") from error
    return status.f_bavail * status.f_frsize


def check_space(folder: Path, needed: int, given_up: int = 0) -> None:
    """Refuse to begin what cannot end; `given_up` bytes will be deleted first."""
    free = free_nbytes(folder) + given_up
    if needed > free:
        raise MachineError(
            f"{folder}: {_size(needed)} are needed and {_size(free)} are free; "
            f"free {_size(needed - free)} or name another output"
        )


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that the disk, or the user's part of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full(error: OSError, folder: Path, needed: int) -> MachineError:
    """The error for a disk that is full, with `needed` bytes still to be written."""
    free = free_nbytes(folder)
    full = (
        "your quota of the disk is used up" if error.errno == errno.EDQUOT else "the disk is full"
    )
    missing = f", {_size(needed - free)} too little" if needed > free else ""
    return MachineError(
        f"{folder}: {full}: {_size(needed)} are still to be written and {_size(free)} are free"
        f"{missing}; make room and run the same command again: what is finished stays"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def _size_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
