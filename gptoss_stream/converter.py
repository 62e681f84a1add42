"""The conversion from end to end: plan, check the folder, execute, finish."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import __version__, layouts
from .checkpoint import Checkpoint
from .companions import carried
from .dtypes import OUTPUT_DTYPES
from .errors import MachineError, OutputError, machine_error, user_path
from .memory import available_nbytes, peak_rss_nbytes
from .planner import DEFAULT_LAYOUT, DEFAULT_SHARD_SIZE, Plan, plan
from .run_folder import RECORD_NAME, RunFolder
from .safetensors_format import INDEX_NAME, build_index

__all__ = ["Report", "convert", "free_nbytes"]


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did. Sizes in bytes; `shards` maps file names to sizes."""

    output: str
    layout: str
    dtype: str
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
    workers: int | None = None,
    overwrite: bool = False,
    on_plan: Callable[[Plan, int], None] = lambda plan, resumed: None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> Report:
    """Convert a checkpoint folder to `layout`, into the folder `output`.

    Options as in `plan`; `workers` is the number of threads (by default one more than there are
    processors) and changes speed and memory, never the bytes. `on_plan` is told the plan and how
    many bytes of it were finished before, `on_bytes`, from any thread, of bytes written. An
    interrupted run goes on where it stopped when the same call is made again.

    Raises `OptionError`, `CheckpointError`, `OutputError`, `MachineError`; see `errors`.
    """
    from .executor import execute
    from .workers import count_workers

    started = time.perf_counter()
    threads = count_workers(workers)
    planned = plan(source, layout=layout, dtype=dtype, max_shard_size=max_shard_size)
    folder = user_path(output)
    _refuse_overlap(planned.info.path, folder)
    companions = layouts.load(layout).companions(planned.model, planned.info.config, planned.dtype)
    copies = list(carried(planned.info.path))
    identity = _identity(planned)
    files = [*copies, *companions, *(s.name for s in planned.shards), RECORD_NAME, INDEX_NAME]
    try:
        if overwrite:
            # What is there is not deleted for a run that cannot succeed.
            _check_space(folder, planned.nbytes + planned.scratch_nbytes, _size_on_disk(folder))
        for name in copies:
            with open(planned.info.path / name, "rb"):
                pass
        with RunFolder(folder, identity, files, overwrite=overwrite) as run:
            missing = [s for s in planned.shards if not run.is_finished(s.name, s.nbytes)]
            resumed = planned.nbytes - sum(shard.nbytes for shard in missing)
            _check_space(folder, sum(s.nbytes + s.scratch_nbytes for s in missing))
            on_plan(planned, resumed)
            for name in copies:
                run.copy(planned.info.path / name, name)
            for name, data in companions.items():
                run.write(name, data)
            with Checkpoint(planned.info) as checkpoint:
                execute(
                    missing,
                    checkpoint,
                    folder,
                    partials=run.work,
                    workers=threads,
                    on_bytes=on_bytes,
                    scarce=available_nbytes() < 2 * planned.scratch_nbytes + 1_000_000_000,
                )
            weight_map = {t.name: s.name for s in planned.shards for t in s.tensors}
            run.finish(build_index(planned.data_nbytes, weight_map))
    except OSError as error:
        raise machine_error(error, f"writing to {folder}") from error
    return Report(
        output=str(folder),
        layout=layout,
        dtype=dtype,
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
    torch_name = next(name for name, value in OUTPUT_DTYPES.items() if value is planned.dtype)
    return {
        "tool": "gptoss_stream",
        "version": __version__,
        "source": str(planned.info.path.resolve()),
        "source_files": {s.name: [s.nbytes, s.mtime_ns] for s in planned.info.shards},
        "source_format": planned.source_format,
        "layout": planned.layout,
        "dtype": torch_name,
        "max_shard_size": planned.max_shard_size,
        "unused": list(planned.unused),
    }


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


def _check_space(folder: Path, needed: int, given_up: int = 0) -> None:
    """Refuse to begin what cannot end; `given_up` bytes will be deleted first."""
    free = free_nbytes(folder) + given_up
    if needed > free:
        raise MachineError(
            f"{folder}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
            f"free {(needed - free) / 1e9:.2f} GB or name another output"
        )


def _size_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
