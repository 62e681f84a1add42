"""A conversion in words that can travel, and making a shard of it wherever they arrive.

What other processes need to know is where source and output are and what was asked for: they open
both themselves, with credentials of their own, and plan anew. The plan must come out the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__
from .errors import CheckpointError, OptionError, machine_error
from .executor import Threads, Watch
from .far_folder import FarFolder
from .memory import available_nbytes, peak_rss_nbytes
from .output import check_space, disk_full, is_disk_full
from .places import Store, open_place, open_store
from .planner import Plan, PlannedShard, plan
from .remote_output import staged_nbytes
from .run_folder import JoinedRun, note_sum
from .run_state import differences
from .streaming import AnyCheckpoint, open_checkpoint

__all__ = ["Job", "Made", "identity", "is_scarce", "make_shard", "open_job"]


def identity(planned: Plan) -> dict[str, Any]:
    """What makes two runs the same run; also the record of how the output was made."""
    place = planned.info.place
    return {
        "tool": "gptoss_stream",
        "version": __version__,
        "source": place.identity,
        **({"source_revision": place.revision} if place.revision else {}),
        "source_files": {s.name: [s.nbytes, s.version] for s in planned.info.shards},
        "source_config": _digest(json.dumps(planned.info.configs, sort_keys=True).encode()),
        "source_format": planned.source_format,
        "format": planned.to,
        "partial": planned.is_partial,
        "selection": planned.selection.as_dict(),
        "dtype": planned.dtype,
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


def is_scarce(planned: Plan) -> bool:
    """Whether there is too little memory for the system to keep what is read ahead."""
    return available_nbytes() < 2 * planned.scratch_nbytes + 1_000_000_000


@dataclass(frozen=True, slots=True)
class Job:
    """What a process elsewhere must know to make shards of a conversion.

    `source` and `output` are names for `open_place` and `open_store`, without any secret;
    `options` are those of `plan`; `identity` is what must come of it there too. `threads` work on
    a shard. What goes to a store lies in `staging` meanwhile, or where the process has room.
    """

    source: str
    output: str
    options: Mapping[str, Any]
    identity: Mapping[str, Any]
    checksums: bool
    threads: int
    staging: str | None
    version: str = __version__


@dataclass(frozen=True, slots=True)
class Made:
    """A shard that was made: its SHA-256 where that is wanted, and the most memory that the
    process has had, in bytes."""

    sha256: str | None
    peak_rss: int


@dataclass(frozen=True, slots=True)
class _Opened:
    """A job, planned where it has arrived."""

    job: Job
    planned: Plan
    store: Store | None
    shards: Mapping[str, PlannedShard]


_last: _Opened | None = None  # planned once for all its shards
_opening = threading.Lock()


def open_job(job: Job) -> _Opened:
    """Plan a job in this process.

    Raises `OptionError` for a job of another version of this tool, `CheckpointError` where the
    source is not what it is elsewhere, and what `plan` and opening raise.
    """
    global _last
    with _opening:
        if _last is not None and _last.job == job:
            return _last
        if job.version != __version__:
            raise OptionError(
                f"gptoss_stream {__version__} is installed here, and {job.version} runs the "
                "conversion; install the same everywhere"
            )
        planned = plan(open_place(job.source), **job.options)
        # The revision that a person names may have moved on since it was resolved.
        asked = {"source", "source_revision"}
        there, here = (
            {key: value for key, value in json.loads(json.dumps(known)).items() if key not in asked}
            for known in (job.identity, identity(planned))
        )
        if differing := "; ".join(differences(there, here)):
            raise CheckpointError(
                f"{planned.info.place}: what is there differs, seen from here, in {differing}; "
                "put the source where all see the same files"
            )
        shards = {shard.name: shard for shard in planned.shards}
        _last = _Opened(job, planned, open_store(job.output), shards)
        return _last


def make_shard(
    job: Job,
    run: str,
    name: str,
    staging: Path,
    on_bytes: Callable[[int], None],
    on_sending: Callable[[], None],
) -> Made:
    """Make a shard of the job, where it belongs or in `staging` and on to its store.

    `run` is the fingerprint of the run's state, which the output must hold still. A shard that is
    finished already is not made again; `on_bytes` is told, from any thread, of bytes written, and
    `on_sending` when all are. Any number of processes may make the same shard at once. Raises
    what `open_job` raises, `OutputError`, `MachineError` and what reading raises.
    """
    opened = open_job(job)
    shard = opened.shards[name]
    scarce = is_scarce(opened.planned)
    info = opened.planned.info
    with open_checkpoint(info, ahead=0 if scarce else job.threads) as reader:
        maker = _OneShard(job, run, shard, reader, scarce, on_bytes, on_sending)
        folder = staging if opened.store else Path(job.output)
        try:
            sha256 = maker.send(opened.store, staging) if opened.store else maker.put(folder)
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(error, folder, staged_nbytes([shard], 1)) from error
            raise machine_error(error, f"writing {name} in {folder}") from error
    return Made(sha256, peak_rss_nbytes())


@dataclass(frozen=True, slots=True)
class _OneShard:
    """One call of `make_shard`."""

    job: Job
    run: str
    shard: PlannedShard
    reader: AnyCheckpoint
    scarce: bool
    on_bytes: Callable[[int], None]
    on_sending: Callable[[], None]

    def put(self, folder: Path) -> str | None:
        """Make the shard in its folder."""
        joined = JoinedRun(folder, self.run)
        joined.check()
        kept = joined.sum(self.shard.name) if self.job.checksums else None
        if joined.is_finished(self.shard.name, self.shard.nbytes) and (
            kept is not None or not self.job.checksums
        ):
            return kept
        sums: dict[str, str] = {}
        with joined.partials() as partials:

            def keep(name: str, sha256: str) -> None:
                sums[name] = sha256
                note_sum(joined.work, name, sha256, partials)

            self._make(folder, partials, keep if self.job.checksums else None, joined.check)
        return sums.get(self.shard.name)

    def send(self, store: Store, staging: Path) -> str | None:
        """Make the shard in a folder of this process's own, and send it to the store."""
        far = FarFolder(store, checksums=self.job.checksums)
        far.join(self.run)
        name, kept = self.shard.name, far.sum(self.shard.name)
        if far.is_finished(name, self.shard.nbytes, None) and (
            kept is not None or not self.job.checksums
        ):
            return kept
        sums: dict[str, str] = {}
        staging.mkdir(parents=True, exist_ok=True)
        check_space(staging, staged_nbytes([self.shard], 1))
        folder = Path(tempfile.mkdtemp(prefix="gptoss_stream-", dir=staging))
        try:
            partials = folder / "partials"
            partials.mkdir()
            self._make(folder, partials, sums.__setitem__, far.check)
            self.on_sending()
            far.put({name: folder / name}, sums)
            far.confirm(name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return sums[name]

    def _make(
        self,
        folder: Path,
        partials: Path,
        on_sum: Callable[[str, str], None] | None,
        check: Callable[[], None],
    ) -> None:
        watch = Watch(self.on_bytes, on_sum, on_whole=lambda name: check())
        threads = Threads(self.reader, self.job.threads, self.scarce)
        threads.make([self.shard], {}, folder, partials, watch)
