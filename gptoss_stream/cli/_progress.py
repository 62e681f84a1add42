"""Progress of a run: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .._utils.messages import sized
from ._command import Arguments, Decorator, option
from ._printing import print_message, redirect_messages
from ._values import PROGRESS

__all__ = ["Progress", "progress_option", "show_progress"]

_LOG_SECONDS = 30.0

progress_option: Decorator = option(
    "--progress",
    type=PROGRESS,
    default="auto",
    metavar="KIND",
    help="how to show progress: {choices} (default: auto, which is bar in a terminal, and "
    "otherwise log, a line every 30 seconds)",
)


class Progress:
    """Callbacks for a function of the library. This class shows nothing.

    Args:
        phase: What is done, such as "writing".
    """

    def __init__(self, phase: str) -> None:
        self._phase = phase
        self._lock = threading.RLock()

    def start(self, total: int, done: int) -> None:
        """Begin: see `on_start` of `convert`."""

    def advance(self, nbytes: int) -> None:
        """Go on: see `on_progress` of `convert`."""

    def count_shard(self, finished: int, total: int) -> None:
        """Count a shard: see `on_shard` of `convert`."""
        with self._lock:
            self._phase = (
                f"{self._phase.split(',')[0]}, shard {min(finished + 1, total)} of {total}"
            )

    def close(self) -> None:
        """Stop showing anything."""


class _Bar(Progress):
    """A progress bar, and messages above it."""

    _bar: Any = None
    _began = False

    def start(self, total: int, done: int) -> None:
        """Create the bar."""
        from tqdm import tqdm

        with self._lock:
            self.close()
            self._began = True  # a signal may come before the next line has ended
            self._bar = tqdm(
                total=total, initial=done, desc=self._phase, unit="B", unit_scale=True,
                ncols=_width(), leave=False, file=sys.stderr,
            )  # fmt: skip
            redirect_messages(lambda text: tqdm.write(text, file=sys.stderr))

    def advance(self, nbytes: int) -> None:
        """Move the bar."""
        with self._lock:
            if self._bar is not None:
                self._bar.ncols = _width()
                self._bar.update(nbytes)

    def count_shard(self, finished: int, total: int) -> None:
        """Show the number of the shard."""
        super().count_shard(finished, total)
        with self._lock:
            if self._bar is not None:
                self._bar.set_description(self._phase)

    def close(self) -> None:
        """Clear the bar, also of what the terminal shows for Ctrl-C."""
        with self._lock:
            if not self._began:
                return
            redirect_messages(None)
            if self._bar is not None:
                self._bar.close()
            self._began, self._bar = False, None
            if sys.stderr.isatty():
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _width() -> int:
    """Return how wide the bar is: the terminal may show ^C after it on the same line."""
    try:
        return max(20, os.get_terminal_size(sys.stderr.fileno()).columns - 4)
    except OSError:
        return 80


class _Lines(Progress):
    """A line every 30 seconds."""

    _total = _done = _done_before = 0
    _began = _printed = 0.0

    def start(self, total: int, done: int) -> None:
        """Begin to measure."""
        self._total, self._done, self._done_before = total, done, done
        self._began = self._printed = time.monotonic()

    def advance(self, nbytes: int) -> None:
        """Print a line if the last one is old enough."""
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now - self._printed < _LOG_SECONDS:
                return
            self._printed = now
            rate = max(1, round((self._done - self._done_before) / max(now - self._began, 1e-3)))
            left = (self._total - self._done) // rate
            print_message(
                f"{self._phase}: {sized(self._done)} of {sized(self._total)} "
                f"({self._done / max(1, self._total):.0%}), {sized(rate)}/s, "
                f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
            )


@contextmanager
def show_progress(arguments: Arguments, phase: str) -> Iterator[Progress]:
    """Show the progress of a run as `--progress` and `--quiet` say.

    Args:
        arguments: The parsed arguments.
        phase: What is done, such as "writing".

    Yields:
        Callbacks for a function of the library.
    """
    kind = "none" if arguments.quiet else arguments.progress
    if kind == "auto":
        kind = "bar" if sys.stderr.isatty() else "log"
    shown = {"bar": _Bar, "log": _Lines, "none": Progress}[kind](phase)
    try:
        yield shown
    finally:
        shown.close()
