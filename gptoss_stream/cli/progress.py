"""The command line: parses, calls the library, prints. Exit codes: 0 done; 1 verify found
differences; 2 bad usage or input; 3 the machine failed; 130 interrupted (143 by SIGTERM).

Nothing heavy is imported before a command runs, so that --help and usage errors come at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(quiet: bool) -> Iterator[tuple[Callable[[int, int], None], Callable[[int], None]]]:
    """A progress bar in a terminal, nothing elsewhere: (start with total and done, advance)."""
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
