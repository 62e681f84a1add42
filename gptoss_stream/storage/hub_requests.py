"""A repository of the Hub, to read from and to write to.

A revision is resolved to a commit once, and everything is read of that commit. `huggingface_hub`
talks to the Hub: names, login, endpoint, proxies, cache, uploads and commits are its; the checks
of what arrives are ours (`_ranges`). A token goes to the Hub's own origin only.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import CheckpointError, GptOssStreamError, MachineError, OutputError
from .byte_ranges import transport_errors
from .location import NEVER
from .retries import TRIES, RetryPolicy, retry_after

__all__ = ["NotFoundError", "output_errors", "retry", "source_errors", "without_progress_bars"]


_T = TypeVar("_T")


class _WithoutQueries(logging.Filter):
    """Keeps signed addresses out of huggingface_hub's warnings."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(r"\?\S+", "?…", record.getMessage()), ()
        return True


for _name in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
    logging.getLogger(_name).addFilter(_WithoutQueries())


_LONGEST_SILENCE = 300.0  # seconds: a commit of large files is checked before it is answered


class NotFoundError(CheckpointError):
    """No such repository, revision or folder, or none that the Hub lets be seen."""


def retry(call: Callable[[], _T], where: str, tries: int = TRIES) -> _T:
    """Call, and again where the Hub is busy or out of reach."""
    patience = RetryPolicy(NEVER, tries)
    failures: tuple[type[Exception], ...] = (HfHubHTTPError, *transport_errors())
    while True:
        _limit_timeouts()
        try:
            return call()
        except (OfflineModeIsEnabled, GptOssStreamError):
            raise
        except failures as error:
            # Of a refused upload huggingface_hub tells by a RuntimeError.
            refusal = error if isinstance(error, HfHubHTTPError) else error.__cause__
            if isinstance(refusal, HfHubHTTPError):
                status = refusal.response.status_code
                if status not in (408, 409, 412, 425, 429) and status < 500:
                    raise refusal from None
                failure = MachineError(
                    f"{where}: the Hub answers {status}; run the same command again later: what is "
                    "finished stays"
                )
                patience.wait(failure, retry_after(refusal.response.headers))
                continue
            patience.wait(
                MachineError(
                    f"{where}: the Hub cannot be reached ({type(error).__name__}); check the "
                    "network and run the same command again: what is finished stays"
                )
            )


def _limit_timeouts() -> None:
    """huggingface_hub's session waits for ever, but where a call says otherwise."""
    session = huggingface_hub.get_session()
    if session.timeout.read is None:
        session.timeout = _LONGEST_SILENCE


@contextmanager
def source_errors(where: str) -> Iterator[None]:
    """The Hub's refusals as errors of the source."""
    with _errors_as(where, CheckpointError, NotFoundError):
        yield


@contextmanager
def output_errors(where: str) -> Iterator[None]:
    """The Hub's refusals as errors of the output."""
    with _errors_as(where, OutputError, OutputError):
        yield


@contextmanager
def _errors_as(
    where: str, kind: type[GptOssStreamError], missing: type[GptOssStreamError]
) -> Iterator[None]:
    repo = where.removeprefix("hf://").partition("@")[0]
    try:
        yield
    except GatedRepoError:
        raise kind(
            f"{where}: access must be asked for; accept its conditions on the page of {repo}, then "
            "log in with `hf auth login` or give a --token"
        ) from None
    except RepositoryNotFoundError:
        raise missing(
            f"{where}: no folder here and no repository of the Hub that you can see; check the "
            "name, or log in with `hf auth login` or --token if it is private"
        ) from None
    except RevisionNotFoundError:
        raise missing(f"{where}: there is no such revision; check --revision") from None
    except (EntryNotFoundError, LocalEntryNotFoundError):
        raise missing(f"{where}: it is not there; check the name") from None
    except HFValidationError:
        raise kind(f"{where}: not a name that a repository can have") from None
    except OfflineModeIsEnabled:
        raise kind(f"{where}: HF_HUB_OFFLINE is set; unset it") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise kind(
                f"{where}: no access ({status}); log in with `hf auth login`, or give another "
                "--token"
            ) from None
        raise kind(f"{where}: the Hub answers {status}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MachineError(
            f"{where}: the server's answer is none of the Hub's ({type(error).__name__}); check "
            "HF_ENDPOINT and the network"
        ) from None


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """huggingface_hub's own progress bars would break ours."""
    utils = huggingface_hub.utils
    were_off = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            utils.enable_progress_bars()
