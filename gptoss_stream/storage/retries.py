"""Bytes of a file over HTTP: asked for in ranges, each reply checked, broken ones resumed.

`huggingface_hub` gives the session, with its proxies, certificates and hooks; what it does not do
is doubt a reply. A server, or what stands between, may ignore a range, shift it, cut it short or
compress it (huggingface_hub #3778, fsspec #1140): then wrong bytes would become wrong weights.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Mapping
from contextlib import suppress

from ..errors import GptOssStreamError

__all__ = ["FEW_TRIES", "TRIES", "RetryPolicy", "retry_after"]


FIRST_DELAY = 0.5  # seconds, doubled each time


_LONGEST_DELAY = 30.0


_LONGEST_WAIT = 900.0  # that a server may ask for


TRIES = 8  # without a byte of progress


FEW_TRIES = 3  # of what is likely to be wrong for good, such as a mistyped address


class RetryPolicy:
    """How long to go on trying: each failure waits longer; progress starts anew."""

    def __init__(self, stop: threading.Event, tries: int = TRIES) -> None:
        self._stop = stop
        self._tries = tries
        self._failures = 0

    def progress(self) -> None:
        """Something was gained."""
        self._failures = 0

    def wait(
        self, error: GptOssStreamError, asked: float | None = None, tries: int | None = None
    ) -> None:
        """Wait before the next try, as long as the server asked; raise `error` if it was the
        last (of fewer `tries`, for this kind of failure), or at once when a stop was asked for."""
        self._failures += 1
        if self._failures >= min(self._tries, tries or self._tries):
            raise error
        delay = min(FIRST_DELAY * 2 ** (self._failures - 1), _LONGEST_DELAY)
        delay = delay * random.uniform(0.5, 1.0) if asked is None else min(asked, _LONGEST_WAIT)
        if self._stop.wait(delay):
            raise error


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a reply asks to wait: `Retry-After`, or the Hub's `RateLimit: …;r=0;t=55`."""
    with suppress(KeyError, ValueError):
        return max(0.0, float(headers["Retry-After"]))
    match = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
    return float(match[1]) if match else None
