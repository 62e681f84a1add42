"""A remote output during a run: its state, and which shards are finished.

As in a local folder (`output_folder`), `.gptoss_stream/run.json` holds the state until the run is
done, a shard under its final name is complete, and the index comes last. There are no locks:
object stores and the Hub have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .._utils import strict_json
from ..checkpoint.source_card import CARD_NAME
from ..errors import CheckpointError, GptOssStreamError, MachineError, OutputError
from ..planning.model_card import is_unedited
from ..storage.location import BatchingLocation, FileInfo, WritableLocation
from ..tensors.safetensors_header import INDEX_NAME
from .checksums import CHECKSUMS_NAME, parse_checksum, parse_checksums
from .encoding_report import LOSSES_SUFFIX, REPORT_NAME
from .run_state import (
    RECORD_NAME,
    RUN_NAME,
    WORK_NAME,
    fingerprint,
    parse_state,
    refuse_foreign_files,
    refuse_other_run,
)

__all__ = ["RemoteFolder"]

_CHECKSUM_SUFFIX = ".sha256"


class RemoteFolder:
    """A remote location that a run writes to.

    Methods raise `OutputError` if it holds foreign files or belongs to another run, and what the
    location raises.

    Args:
        location: The location.
        checksums: Whether the run computes checksums.
    """

    def __init__(self, location: WritableLocation, *, checksums: bool = False) -> None:
        self.location = location
        self._has_checksums = checksums
        self._files: Mapping[str, FileInfo] = {}
        self._checksums: dict[str, str] = {}
        self._run = ""
        self.losses: dict[str, bytes] = {}
        """What encoding shards to MXFP4 has lost, as texts by name; uploaded with the shards."""

    @property
    def identity(self) -> str:
        """The location's identity."""
        return self.location.identity

    def read_unfinished_state(self) -> Mapping[str, Any] | None:
        """Return the state of an unfinished run, or None without one."""
        self._files = self.location.listing()
        return self._read_state() if RUN_NAME in self._files else None

    def prepare(self, state: Mapping[str, Any], *, overwrite: bool) -> None:
        """List the files and check that the output can be written or resumed.

        Args:
            state: The state of this run.
            overwrite: Whether to delete what an earlier run wrote, and only that.
        """
        self._run = fingerprint(state)
        self.refresh()
        found = self._read_state()
        refuse_foreign_files(str(self.location), self._files, found)
        if found is None:
            return
        if overwrite:
            self._delete(found["files"])
        else:
            unfinished = RUN_NAME in self._files
            refuse_other_run(str(self.location), found, state, unfinished=unfinished)
            self._run = fingerprint(found)

    def refresh(self) -> None:
        """List the files again and read checksums that were added."""
        self._files = self.location.listing()
        for name in self._work_files(_CHECKSUM_SUFFIX) if self._has_checksums else ():
            shard = _shard_name(name, _CHECKSUM_SUFFIX)
            if shard in self._checksums:
                continue
            try:
                checksum = parse_checksum(self.location.read(name))
            except (CheckpointError, OutputError):
                if name in self.location.listing():
                    raise
                self.refresh()  # another task has just finished and deleted it
                return
            if checksum is not None:  # otherwise the shard is written again
                self._checksums[shard] = checksum
        if self._has_checksums and CHECKSUMS_NAME in self._files:  # of a finished run
            with suppress(ValueError):
                found = parse_checksums(self.location.read(CHECKSUMS_NAME))
                self._checksums = found | self._checksums

    def join(self, run: str) -> None:
        """Write shards for the process that began the run with this fingerprint."""
        self._run = run
        self.check_run()
        self.refresh()

    def check_run(self) -> None:
        """Check that the location still belongs to the run.

        Raises:
            OutputError: If another run has begun.
        """
        state: Mapping[str, Any] = {}
        for name in (RUN_NAME, RECORD_NAME):  # the record, if the run is finished already
            try:
                state = parse_state(self.location.read(name), self.location.display_path(name))
                break
            except MachineError:
                raise
            except GptOssStreamError:
                continue
        if fingerprint(state) != self._run:
            raise OutputError(
                f"{self.location}: the run that this shard belongs to is no longer active"
            )

    def put(self, files: Mapping[str, Path | bytes], checksums: Mapping[str, str]) -> None:
        """Upload shards; if the run computes checksums, upload those first.

        Args:
            files: Local files or bytes, by name.
            checksums: The SHA-256 of files for which it is known.
        """
        self.location.put({**self._summaries(checksums, files), **files}, checksums)

    def upload(self, name: str, file: Path, checksum: str | None) -> bytes | None:
        """Upload a shard.

        Args:
            name: Its name.
            file: The local file.
            checksum: Its SHA-256, if it is known.

        Returns:
            A receipt for `publish`, or None if the shard is visible at once.
        """
        if checksum is not None and isinstance(self.location, BatchingLocation):
            return self.location.upload(name, file, checksum)
        self.put({name: file}, {} if checksum is None else {name: checksum})
        return None

    def publish(self, receipts: Mapping[str, bytes], checksums: Mapping[str, str]) -> None:
        """Make shards visible that were uploaded.

        Args:
            receipts: What `upload` has returned, by name.
            checksums: Their SHA-256, by name.
        """
        assert isinstance(self.location, BatchingLocation)
        self.location.publish(receipts, self._summaries(checksums, receipts))

    def _summaries(self, checksums: Mapping[str, str], names: Iterable[str]) -> dict[str, bytes]:
        """Return the small files with what is known of shards, which are visible before them."""
        kept = {n: checksums[n] for n in names if self._has_checksums and n in checksums}
        self._checksums |= kept
        small = {f"{WORK_NAME}/{n}{_CHECKSUM_SUFFIX}": f"{kept[n]}\n".encode() for n in kept}
        losses = {n: self.losses[n] for n in names if n in self.losses}
        return small | {f"{WORK_NAME}/{n}{LOSSES_SUFFIX}": text for n, text in losses.items()}

    def read_losses(self) -> dict[str, bytes]:
        """Return what encoding the uploaded shards has lost, as texts by name."""
        names = self._work_files(LOSSES_SUFFIX)
        return {_shard_name(name, LOSSES_SUFFIX): self.location.read(name) for name in names}

    def read_report(self) -> bytes | None:
        """Return the report of a finished run about encoding to MXFP4; None without one."""
        return self.location.read(REPORT_NAME) if REPORT_NAME in self._files else None

    def confirm_upload(self, name: str) -> None:
        """Check that no other run began while a shard was uploaded.

        Raises:
            OutputError: If one did; the shard is then deleted.
        """
        uploaded = self.location.listing().get(name)
        self._files = self.location.listing()
        found = self._read_state()
        if found is not None and fingerprint(found) == self._run:
            return
        if uploaded is not None and self._files.get(name) == uploaded:
            self.location.delete([name])
        raise OutputError(f"{self.location}: another run began while a shard was uploaded")

    def _read_state(self) -> Mapping[str, Any] | None:
        for name in (RUN_NAME, RECORD_NAME):
            if name in self._files:
                return parse_state(self.location.read(name), self.location.display_path(name))
        return None

    def _delete(self, names: list[str]) -> None:
        """Delete the files of a run: the index first, so that nothing looks finished; last the
        record of which files are the tool's."""
        kept = {INDEX_NAME, RECORD_NAME, *([] if self.others_card() is None else [CARD_NAME])}
        others = sorted({*names, *self._work_files(_CHECKSUM_SUFFIX, LOSSES_SUFFIX)} - kept)
        for some in ([INDEX_NAME], others, [RECORD_NAME, RUN_NAME]):
            self.location.delete(some)
        self._files, self._checksums = {}, {}

    def others_card(self) -> bytes | None:
        """Return the model card in the location if its users wrote or edited it; it is kept."""
        card = self.location.read(CARD_NAME) if CARD_NAME in self._files else None
        return None if card is None or is_unedited(card) else card

    def _work_files(self, *suffixes: str) -> list[str]:
        """Return the files that hold what is known of shards during the run."""
        prefix = f"{WORK_NAME}/"
        return [n for n in self._files if n.startswith(prefix) and n.endswith(suffixes)]

    def checksum(self, name: str) -> str | None:
        """Return the SHA-256 of an uploaded file, if it is known."""
        if name not in self._files:
            return None
        return self._files[name].sha256 or self._checksums.get(name)

    def is_finished(self, name: str, nbytes: int, sha256: str | None = None) -> bool:
        """Return whether a shard is complete, with its checksum if the run computes them.

        A shard is complete if it exists under its final name.

        Args:
            name: The shard's name.
            nbytes: Its size in bytes.
            sha256: Its checksum, if it is known to this process.
        """
        found = self._files.get(name)
        if found is None or found.nbytes != nbytes:
            return False
        if self._has_checksums and sha256 is None and self.checksum(name) is None:
            return False
        known = {found.sha256, sha256, self._checksums.get(name)} - {None}
        return len(known) <= 1  # otherwise somebody has replaced it

    def is_complete(self, state: Mapping[str, Any]) -> bool:
        """Return whether the run was finished and all its files still exist."""
        return RUN_NAME not in self._files and all(n in self._files for n in state["files"])

    def begin(self, state: Mapping[str, Any]) -> None:
        """Upload the state of the run."""
        if RUN_NAME not in self._files:
            self.location.put({RUN_NAME: strict_json.dumps(state)}, {})
        # Of a finished run that has lost a file.
        self.location.delete([n for n in (INDEX_NAME, RECORD_NAME) if n in self._files])

    def finish(self, files: Mapping[str, Path], checksums: Mapping[str, str]) -> None:
        """Upload the small files, the index last, and delete the state of the run."""
        last = {name: files[name] for name in files if name == INDEX_NAME}
        self.location.put({**{n: f for n, f in files.items() if n not in last}, **last}, checksums)
        # Also the partial files of processes that were killed.
        partials = (f"{name}.partial" for name in self._files)
        self.location.delete([*self._work_files(_CHECKSUM_SUFFIX, LOSSES_SUFFIX), *partials])
        self.location.delete([RUN_NAME])


def _shard_name(name: str, suffix: str) -> str:
    """Return which shard a file in the work folder is about."""
    return name.removeprefix(f"{WORK_NAME}/").removesuffix(suffix)
