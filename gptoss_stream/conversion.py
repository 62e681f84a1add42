"""The conversion from end to end: plan, check the folder, execute, finish."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import formats
from ._utils.memory import peak_rss_nbytes
from ._utils.paths import user_path
from .checkpoint.auxiliary_files import CopiedFile, find_auxiliary_files
from .errors import OptionError, OutputError
from .model.selection import Selection
from .planning.plan import DEFAULT_FORMAT, Plan, plan
from .planning.shards import DEFAULT_SHARD_SIZE
from .storage.local_folder import LocalFolder
from .storage.location import LocationLike, WritableLocation
from .storage.open_location import open_location, open_writable_location
from .writing.remote_folder import RemoteFolder
from .writing.run_state import RUN_NAME, parse_state

if TYPE_CHECKING:
    import distributed

__all__ = ["Report", "convert"]


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did. Sizes in bytes; `shards` maps file names to sizes.

    `complete` is whether all of the output is there, as it is not before the last of several tasks
    has ended; `bytes_in` and `bytes_out` are those of the whole output, of which `bytes_resumed`
    (of this task's shards) were there before; `peak_rss` is the largest of all processes'.
    `narrowed` counts the tensors that lost precision, by dtypes ("F32 to BF16").
    """

    output: str
    format: str
    dtype: str
    partial: bool
    complete: bool
    tensors: int
    bytes_in: int
    bytes_out: int
    bytes_resumed: int
    seconds: float
    peak_rss: int
    shards: dict[str, int]
    unmapped: tuple[str, ...]
    narrowed: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return asdict(self)


def convert(
    source: LocationLike,
    output: str | os.PathLike[str] | WritableLocation,
    *,
    to: str = DEFAULT_FORMAT,
    source_format: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    selection: Selection | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    checksums: bool = False,
    staging: str | os.PathLike[str] | None = None,
    max_staged: int = 2,
    client: distributed.Client | None = None,
    task: tuple[int, int] | None = None,
    on_plan: Callable[[Plan, int], None] = lambda plan, resumed: None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> Report:
    """Convert a checkpoint to the format `to`, into the folder `output`.

    `source` is a folder, a repository of the Hub or a URL (see `open_place`, which also opens one
    at a revision); `output` is a folder, or a URL or repository as `open_store` takes it. What is
    remote is read by byte range as it is needed, and written shard by shard: at most `max_staged`
    shards are on this machine's disk at a time, in a folder in `staging` (by default in the user's
    cache).

    Options as in `plan`; `workers` is the number of threads (by default one more than there are
    processors, at most 8) and changes speed and memory, never the bytes. `checksums` writes
    `SHA256SUMS`, of all files, as `sha256sum -c` reads it; `overwrite` deletes what an earlier run
    of this tool made in `output`, and nothing else. `on_plan` is told the plan and how many bytes
    of it were finished before, `on_bytes`, from any thread, of bytes written. An interrupted run
    goes on where it stopped when the same call is made again; where all is finished, that does
    nothing.

    With a Dask `client` its workers make the shards, each one at a time with `workers` threads (by
    default one more than the worker has, at most 8); they must see source and output by the same
    names. `task` (index, count) makes but that part of the shards, beside other processes that make
    the rest; the one that completes the set writes the index.

    Raises `OptionError`, `CheckpointError`, `OutputError`, `MachineError`, and
    `MissingPackageError` where an extra is not installed; see `errors`.
    """
    from ._utils.thread_pool import count_workers
    from .checkpoint.open_reader import open_reader
    from .distributed.task_spec import TaskSpec
    from .planning.partition import ArrayTask
    from .planning.run_identity import run_identity
    from .writing.executor import Threads
    from .writing.output import Executor, OutputSpec, write_output
    from .writing.remote_output import staging_folder, write_remote_output
    from .writing.spill_file import is_memory_low

    started = time.perf_counter()
    threads = count_workers(workers)
    share = ArrayTask(*task) if task is not None else None
    if share is not None and client is not None:
        raise OptionError(f"{share} is for runs without a scheduler; give one of both")
    target = _target(output)
    location = open_location(source)
    if not overwrite:
        location = location.pinned_to(_unfinished(target))
    options: dict[str, Any] = {
        "to": to,
        "source_format": source_format,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "selection": selection,
    }
    planned = plan(location, **options)
    if isinstance(location, LocalFolder) and isinstance(target, Path):
        _refuse_overlap(location.path, target)
    auxiliary_files: dict[str, bytes | CopiedFile] = {
        **{file.name: file for file in find_auxiliary_files(location)},
        **formats.load(to).files(
            planned.model, planned.info.config, planned.main_dtype, partial=planned.is_partial
        ),
    }
    contents = OutputSpec(run_identity(planned), planned.shards, auxiliary_files, checksums)
    low_memory = is_memory_low(planned)
    with open_reader(planned.info, ahead=0 if low_memory else threads) as checkpoint:
        maker: Executor = Threads(checkpoint, threads, low_memory)
        if client is not None:
            from .distributed.dask_executor import DaskExecutor

            there = os.path.realpath(target) if isinstance(target, Path) else target.identity
            room = None if staging is None else str(user_path(staging).absolute())
            job = TaskSpec(
                location.identity, there, options, contents.identity, checksums, threads, room
            )
            maker = DaskExecutor(client, job, threads=workers)
        make = (
            partial(write_output, target)
            if isinstance(target, Path)
            else partial(
                write_remote_output,
                target,
                staging=staging_folder(target, staging, share),
                max_staged=max_staged,
            )
        )
        done = make(
            contents,
            maker,
            overwrite=overwrite,
            share=share,
            on_start=lambda resumed: on_plan(planned, resumed),
            on_bytes=on_bytes,
        )
    return Report(
        output=str(target),
        format=to,
        dtype=planned.dtype,
        partial=planned.is_partial,
        complete=done.is_complete,
        tensors=planned.num_tensors,
        bytes_in=planned.source_nbytes,
        bytes_out=planned.nbytes,
        bytes_resumed=done.resumed,
        seconds=time.perf_counter() - started,
        peak_rss=max(maker.peak_rss, peak_rss_nbytes()),
        shards={shard.name: shard.nbytes for shard in planned.shards},
        unmapped=planned.unmapped,
        narrowed=planned.narrowed,
    )


def _target(output: str | os.PathLike[str] | WritableLocation) -> Path | WritableLocation:
    """Where to write to: a folder of this machine, or a store."""
    if not isinstance(output, (str, os.PathLike)):
        return output
    return open_writable_location(output) or user_path(output)


def _unfinished(target: Path | WritableLocation) -> Mapping[str, Any] | None:
    """The state of the run that is to be resumed, if there is one."""
    if not isinstance(target, Path):
        return RemoteFolder(target).unfinished
    try:
        return parse_state((target / RUN_NAME).read_bytes(), str(target / RUN_NAME))
    except (OSError, OutputError):
        return None  # or nothing that can be: that is found out when the folder is taken


def _refuse_overlap(source: Path, output: Path) -> None:
    """Refuse an output that is the source, or of which one lies inside the other."""
    # Not Path.resolve: before Python 3.13 a loop of links is a RuntimeError there.
    here, there = (Path(os.path.realpath(path)) for path in (source, output))
    for inner, outer in ((here, there), (there, here)):
        if any(_same(folder, outer) for folder in (inner, *inner.parents)):
            raise OutputError(
                f"{output}: output and source ({source}) are one folder, or one lies inside the "
                "other; name another output"
            )


def _same(one: Path, other: Path) -> bool:
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:
        return False
