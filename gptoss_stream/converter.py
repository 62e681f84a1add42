"""The conversion from end to end: plan, check the folder, execute, finish."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import __version__, layouts
from .checkpoint import Checkpoint
from .companions import carried
from .dtypes import torch_name
from .errors import OutputError, user_path
from .memory import available_nbytes, peak_rss_nbytes
from .planner import DEFAULT_LAYOUT, DEFAULT_SHARD_SIZE, Plan, plan
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
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    layout: str = DEFAULT_LAYOUT,
    dtype: str = "bfloat16",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    selection: Selection | None = None,
    source_format: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    checksums: bool = False,
    on_plan: Callable[[Plan, int], None] = lambda plan, resumed: None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> Report:
    """Convert a checkpoint folder to `layout`, into the folder `output`.

    Options as in `plan`; `workers` is the number of threads (by default one more than there are
    processors) and changes speed and memory, never the bytes. `checksums` writes `SHA256SUMS`, of
    all files, as `sha256sum -c` reads it; `overwrite` deletes what an earlier run of this tool
    made in `output`, and nothing else. `on_plan` is told the plan and how many bytes of it were
    finished before, `on_bytes`, from any thread, of bytes written. An interrupted run goes on
    where it stopped when the same call is made again; where all is finished, that does nothing.

    Raises `OptionError`, `CheckpointError`, `OutputError`, `MachineError`; see `errors`.
    """
    from .output import Contents, make_output
    from .workers import count_workers

    started = time.perf_counter()
    threads = count_workers(workers)
    planned = plan(
        source,
        layout=layout,
        dtype=dtype,
        max_shard_size=max_shard_size,
        selection=selection,
        source_format=source_format,
    )
    folder = user_path(output)
    _refuse_overlap(planned.info.path, folder)
    companions: dict[str, bytes | Path] = {
        **{name: planned.info.path / name for name in carried(planned.info.path)},
        **layouts.load(layout).companions(
            planned.model, planned.info.config, planned.dtype, partial=planned.is_partial
        ),
    }
    with Checkpoint(planned.info) as checkpoint:
        resumed = make_output(
            folder,
            Contents(_identity(planned), planned.shards, companions, checksums),
            checkpoint,
            overwrite=overwrite,
            workers=threads,
            on_start=lambda resumed: on_plan(planned, resumed),
            on_bytes=on_bytes,
            scarce=available_nbytes() < 2 * planned.scratch_nbytes + 1_000_000_000,
        )
    return Report(
        output=str(folder),
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


def _identity(planned: Plan) -> dict[str, Any]:
    """What makes two runs the same run; also the record of how the output was made."""
    return {
        "tool": "gptoss_stream",
        "version": __version__,
        "source": os.fsencode(planned.info.path.resolve()).decode(errors="backslashreplace"),
        "source_files": {s.name: [s.nbytes, s.mtime_ns] for s in planned.info.shards},
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
