"""A local output folder while a run writes to it: its state, and which shards are finished.

While a run is unfinished the folder holds `.gptoss_stream/`:

    lock, turn    see `folder_lock`; each has a *.guard (`guard_file`)
    run.json      the state of the run: tool version, source files, options, planned files
    *.sha256      the checksum of a shard, written before the shard gets its name
    *.mxfp4.json  what encoding a shard to MXFP4 has lost, likewise
    *.safetensors shards that are being written, and their spill files
    *.journal     how much of such a shard is on the disk (see `shard_journal`)
    *.receipt     of a shard that is uploaded and not visible yet (see `receipts`)
    task-*        the same of one array task
    worker-*      the same of a worker

and, beside it, everything that is finished. A shard gets its final name only when all of it is on
the disk, so under its final name it is complete. `.gptoss_stream/` is deleted when the run is
done. The record `gptoss_stream.json` then says what the folder is and which files are the tool's.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .._utils.regular_file import NotRegularError, open_regular
from .._utils.temporary_file import file_identity, is_leftover
from ..checkpoint.source_card import CARD_NAME
from ..errors import OutputError
from ..planning.model_card import is_unedited
from .checksums import parse_checksum
from .durable_files import write_durably
from .encoding_report import LOSSES_SUFFIX, losses_as_text
from .run_state import RECORD_NAME, RUN_NAME, WORK_NAME, fingerprint, parse_state
from .shard_summary import ShardSummary

__all__ = ["OutputFolder"]

_log = logging.getLogger(__name__)

_MAX_STATE_NBYTES = 50_000_000


class OutputFolder:
    """A local output folder, for any process that writes shards to it.

    Args:
        path: The folder.
        checksums: Whether the run computes checksums.
    """

    def __init__(self, path: Path, *, checksums: bool) -> None:
        self.path = path
        self.work = path / WORK_NAME
        self.checksums: dict[str, str] = {}
        """The SHA-256 of files that are finished, by name."""
        self._has_checksums = checksums

    @property
    def run_file(self) -> Path:
        """The state of an unfinished run."""
        return self.path / RUN_NAME

    def read_state(self) -> Mapping[str, Any] | None:
        """Return the state of the run that the folder belongs to, or None without one.

        Raises:
            OutputError: If the state is damaged.
        """
        for file in (self.run_file, self.path / RECORD_NAME):
            try:
                with open(open_regular(file), "rb") as opened:
                    data = opened.read(_MAX_STATE_NBYTES)
            except FileNotFoundError:
                continue
            except NotRegularError:
                data = b""
            return parse_state(data, str(file))
        return None

    def check_run(self, run: str) -> None:
        """Check that the folder still belongs to a run.

        Args:
            run: The fingerprint of the run's state.

        Raises:
            OutputError: If it belongs to another run.
        """
        if fingerprint(self.read_state() or {}) != run:
            raise OutputError(
                f"{self.path}: the run that this shard belongs to is no longer active; is it a "
                "folder that all workers share?"
            )

    def is_finished(self, name: str, nbytes: int) -> bool:
        """Return whether a shard is complete, with its checksum if the run computes them.

        A shard is complete if it exists under its final name.
        """
        if self._has_checksums and self.checksum(name) is None:
            return False
        try:
            return (self.path / name).stat().st_size == nbytes
        except FileNotFoundError:
            return False

    def checksum(self, name: str) -> str | None:
        """Return the SHA-256 of a finished shard, if it is known."""
        if name not in self.checksums:
            with suppress(FileNotFoundError):
                found = parse_checksum((self.work / f"{name}.sha256").read_bytes())
                if found is not None:  # otherwise the shard is written again
                    self.checksums[name] = found
        return self.checksums.get(name)

    def save_summary(
        self, name: str, summary: ShardSummary, partial_folder: Path, check: Callable[[], None]
    ) -> None:
        """Keep what is known of a shard that is about to get its final name.

        Args:
            name: The shard's name.
            summary: What is known.
            partial_folder: The folder for partial files.
            check: Raises an error if the folder belongs to another run.
        """
        if summary.losses:
            text = losses_as_text(summary.losses)
            write_durably(self.work / f"{name}{LOSSES_SUFFIX}", text, partial_folder, check)
        if summary.sha256 is not None:
            self.checksums[name] = summary.sha256
            text = f"{summary.sha256}\n".encode()
            write_durably(self.work / f"{name}.sha256", text, partial_folder, check)
        _log.info("%s: shard %s is written", self.path, name)

    def losses(self) -> dict[str, bytes]:
        """Return what encoding each shard has lost, as texts by the shards' names."""
        files = self.work.glob(f"*{LOSSES_SUFFIX}")
        return {file.name.removesuffix(LOSSES_SUFFIX): file.read_bytes() for file in files}

    def identities(self, *names: str) -> dict[str, tuple[int, int]]:
        """Return what tells files from later ones of the same names, of those that exist."""
        found = {}
        for name in names:
            with suppress(FileNotFoundError):
                found[name] = file_identity((self.path / name).lstat())
        return found

    def delete_leftovers(self) -> None:
        """Delete files that a process was killed before it could take their names away."""
        for file in self.path.iterdir():
            if is_leftover(file.name):
                file.unlink(missing_ok=True)

    def others_card(self) -> bytes | None:
        """Return the model card in the folder if its users wrote or edited it; it is kept."""
        try:
            card = (self.path / CARD_NAME).read_bytes()
        except FileNotFoundError:
            return None
        return None if is_unedited(card) else card

    @contextmanager
    def worker_folder(self) -> Iterator[Path]:
        """Create a folder for the partial files of this process; deletes it afterwards."""
        folder = Path(tempfile.mkdtemp(prefix="worker-", dir=self.work))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
