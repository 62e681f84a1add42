"""The command line: parses, calls the library, prints. Exit codes: 0 done; 1 verify found
differences; 2 bad usage or input; 3 the machine failed; 130 interrupted (143 by SIGTERM).

Nothing heavy is imported before a command runs, so that --help and usage errors come at once.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

__all__ = ["Terminated", "reset_signals", "stop"]


class Terminated(BaseException):
    """SIGTERM came."""


def stop(signum: int, frame: FrameType | None) -> None:
    """End what runs. Not in the middle of an import, in whose callbacks an exception gets lost."""
    if _is_importing(frame):
        signal.signal(signal.SIGALRM, lambda _, later: stop(signum, later))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        return
    reset_signals()
    raise KeyboardInterrupt if signum == signal.SIGINT else Terminated


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def reset_signals() -> None:
    """From here on a signal, a second one for instance, ends the process without a word."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
