"""Retries requests to object stores, and turns their errors into errors of this package."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ..errors import GptOssStreamError, MachineError
from .location import NEVER_STOP
from .retries import TRIES, RetryPolicy

__all__ = ["redacted", "refused_as", "retry"]

_T = TypeVar("_T")


def retry(
    call: Callable[[], _T],
    where: str,
    stop: threading.Event = NEVER_STOP,
    tries: int = TRIES,
) -> _T:
    """Call a function, and retry it if the object store fails in a way that may be temporary.

    Args:
        call: The function.
        where: The name of the file or location in messages.
        stop: Ends the waiting between two tries when it is set.
        tries: The number of tries.

    Raises:
        MachineError: If every try failed.
    """
    retries = RetryPolicy(stop, tries)
    while True:
        try:
            return call()
        except (GptOssStreamError, FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each object store has its own types of errors
            retries.wait(
                MachineError(
                    f"{where}: {redacted(error)}; check the network and run the same command "
                    "again: finished shards are kept"
                )
            )


@contextmanager
def refused_as(kind: type[GptOssStreamError], where: str) -> Iterator[None]:
    """Raise what an object store refuses as an error of a given type."""
    try:
        yield
    except FileNotFoundError as error:
        raise kind(f"{where}: it does not exist ({redacted(error)}); check the URL") from None
    except PermissionError as error:
        raise kind(f"{where}: no access ({redacted(error)}); check the credentials") from None


def redacted(error: Exception) -> str:
    """Return an error's text on one line, without what may be secret in an address."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"\?\S+", "?…", text)
    return re.sub(r"[^/\s\"'@]*:[^/\s\"'@]*@|(?<=://)[^/\s@]*@", "", text)[:300]
