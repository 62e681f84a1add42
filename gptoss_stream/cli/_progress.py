"""The progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(quiet: bool) -> Iterator[tuple[Callable[[int, int], None], Callable[[int], None]]]:
    """Show a progress bar if stderr is a terminal.

    Args:
        quiet: Whether to show none.

    Yields:
        `on_start` and `on_progress` for a function of the library. Without a progress bar they do
        nothing.
    """
    if quiet or not sys.stderr.isatty():
        yield (lambda total, done: None), (lambda nbytes: None)
        return
    from tqdm import tqdm

    bar = tqdm(unit="B", unit_scale=True, dynamic_ncols=True, leave=False)

    def start(total: int, done: int) -> None:
        bar.reset(total)
        bar.initial = bar.n = done
        bar.refresh()

    try:
        yield start, bar.update
    finally:
        bar.close()
