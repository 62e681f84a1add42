"""How often and how long a failed request is retried."""

from __future__ import annotations

import logging
import math
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime

from ..errors import GptOssStreamError

__all__ = ["FEW_TRIES", "TRIES", "RetryPolicy", "retry_after"]

_log = logging.getLogger(__name__)

FIRST_DELAY = 0.5  # seconds, doubled after each failure
_MAX_DELAY = 30.0
_LOGGED_SECONDS = 5.0  # longer waits are logged
_MAX_RETRY_AFTER = 4000.0  # seconds that a server may ask for: the Hub counts commits by the hour
TRIES = 8  # without any progress
FEW_TRIES = 3  # for what is probably a permanent error, such as a mistyped address


class RetryPolicy:
    """Counts failures and waits longer after each; progress starts the count again.

    Args:
        stop: Ends all waiting when it is set.
        tries: The number of failures in a row that end the request.
    """

    def __init__(self, stop: threading.Event, tries: int = TRIES) -> None:
        self._stop = stop
        self._tries = tries
        self._failures = 0

    def progress(self) -> None:
        """Start the count again: the request has made progress."""
        self._failures = 0

    def wait(
        self,
        error: GptOssStreamError,
        seconds: float | None = None,
        tries: int | None = None,
        announce: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Wait before the next try.

        Args:
            error: What to raise if this was the last try, or if `stop` is set.
            seconds: How long the server asked to wait, if it did.
            tries: A smaller number of tries for this kind of failure.
            announce: Called with the seconds that are waited, if the server asked to wait.
        """
        self._failures += 1
        if self._failures >= min(self._tries, tries or self._tries):
            raise error
        delay = min(FIRST_DELAY * 2 ** (self._failures - 1), _MAX_DELAY)
        # Spread, so that processes that were refused at once do not come back at once.
        jittered = delay * random.uniform(0.5, 1.0)
        if seconds is not None:  # never earlier than asked
            asked = min(seconds, _MAX_RETRY_AFTER)
            jittered = asked + random.uniform(0, delay + 0.2 * asked)
            announce(jittered)
        elif jittered >= _LOGGED_SECONDS:
            _log.warning("%s; trying again in %d s", error, jittered)
        if self._stop.wait(jittered):
            raise error


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a reply asks to wait.

    Reads `Retry-After`, which is seconds or a date, or the Hub's `RateLimit: …;r=0;t=55`.
    """
    asked = headers.get("Retry-After", "")
    with suppress(ValueError):
        seconds = float(asked)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    with suppress(ValueError, TypeError, OverflowError):
        date = parsedate_to_datetime(asked)
        return max(0.0, date.timestamp() - time.time())
    match = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    return float(match[1]) if match else None
