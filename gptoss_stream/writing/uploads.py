"""Uploads finished shards while others are converted, and limits how many are on the disk."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from .._utils.temporary_file import delete_own, file_identity
from ..storage.location import WritableLocation
from .remote_folder import RemoteFolder

__all__ = ["PUBLISH_SECONDS", "Uploads", "wait_for_earlier_uploads"]

PUBLISH_SECONDS = 60.0
"""Between two commits of a run: the Hub allows 128 an hour for a repository."""

_POLL_SECONDS = 0.1  # how soon a stop is seen
_finished: dict[str, threading.Event] = {}  # set when the last uploads to a location have ended


def wait_for_earlier_uploads(location: WritableLocation) -> None:
    """Wait until an interrupted run of this process has ended its current upload to a location.

    Otherwise that file might arrive after the same file of the next run.
    """
    finished = _finished.get(location.identity)
    while finished is not None and not finished.wait(_POLL_SECONDS):
        pass


class Uploads:
    """Uploads files of a folder, one after another, and deletes each when it has arrived.

    Where files become visible by commits, several are committed together.

    At most `max_staged` files are in the folder at a time, including those that are being written:
    `start` waits for room, so that a slow upload slows the conversion down instead of filling the
    disk. A context manager. `start` and `finish` raise what the upload raised.

    Args:
        remote: Where to upload to.
        folder: Where the files are.
        max_staged: The most files in the folder.
        checksum_of: Returns the SHA-256 of a file, if it is known.
        keep_receipt: Keeps, durably, the receipt of a file that is uploaded and not visible.
        publish_seconds: The time between two commits.
    """

    def __init__(
        self,
        remote: RemoteFolder,
        folder: Path,
        max_staged: int,
        checksum_of: Callable[[str], str | None],
        keep_receipt: Callable[[str, bytes], None] = lambda name, receipt: None,
        publish_seconds: float = PUBLISH_SECONDS,
    ) -> None:
        self._remote = remote
        self._folder = folder
        self._max_staged = max_staged
        self._checksum_of = checksum_of
        self._num_staged = 0
        self._queue: deque[str] = deque()
        self._changed = threading.Condition()
        self._keep_receipt = keep_receipt
        self._receipts: dict[str, bytes] = {}
        self._publish_seconds = publish_seconds
        self._published_at = -publish_seconds
        self._is_finishing = False
        self._is_over = False
        self._error: BaseException | None = None
        self._finished = threading.Event()

    def __enter__(self) -> Uploads:
        _finished[self._remote.identity] = self._finished
        threading.Thread(target=self._upload_all, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._is_over = True  # the file being uploaded stays, and a later run uploads it again
            self._changed.notify_all()

    def start(self, name: str, stop: threading.Event) -> None:
        """Wait until there is room for another file, or `stop` is set."""
        with self._changed:
            while self._num_staged >= self._max_staged and not stop.is_set():
                self._raise_error()
                self._changed.wait(_POLL_SECONDS)
            self._raise_error()
            self._num_staged += 1

    def add(self, name: str) -> None:
        """Upload a file that was started and is finished."""
        with self._changed:
            self._queue.append(name)
            self._changed.notify_all()

    def add_finished(self, name: str) -> None:
        """Upload a file that an earlier run finished."""
        with self._changed:
            self._num_staged += 1
        self.add(name)

    def add_uploaded(self, name: str, receipt: bytes) -> None:
        """Publish a file that another process has uploaded."""
        self._keep_receipt(name, receipt)
        with self._changed:
            self._raise_error()
            self._receipts[name] = receipt
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until every file has arrived and is visible."""
        with self._changed:
            self._is_finishing = True
            self._changed.notify_all()
            while self._num_staged or self._receipts:
                self._raise_error()
                self._changed.wait(_POLL_SECONDS)
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _upload_all(self) -> None:
        try:
            while not self._is_over:
                name = self._next_file()
                if name is not None:
                    self._upload(name)
                elif not self._is_over:
                    self._publish(dict(self._receipts))
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            self._finished.set()

    def _next_file(self) -> str | None:
        """Wait for a file; return None if what was uploaded is to be published before it."""
        with self._changed:
            while not self._is_over:
                due = self._published_at + self._publish_seconds - time.monotonic()
                is_last = self._is_finishing and not self._num_staged
                if self._receipts and (due <= 0 or is_last):
                    return None
                if self._queue:
                    return self._queue.popleft()
                self._changed.wait(max(due, _POLL_SECONDS) if self._receipts else None)
            return None

    def _upload(self, name: str) -> None:
        file = self._folder / name
        identity = file_identity(file.stat())
        receipt = self._remote.upload(name, file, self._checksum_of(name))
        if receipt is not None:
            self._keep_receipt(name, receipt)
        with self._changed:
            if self._is_over:
                return
            if receipt is not None:
                self._receipts[name] = receipt
            delete_own(file, identity)  # not that of a run that has taken the folder over
            self._num_staged -= 1
            self._changed.notify_all()

    def _publish(self, receipts: Mapping[str, bytes]) -> None:
        known = {name: self._checksum_of(name) for name in receipts}
        self._remote.publish(receipts, {n: sum_ for n, sum_ in known.items() if sum_ is not None})
        with self._changed:
            self._published_at = time.monotonic()
            for name in receipts:
                del self._receipts[name]
            self._changed.notify_all()
