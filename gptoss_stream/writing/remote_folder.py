"""The far end of an output during a run: whose it is, what is finished there.

As in a folder of this machine (`run_folder`), `.gptoss_stream/run.json` says what the run is until
it is done, a shard that stands under its name is complete, and the index comes last.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .._utils import strict_json
from ..errors import CheckpointError, GptOssStreamError, MachineError, OutputError
from ..storage.location import FileInfo, WritableLocation
from ..tensors.safetensors_header import INDEX_NAME
from .checksums import CHECKSUMS_NAME, parse_checksums
from .run_state import (
    RECORD_NAME,
    RUN_NAME,
    WORK_NAME,
    fingerprint,
    parse_state,
    refuse_foreign,
    refuse_other_run,
)

__all__ = ["RemoteFolder"]


_SUM = ".sha256"


class RemoteFolder:
    """A store that a run writes to. Raises `OutputError` where it holds foreign files or belongs
    to another run, and what the store raises."""

    def __init__(self, store: WritableLocation, *, checksums: bool = False) -> None:
        self.store = store
        self._checksums = checksums
        self._files: Mapping[str, FileInfo] = {}
        self._sums: dict[str, str] = {}
        self._run = ""

    @property
    def identity(self) -> str:
        """The store's."""
        return self.store.identity

    @property
    def unfinished(self) -> Mapping[str, Any] | None:
        """The state of a run of which a part is there, if any."""
        self._files = self.store.listing()
        return self._known() if RUN_NAME in self._files else None

    def prepare(self, state: Mapping[str, Any], *, overwrite: bool) -> None:
        """See what is there; `overwrite` deletes what an earlier run made, and only that."""
        self._run = fingerprint(state)
        self.look()
        known = self._known()
        refuse_foreign(str(self.store), self._files, known)
        if known is None:
            return
        if overwrite:
            self._delete(known["files"])
        else:
            unfinished = RUN_NAME in self._files
            refuse_other_run(str(self.store), known, state, unfinished=unfinished)
            self._run = fingerprint(known)

    def look(self) -> None:
        """See what is there now."""
        self._files = self.store.listing()
        for name in self._notes() if self._checksums else ():
            shard = name.removeprefix(f"{WORK_NAME}/").removesuffix(_SUM)
            if shard in self._sums:
                continue
            try:
                self._sums[shard] = self.store.read(name).decode(errors="replace").strip()
            except (CheckpointError, OutputError):
                if name in self.store.listing():
                    raise
                self.look()  # another task has just finished, and deleted it
                return
        if self._checksums and CHECKSUMS_NAME in self._files:  # of a finished run
            with suppress(ValueError):
                self._sums = parse_checksums(self.store.read(CHECKSUMS_NAME)) | self._sums

    def join(self, run: str) -> None:
        """Make shards for the process that began the run with this fingerprint; see `check`."""
        self._run = run
        self.check()
        self.look()

    def check(self) -> None:
        """Raise `OutputError` if another run has begun."""
        state: Mapping[str, Any] = {}
        for name in (RUN_NAME, RECORD_NAME):  # or all of it is finished, this shard included
            try:
                state = parse_state(self.store.read(name), self.store.display_path(name))
                break
            except MachineError:
                raise
            except GptOssStreamError:
                continue
        if fingerprint(state) != self._run:
            raise OutputError(
                f"{self.store}: the run that this shard was made for is not under way there"
            )

    def put(self, files: Mapping[str, Path | bytes], sums: Mapping[str, str]) -> None:
        """Write shards, and where that is wanted their sums before them."""
        kept = {name: sums[name] for name in files if self._checksums and name in sums}
        notes = {f"{WORK_NAME}/{name}{_SUM}": f"{kept[name]}\n".encode() for name in kept}
        self.store.put({**notes, **files}, sums)
        self._sums |= kept

    def confirm(self, name: str) -> None:
        """Take back a shard that was sent while another run began; raises `OutputError` then."""
        sent = self.store.listing().get(name)
        self._files = self.store.listing()
        known = self._known()
        if known is not None and fingerprint(known) == self._run:
            return
        if sent is not None and self._files.get(name) == sent:
            self.store.delete([name])
        raise OutputError(f"{self.store}: another run has begun there while a shard was sent")

    def _known(self) -> Mapping[str, Any] | None:
        for name in (RUN_NAME, RECORD_NAME):
            if name in self._files:
                return parse_state(self.store.read(name), self.store.display_path(name))
        return None

    def _delete(self, names: list[str]) -> None:
        """The index first: without it nothing looks finished. What says which files are the
        tool's last."""
        rest = sorted({*names, *self._notes()} - {INDEX_NAME, RECORD_NAME})
        for some in ([INDEX_NAME], rest, [RECORD_NAME, RUN_NAME]):
            self.store.delete(some)
        self._files, self._sums = {}, {}

    def _notes(self) -> list[str]:
        """Where the sums of shards are kept while the run is under way."""
        return [n for n in self._files if n.startswith(f"{WORK_NAME}/") and n.endswith(_SUM)]

    def sum(self, name: str) -> str | None:
        """The SHA-256 of a file that is there, where that is known."""
        if name not in self._files:
            return None
        return self._files[name].sha256 or self._sums.get(name)

    def is_finished(self, name: str, nbytes: int, digest: str | None) -> bool:
        """Whether a shard is complete: it is when it stands under its name, unless both sums are
        known and differ."""
        found = self._files.get(name)
        if found is None or found.nbytes != nbytes:
            return False
        return digest is None or found.sha256 in (None, digest)

    def is_complete(self, state: Mapping[str, Any]) -> bool:
        """Whether the run was finished, and everything it made is still there."""
        return RUN_NAME not in self._files and all(n in self._files for n in state["files"])

    def begin(self, state: Mapping[str, Any]) -> None:
        """Say what the run is."""
        if RUN_NAME not in self._files:
            self.store.put({RUN_NAME: strict_json.dumps(state)}, {})
        # Of a finished run that has lost a file.
        self.store.delete([n for n in (INDEX_NAME, RECORD_NAME) if n in self._files])

    def finish(self, files: Mapping[str, Path], sums: Mapping[str, str]) -> None:
        """Write the small files, the index last, and say no longer that a run is under way."""
        last = {name: files[name] for name in files if name == INDEX_NAME}
        self.store.put({**{n: f for n, f in files.items() if n not in last}, **last}, sums)
        # Also what writers that were killed have left of them.
        self.store.delete([*self._notes(), *(f"{name}.partial" for name in self._files)])
        self.store.delete([RUN_NAME])
