"""Finished shards on their way to a store, beside the conversion, and few of them at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ..storage.location import WritableLocation
from .remote_folder import RemoteFolder

__all__ = ["Uploads", "wait_for_earlier"]


_TICK = 0.1  # seconds: how soon a stop is seen


_ends: dict[str, threading.Event] = {}  # of the last uploads to each store


def wait_for_earlier(store: WritableLocation) -> None:
    """Wait for what an interrupted run of this process is still sending to a store: a file of it
    must not arrive after another run's file of the same name."""
    end = _ends.get(store.identity)
    while end is not None and not end.wait(_TICK):
        pass


class Uploads:
    """Sends files of a folder to a store, one after another, and deletes each when it has arrived.

    At most `most` are in the folder at a time, those in the making included: whoever makes them
    waits in `begin`, so that a slow store slows the conversion down instead of filling the disk.
    A context manager; raises what the store raises, in `begin` and `finish`.
    """

    def __init__(
        self,
        store: WritableLocation | RemoteFolder,
        folder: Path,
        most: int,
        sum_of: Callable[[str], str | None],
    ) -> None:
        self._store = store
        self._folder = folder
        self._most = most
        self._sum_of = sum_of
        self._here = 0
        self._waiting: deque[str] = deque()
        self._turn = threading.Condition()
        self._is_over = False
        self._error: BaseException | None = None
        self._end = threading.Event()

    def __enter__(self) -> Uploads:
        _ends[self._store.identity] = self._end
        threading.Thread(target=self._send_all, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._turn:
            self._is_over = True  # what is being sent stays here too: a later run sends it again
            self._turn.notify_all()

    def begin(self, name: str, stop: threading.Event) -> None:
        """A file is about to be made: waits for room, unless `stop` is set."""
        with self._turn:
            while self._here >= self._most and not stop.is_set():
                self._raise_error()
                self._turn.wait(_TICK)
            self._raise_error()
            self._here += 1

    def add(self, name: str) -> None:
        """A file that was begun is finished."""
        with self._turn:
            self._waiting.append(name)
            self._turn.notify_all()

    def add_made(self, name: str) -> None:
        """A file that an earlier run has finished."""
        with self._turn:
            self._here += 1
        self.add(name)

    def finish(self) -> None:
        """Wait until everything has arrived."""
        with self._turn:
            while self._here:
                self._raise_error()
                self._turn.wait(_TICK)
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _send_all(self) -> None:
        try:
            while (name := self._take()) is not None:
                file = self._folder / name
                known = self._sum_of(name)
                self._store.put({name: file}, {} if known is None else {name: known})
                with self._turn:
                    if self._is_over:
                        return
                    file.unlink()
                    self._here -= 1
                    self._turn.notify_all()
        except BaseException as error:
            with self._turn:
                self._error = error
                self._turn.notify_all()
        finally:
            self._end.set()

    def _take(self) -> str | None:
        with self._turn:
            while not self._waiting and not self._is_over:
                self._turn.wait()
            return None if self._is_over else self._waiting.popleft()
