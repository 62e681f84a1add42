"""The far end of an output during a run: whose it is, what is finished there.

As in a folder of this machine (`run_folder`), `.gptoss_stream/run.json` says what the run is until
it is done, a shard that stands under its name is complete, and the index comes last.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import strict_json
from .places import FileInfo, Store
from .run_state import RECORD_NAME, RUN_NAME, parse_state, refuse_foreign, refuse_other_run
from .safetensors_format import INDEX_NAME

__all__ = ["FarFolder"]


class FarFolder:
    """A store that a run writes to. Raises `OutputError` where it holds foreign files or belongs
    to another run, and what the store raises."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._files: Mapping[str, FileInfo] = {}

    @property
    def unfinished(self) -> Mapping[str, Any] | None:
        """The state of a run of which a part is there, if any."""
        self._files = self.store.listing()
        return self._known() if RUN_NAME in self._files else None

    def prepare(self, state: Mapping[str, Any], *, overwrite: bool) -> None:
        """See what is there; `overwrite` deletes what an earlier run made, and only that."""
        self._files = self.store.listing()
        known = self._known()
        refuse_foreign(str(self.store), self._files, known)
        if known is None:
            return
        if overwrite:
            self._delete(known["files"])
        else:
            unfinished = RUN_NAME in self._files
            refuse_other_run(str(self.store), known, state, unfinished=unfinished)

    def _known(self) -> Mapping[str, Any] | None:
        for name in (RUN_NAME, RECORD_NAME):
            if name in self._files:
                return parse_state(self.store.read(name), self.store.at(name))
        return None

    def _delete(self, names: list[str]) -> None:
        """The index first: without it nothing looks finished. What says which files are the
        tool's last."""
        rest = sorted({*names} - {INDEX_NAME, RECORD_NAME})
        for some in ([INDEX_NAME], rest, [RECORD_NAME, RUN_NAME]):
            self.store.delete(some)
        self._files = {}

    def sum(self, name: str) -> str | None:
        """The SHA-256 of a file that is there, where the store knows it."""
        return self._files[name].sha256 if name in self._files else None

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
        self.store.delete([RUN_NAME])
