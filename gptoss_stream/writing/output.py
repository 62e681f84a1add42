"""An output folder from empty, or from where an earlier run stopped, to finished.

What every producer of shards goes through: refuse what cannot end well, say how much is finished,
make the rest, and finish in the order that leaves nothing half-written looking whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from .._utils.failures import machine_error
from ..checkpoint.auxiliary_files import CopiedFile
from ..errors import OptionError, OutputError
from ..planning.partition import ArrayTask
from ..planning.shards import PlannedShard, write_nbytes
from ..tensors.safetensors_header import build_index
from .disk_space import _size_on_disk, check_space, disk_full, is_disk_full
from .executor import Callbacks
from .output_folder import JoinedOutputFolder, OutputFolder
from .run_state import fingerprint

__all__ = ["Executor", "OutputResult", "OutputSpec", "write_output"]


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """What an output folder will hold.

    `identity`, of JSON values, tells one run from another and becomes the record; `companions`
    are the small files, as bytes or as what is copied.
    """

    identity: Mapping[str, Any]
    shards: Sequence[PlannedShard]
    auxiliary_files: Mapping[str, bytes | CopiedFile]
    checksums: bool = False

    @property
    def index(self) -> bytes:
        """The index file's text."""
        weight_map = {t.name: shard.name for shard in self.shards for t in shard.tensors}
        return build_index(sum(shard.data_nbytes for shard in self.shards), weight_map)


@dataclass(frozen=True, slots=True)
class OutputResult:
    """What came of making an output: bytes of shards that were finished before, and whether all
    of it is there now, as it is not before the last of several tasks has ended."""

    resumed: int
    is_complete: bool


class Executor(Protocol):
    """Who makes shards: threads of this process (`executor.Threads`), or workers elsewhere."""

    @property
    def in_process(self) -> bool:
        """Whether it is this process, which has to send on what goes to a store."""

    @property
    def peak_rss(self) -> int:
        """The most memory that a process of it has had, in bytes."""

    def setup(self, work: Path | None) -> None:
        """Told of the work folder that the output is made in, where there is one, before anything
        is begun."""

    def make(
        self,
        shards: Sequence[PlannedShard],
        state: Mapping[str, Any],
        folder: Path,
        partials: Path,
        callbacks: Callbacks,
    ) -> None:
        """Make shards of the run that has this state; as `executor.execute`."""


def write_output(
    folder: Path,
    contents: OutputSpec,
    maker: Executor,
    *,
    overwrite: bool,
    on_start: Callable[[int], None],
    on_bytes: Callable[[int], None],
    share: ArrayTask | None = None,
) -> OutputResult:
    """Make `contents`, or a task's `share` of its shards, in `folder`.

    `on_start` is told how many bytes were finished before, and `on_bytes`, from any thread, of
    those that are written. Raises `OutputError`, `MachineError` and what the maker raises.
    """
    shards = contents.shards
    refuse_overwriting_task(share, overwrite=overwrite)
    mine = share.of(shards) if share else shards
    run = OutputFolder(
        folder,
        contents.identity,
        [s.name for s in shards],
        contents.auxiliary_files,
        contents.checksums,
    )
    try:
        if overwrite:
            # What is there is not deleted for a run that cannot succeed.
            check_space(folder, _needed(shards), _size_on_disk(folder))
        for data in contents.auxiliary_files.values():
            if isinstance(data, CopiedFile):
                data.check()
        with run.locked(overwrite=overwrite, task=share.tag if share else None) as partials:
            missing = [shard for shard in mine if not run.is_finished(shard.name, shard.nbytes)]
            resumed = sum(shard.nbytes for shard in mine if shard not in missing)
            check_space(folder, _needed(missing))
            maker.setup(run.work)
            on_start(resumed)
            is_complete = not missing and run.is_complete
            if not is_complete:
                run.begin()
                callbacks = Callbacks(on_bytes, run.save_checksum if contents.checksums else None)
                if share is not None:
                    held = JoinedOutputFolder(folder, fingerprint(run.state))
                    callbacks = replace(callbacks, before_commit=lambda shard: held.check())
                maker.make(missing, run.state, folder, partials, callbacks)
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
    return OutputResult(resumed, is_complete)


def refuse_overwriting_task(share: ArrayTask | None, *, overwrite: bool) -> None:
    """Raise `OptionError` where one task would delete what the others make."""
    if share is not None and overwrite:
        raise OptionError(
            f"{share} would overwrite what the others make; delete the earlier output first"
        )


def _needed(shards: Sequence[PlannedShard]) -> int:
    return sum(map(write_nbytes, shards))
