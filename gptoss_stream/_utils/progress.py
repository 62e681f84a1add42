"""Progress of a long function: callbacks of the caller, and a progress bar."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from ..errors import OptionError
from .messages import short_repr

__all__ = ["OnProgress", "OnStart", "check_callbacks", "progress_callbacks"]

OnStart: TypeAlias = Callable[[int, int], None]
"""Called once with the bytes to do, and how many of them were done before."""
OnProgress: TypeAlias = Callable[[int], None]
"""Called with the bytes that were done since the last call, from any thread."""


def check_callbacks(**callbacks: Any) -> None:
    """Check that what is given can be called.

    Args:
        **callbacks: Callbacks by the names of their parameters; None for none.

    Raises:
        OptionError: For one that cannot.
    """
    for name, callback in callbacks.items():
        if callback is not None and not callable(callback):
            raise OptionError(f"{name} {short_repr(callback)}: it must be a function")


@contextmanager
def progress_callbacks(
    what: str, progress: bool, on_start: OnStart | None, on_progress: OnProgress | None
) -> Iterator[tuple[OnStart, OnProgress]]:
    """Report progress to the callbacks that are given, and on a progress bar.

    Args:
        what: What is done, beside the bar.
        progress: Whether to show a bar: on stderr, or as a widget in a notebook.
        on_start: The caller's callback; None for none.
        on_progress: The caller's callback; None for none.

    Yields:
        Callbacks that do both.

    Raises:
        OptionError: If a callback cannot be called.
    """
    check_callbacks(on_start=on_start, on_progress=on_progress)
    bars: list[Any] = []
    lock = threading.Lock()  # a bar adds up without one

    def start(total: int, done: int) -> None:
        if progress:
            from tqdm.auto import tqdm

            bars.append(tqdm(desc=what, total=total, initial=done, unit="B", unit_scale=True))
        if on_start is not None:
            on_start(total, done)

    def advance(nbytes: int) -> None:
        with lock:
            for bar in bars:
                bar.update(nbytes)
        if on_progress is not None:
            on_progress(nbytes)

    try:
        yield start, advance
    finally:
        for bar in bars:
            bar.close()
