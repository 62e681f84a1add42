"""Retries requests to object stores, and turns their errors into errors of this package."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from ..errors import GptOssStreamError, MachineError
from .location import NEVER_STOP
from .retries import FEW_TRIES, TRIES, RetryPolicy

__all__ = ["redacted", "refused_as", "retry"]

_T = TypeVar("_T")

_SETTING = (
    "if the store does not support the checksums of newer AWS clients, as older MinIO, Ceph and "
    "Backblaze B2, set AWS_REQUEST_CHECKSUM_CALCULATION=when_required and "
    "AWS_RESPONSE_CHECKSUM_VALIDATION=when_required in the environment"
)
_REFUSALS = {
    "InvalidDigest",
    "MalformedTrailerError",
    "MissingContentLength",
    "MissingContentMD5",
    "NotImplemented",
    "XAmzContentSHA256Mismatch",
}
_CHECKSUM_WORDS = re.compile(
    r"checksum|trailer|aws-chunked|STREAMING-|x-amz-content-sha256|content-md5", re.I
)


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
            is_refusal = _refuses_checksums(error)
            retries.wait(
                MachineError(
                    f"{where}: {redacted(error)}; {_SETTING if is_refusal else 'check the network'}"
                    " and run the same command again: finished shards are kept"
                ),
                tries=FEW_TRIES if is_refusal else None,
            )


def _refuses_checksums(error: Exception) -> bool:
    """Return whether an S3-compatible store probably refuses the checksums that AWS's client sends.

    botocore adds them since 1.36, as headers or as a trailer of a chunked upload.
    """
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        found = response.get("Error") if isinstance(response, Mapping) else None
        if isinstance(found, Mapping) and found.get("Code") in _REFUSALS:
            return True
    return _CHECKSUM_WORDS.search(str(error)) is not None


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
