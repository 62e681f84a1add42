"""SIGINT and SIGTERM end a command as exceptions, so that it can clean up."""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["Terminated", "install_signal_handlers", "reset_signal_handlers"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_RETRY_SECONDS = 0.01


class Terminated(BaseException):
    """The process received SIGTERM. (For SIGINT, `KeyboardInterrupt` is raised.)"""


def install_signal_handlers() -> None:
    """Raise an exception in the main thread at the first SIGINT or SIGTERM."""
    for number in _SIGNALS:
        signal.signal(number, _raise_exception)


def reset_signal_handlers() -> None:
    """Let the next signal end the process at once, without a message."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _raise_exception(number: int, frame: FrameType | None) -> None:
    """Handle a signal; during an import, wait until that is done.

    importlib runs weak reference callbacks, in which Python ignores exceptions.
    """
    if _is_importing(frame) and hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, lambda _, later: _raise_exception(number, later))
        signal.setitimer(signal.ITIMER_REAL, _RETRY_SECONDS)
        return
    reset_signal_handlers()
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether a frame is called by an import, or by code that one runs."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
