"""An output folder from empty, or from where an earlier run stopped, to finished.

What every producer of shards goes through: refuse what cannot end well, say how much is finished,
make the rest, and finish in the order that leaves nothing half-written looking whole.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from .companions import Carried
from .errors import MachineError, OptionError, OutputError, machine_error, sized
from .executor import Watch
from .planner import PlannedShard
from .run_folder import JoinedRun, RunFolder
from .run_state import fingerprint
from .safetensors_format import build_index
from .share import Share, cost

__all__ = [
    "Contents",
    "Done",
    "Maker",
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


@dataclass(frozen=True, slots=True)
class Done:
    """What came of making an output: bytes of shards that were finished before, and whether all
    of it is there now, as it is not before the last of several tasks has ended."""

    resumed: int
    is_complete: bool


class Maker(Protocol):
    """Who makes shards: threads of this process (`executor.Threads`), or workers elsewhere."""

    @property
    def is_here(self) -> bool:
        """Whether it is this process, which has to send on what goes to a store."""

    @property
    def peak_rss(self) -> int:
        """The most memory that a process of it has had, in bytes."""

    def meet(self, work: Path | None) -> None:
        """Told of the work folder that the output is made in, where there is one, before anything
        is begun."""

    def make(
        self,
        shards: Sequence[PlannedShard],
        state: Mapping[str, Any],
        folder: Path,
        partials: Path,
        watch: Watch,
    ) -> None:
        """Make shards of the run that has this state; as `executor.execute`."""


def make_output(
    folder: Path,
    contents: Contents,
    maker: Maker,
    *,
    overwrite: bool,
    on_start: Callable[[int], None],
    on_bytes: Callable[[int], None],
    share: Share | None = None,
) -> Done:
    """Make `contents`, or a task's `share` of its shards, in `folder`.

    `on_start` is told how many bytes were finished before, and `on_bytes`, from any thread, of
    those that are written. Raises `OutputError`, `MachineError` and what the maker raises.
    """
    shards = contents.shards
    refuse_overwriting_share(share, overwrite=overwrite)
    mine = share.of(shards) if share else shards
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
        with run.locked(overwrite=overwrite, task=share.tag if share else None) as partials:
            missing = [shard for shard in mine if not run.is_finished(shard.name, shard.nbytes)]
            resumed = sum(shard.nbytes for shard in mine if shard not in missing)
            check_space(folder, _needed(missing))
            maker.meet(run.work)
            on_start(resumed)
            is_complete = not missing and run.is_complete
            if not is_complete:
                run.begin()
                watch = Watch(on_bytes, run.note_sum if contents.checksums else None)
                if share is not None:
                    held = JoinedRun(folder, fingerprint(run.state))
                    watch = replace(watch, on_whole=lambda shard: held.check())
                maker.make(missing, run.state, folder, partials, watch)
                is_complete = run.finish(contents.index, {s.name: s.nbytes for s in shards})
                if share is None and not is_complete:
                    raise OutputError(
                        f"{folder}: a finished shard is no longer there; leave the folder alone "
                        "and run the same command again"
                    )
    except OSError as error:
        if is_disk_full(error):
            left = [shard for shard in shards if not run.is_finished(shard.name, shard.nbytes)]
            raise disk_full(error, folder, _needed(left)) from error
        raise machine_error(error, f"writing to {folder}") from error
    return Done(resumed, is_complete)


def refuse_overwriting_share(share: Share | None, *, overwrite: bool) -> None:
    """Raise `OptionError` where one task would delete what the others make."""
    if share is not None and overwrite:
        raise OptionError(
            f"{share} would overwrite what the others make; delete the earlier output first"
        )


def _needed(shards: Sequence[PlannedShard]) -> int:
    return sum(map(cost, shards))


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
            f"{folder}: {sized(needed)} are needed and {sized(free)} are free; "
            f"free {sized(needed - free)} or name another output"
        )


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that the disk, or the user's part of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full(error: OSError, folder: Path, needed: int) -> MachineError:
    """The error for a disk that is full, with `needed` bytes of shards still to be written."""
    free = free_nbytes(folder)
    full = (
        "your quota of the disk is used up" if error.errno == errno.EDQUOT else "the disk is full"
    )
    missing = f", {sized(needed - free)} too little" if needed > free else ""
    left = f"{sized(needed)} are" if needed else "only the index and other small files are"
    return MachineError(
        f"{folder}: {full}: {left} still to be written and {sized(free)} are free"
        f"{missing}; make room and run the same command again: what is finished stays"
    )


def _size_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
