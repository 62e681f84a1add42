"""A conversion in words that can travel, and making a shard of it wherever they arrive.

What other processes need to know is where source and output are and what was asked for: they open
both themselves, with credentials of their own, and plan anew. The plan must come out the same.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from .._utils.failures import machine_error
from .._utils.memory import peak_rss_nbytes
from ..checkpoint.open_reader import CheckpointReader, open_reader
from ..errors import CheckpointError, OptionError
from ..planning.plan import Plan, plan
from ..planning.run_identity import run_identity
from ..planning.shards import PlannedShard
from ..storage.location import WritableLocation
from ..storage.open_location import open_location, open_writable_location
from ..writing.disk_space import check_space, disk_full, is_disk_full
from ..writing.executor import Callbacks, Threads
from ..writing.output_folder import JoinedOutputFolder, save_checksum
from ..writing.remote_folder import RemoteFolder
from ..writing.remote_output import staging_nbytes
from ..writing.run_state import differences
from ..writing.spill_file import is_memory_low
from .task_spec import ShardResult, TaskSpec

__all__ = ["open_task", "write_shard"]


@dataclass(frozen=True, slots=True)
class _Opened:
    """A job, planned where it has arrived."""

    spec: TaskSpec
    planned: Plan
    store: WritableLocation | None
    shards: Mapping[str, PlannedShard]


_last: _Opened | None = None  # planned once for all its shards


_opening = threading.Lock()


def open_task(spec: TaskSpec) -> _Opened:
    """Plan a job in this process.

    Raises `OptionError` for a job of another version of this tool, `CheckpointError` where the
    source is not what it is elsewhere, and what `plan` and opening raise.
    """
    global _last
    with _opening:
        if _last is not None and _last.spec == spec:
            return _last
        if spec.version != __version__:
            raise OptionError(
                f"gptoss_stream {__version__} is installed here, and {spec.version} runs the "
                "conversion; install the same everywhere"
            )
        planned = plan(open_location(spec.source), **spec.options)
        # The revision that a person names may have moved on since it was resolved.
        asked = {"source", "source_revision"}
        there, here = (
            {key: value for key, value in json.loads(json.dumps(known)).items() if key not in asked}
            for known in (spec.identity, run_identity(planned))
        )
        if differing := "; ".join(differences(there, here)):
            raise CheckpointError(
                f"{planned.info.location}: what is there differs, seen from here, in {differing}; "
                "put the source where all see the same files"
            )
        shards = {shard.name: shard for shard in planned.shards}
        _last = _Opened(spec, planned, open_writable_location(spec.output), shards)
        return _last


def write_shard(
    spec: TaskSpec,
    run: str,
    name: str,
    staging: Path,
    on_bytes: Callable[[int], None],
    on_sending: Callable[[], None],
) -> ShardResult:
    """Make a shard of the job, where it belongs or in `staging` and on to its store.

    `run` is the fingerprint of the run's state, which the output must hold still. A shard that is
    finished already is not made again; `on_bytes` is told, from any thread, of bytes written, and
    `on_sending` when all are. Any number of processes may make the same shard at once. Raises
    what `open_job` raises, `OutputError`, `MachineError` and what reading raises.
    """
    opened = open_task(spec)
    shard = opened.shards[name]
    low_memory = is_memory_low(opened.planned)
    info = opened.planned.info
    with open_reader(info, ahead=0 if low_memory else spec.threads) as reader:
        maker = _OneShard(spec, run, shard, reader, low_memory, on_bytes, on_sending)
        folder = staging if opened.store else Path(spec.output)
        try:
            sha256 = maker.send(opened.store, staging) if opened.store else maker.put(folder)
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(error, folder, staging_nbytes([shard], 1)) from error
            raise machine_error(error, f"writing {name} in {folder}") from error
    return ShardResult(sha256, peak_rss_nbytes())


@dataclass(frozen=True, slots=True)
class _OneShard:
    """One call of `make_shard`."""

    spec: TaskSpec
    run: str
    shard: PlannedShard
    reader: CheckpointReader
    low_memory: bool
    on_bytes: Callable[[int], None]
    on_sending: Callable[[], None]

    def put(self, folder: Path) -> str | None:
        """Make the shard in its folder."""
        joined = JoinedOutputFolder(folder, self.run)
        joined.check()
        kept = joined.sum(self.shard.name) if self.spec.checksums else None
        if joined.is_finished(self.shard.name, self.shard.nbytes) and (
            kept is not None or not self.spec.checksums
        ):
            return kept
        sums: dict[str, str] = {}
        with joined.partials() as partials:

            def keep(name: str, sha256: str) -> None:
                sums[name] = sha256
                save_checksum(joined.work, name, sha256, partials)

            self._make(folder, partials, keep if self.spec.checksums else None, joined.check)
        return sums.get(self.shard.name)

    def send(self, store: WritableLocation, staging: Path) -> str | None:
        """Make the shard in a folder of this process's own, and send it to the store."""
        remote = RemoteFolder(store, checksums=self.spec.checksums)
        remote.join(self.run)
        name, kept = self.shard.name, remote.sum(self.shard.name)
        if remote.is_finished(name, self.shard.nbytes, None) and (
            kept is not None or not self.spec.checksums
        ):
            return kept
        sums: dict[str, str] = {}
        staging.mkdir(parents=True, exist_ok=True)
        check_space(staging, staging_nbytes([self.shard], 1))
        folder = Path(tempfile.mkdtemp(prefix="gptoss_stream-", dir=staging))
        try:
            partials = folder / "partials"
            partials.mkdir()
            self._make(folder, partials, sums.__setitem__, remote.check)
            self.on_sending()
            remote.put({name: folder / name}, sums)
            remote.confirm(name)
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
        callbacks = Callbacks(self.on_bytes, on_sum, before_commit=lambda name: check())
        threads = Threads(self.reader, self.spec.threads, self.low_memory)
        threads.make([self.shard], {}, folder, partials, callbacks)
