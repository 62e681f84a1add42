"""The conversion from end to end: plan, check the folder, execute, finish."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import __version__, layouts
from .companions import Carried, carried
from .dtypes import torch_name
from .errors import OutputError, user_path
from .far_folder import FarFolder
from .memory import available_nbytes, peak_rss_nbytes
from .places import Folder, Name, Store, open_place, open_store
from .planner import DEFAULT_LAYOUT, DEFAULT_SHARD_SIZE, Plan, plan
from .run_state import RUN_NAME, parse_state
from .selection import Selection

__all__ = ["Report", "convert"]


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did. Sizes in bytes; `shards` maps file names to sizes."""

    output: str
    layout: str
    dtype: str
    partial: bool
    tensors: int
    bytes_in: int
    bytes_out: int
    bytes_resumed: int
    seconds: float
    peak_rss: int
    shards: dict[str, int]
    unused: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return asdict(self)


def convert(
    source: Name,
    output: str | os.PathLike[str] | Store,
    *,
    layout: str = DEFAULT_LAYOUT,
    dtype: str = "bfloat16",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    selection: Selection | None = None,
    source_format: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    checksums: bool = False,
    staging: str | os.PathLike[str] | None = None,
    max_staged: int = 2,
    on_plan: Callable[[Plan, int], None] = lambda plan, resumed: None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> Report:
    """Convert a checkpoint to `layout`, into the folder `output`.

    `source` is a folder, a repository of the Hub or a URL (see `open_place`, which also opens one
    at a revision); `output` is a folder, or a URL or repository as `open_store` takes it. What is
    remote is read by byte range as it is needed, and written shard by shard: at most `max_staged`
    shards are on this machine's disk at a time, in a folder in `staging` (by default in the user's
    cache).

    Options as in `plan`; `workers` is the number of threads (by default one more than there are
    processors) and changes speed and memory, never the bytes. `checksums` writes `SHA256SUMS`, of
    all files, as `sha256sum -c` reads it; `overwrite` deletes what an earlier run of this tool
    made in `output`, and nothing else. `on_plan` is told the plan and how many bytes of it were
    finished before, `on_bytes`, from any thread, of bytes written. An interrupted run goes on
    where it stopped when the same call is made again; where all is finished, that does nothing.

    Raises `OptionError`, `CheckpointError`, `OutputError`, `MachineError`; see `errors`.
    """
    from .output import Contents, make_output
    from .remote_output import make_remote_output, staging_folder
    from .streaming import open_checkpoint
    from .workers import count_workers

    started = time.perf_counter()
    threads = count_workers(workers)
    target = _target(output)
    place = open_place(source)
    if not overwrite:
        place = place.pinned(_unfinished(target))
    planned = plan(
        place,
        layout=layout,
        dtype=dtype,
        max_shard_size=max_shard_size,
        selection=selection,
        source_format=source_format,
    )
    if isinstance(place, Folder) and isinstance(target, Path):
        _refuse_overlap(place.path, target)
    companions: dict[str, bytes | Carried] = {
        **{file.name: file for file in carried(place)},
        **layouts.load(layout).companions(
            planned.model, planned.info.config, planned.dtype, partial=planned.is_partial
        ),
    }
    contents = Contents(_identity(planned), planned.shards, companions, checksums)
    scarce = available_nbytes() < 2 * planned.scratch_nbytes + 1_000_000_000
    with open_checkpoint(planned.info, ahead=0 if scarce else threads) as checkpoint:
        make: Callable[..., int]
        if isinstance(target, Path):
            make = partial(make_output, target)
        else:
            make = partial(
                make_remote_output,
                target,
                staging=staging_folder(target, staging),
                max_staged=max_staged,
            )
        resumed = make(
            contents,
            checkpoint,
            overwrite=overwrite,
            workers=threads,
            on_start=lambda resumed: on_plan(planned, resumed),
            on_bytes=on_bytes,
            scarce=scarce,
        )
    return Report(
        output=str(target),
        layout=layout,
        dtype=dtype,
        partial=planned.is_partial,
        tensors=planned.num_tensors,
        bytes_in=planned.source_nbytes,
        bytes_out=planned.nbytes,
        bytes_resumed=resumed,
        seconds=time.perf_counter() - started,
        peak_rss=peak_rss_nbytes(),
        shards={shard.name: shard.nbytes for shard in planned.shards},
        unused=planned.unused,
    )


def _target(output: str | os.PathLike[str] | Store) -> Path | Store:
    """Where to write to: a folder of this machine, or a store."""
    if not isinstance(output, (str, os.PathLike)):
        return output
    return open_store(output) or user_path(output)


def _unfinished(target: Path | Store) -> Mapping[str, Any] | None:
    """The state of the run that is to be resumed, if there is one."""
    if not isinstance(target, Path):
        return FarFolder(target).unfinished
    try:
        return parse_state((target / RUN_NAME).read_bytes(), str(target / RUN_NAME))
    except (OSError, OutputError):
        return None  # or nothing that can be: that is found out when the folder is taken


def _identity(planned: Plan) -> dict[str, Any]:
    """What makes two runs the same run; also the record of how the output was made."""
    place = planned.info.place
    return {
        "tool": "gptoss_stream",
        "version": __version__,
        "source": place.identity,
        **({"source_revision": place.revision} if place.revision else {}),
        "source_files": {s.name: [s.nbytes, s.version] for s in planned.info.shards},
        "source_config": _digest(json.dumps(planned.info.config, sort_keys=True).encode()),
        "source_format": planned.source_format,
        "layout": planned.layout,
        "partial": planned.is_partial,
        "selection": planned.selection.as_dict(),
        "dtype": torch_name(planned.dtype),
        "max_shard_size": planned.max_shard_size,
        "unused": list(planned.unused),
        "plan": _digest(
            *(
                f"{raw.shard} {raw.name} {raw.dtype.code} {raw.shape} {raw.offset}\n".encode()
                for raw in planned.info.tensors.values()
            ),
            *(shard.name.encode() + shard.header for shard in planned.shards),
        ),
    }


def _digest(*texts: bytes) -> str:
    return hashlib.sha256(b"".join(texts)).hexdigest()


def _refuse_overlap(source: Path, output: Path) -> None:
    """Refuse an output that is the source, or of which one lies inside the other."""
    here, there = source.resolve(), output.resolve()
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
