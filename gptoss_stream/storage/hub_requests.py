"""Retries requests to the Hub, and turns its errors into errors of this package."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import huggingface_hub
from huggingface_hub.errors import (
    BadRequestError,
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
from .byte_ranges import TIMEOUT, transport_errors
from .location import NEVER_STOP, FileInfo, LostUploadError
from .retries import FEW_TRIES, TRIES, RetryPolicy, retry_after

__all__ = [
    "NotFoundError",
    "list_files",
    "resolve",
    "retry",
    "source_errors",
    "uploading",
]

_T = TypeVar("_T")


def _without_queries(text: str) -> str:
    """Cut the queries from addresses in a text: they may contain signatures."""
    return re.sub(r"\?\S+", "?…", text)


class _WithoutQueries(logging.Filter):
    """Keeps signed addresses out of huggingface_hub's warnings."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Cut the queries from a warning, which may contain signatures; keep every warning."""
        record.msg, record.args = _without_queries(record.getMessage()), ()
        return True


for _name in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
    logging.getLogger(_name).addFilter(_WithoutQueries())


_ADDED_BY_HUB = (".gitattributes", ".gitignore")  # to a new repository
_log = logging.getLogger(__name__)
_SAID_SECONDS = 30.0  # longer waits are said
_READ_TIMEOUT = 300.0  # seconds: the Hub checks large files before it answers a commit


class NotFoundError(CheckpointError):
    """A repository, revision or folder does not exist, or is not visible to this user."""


def retry(call: Callable[[], _T], where: str, tries: int = TRIES) -> _T:
    """Call a function, and retry it if the Hub is busy or cannot be reached.

    Args:
        call: The function.
        where: The name of the repository or file in messages.
        tries: The number of tries.

    Raises:
        MachineError: If every try failed.
    """
    retries = RetryPolicy(NEVER_STOP, tries)
    failures: tuple[type[Exception], ...] = (HfHubHTTPError, *transport_errors())
    while True:
        _limit_timeouts()
        try:
            return call()
        except (OfflineModeIsEnabled, LocalEntryNotFoundError, GptOssStreamError):
            raise
        except failures as error:
            # huggingface_hub reports a refused upload by a RuntimeError.
            refusal = error if isinstance(error, HfHubHTTPError) else error.__cause__
            if isinstance(refusal, HfHubHTTPError):
                status = refusal.response.status_code
                if status not in (408, 409, 412, 425, 429) and status < 500:
                    raise refusal from None
                failure = MachineError(
                    f"{where}: the Hub answers {status}; run the same command again later: "
                    "finished shards are kept"
                )
                retries.wait(
                    failure,
                    retry_after(refusal.response.headers),
                    announce=lambda seconds: _say_wait(where, seconds),
                )
                continue
            retries.wait(
                MachineError(
                    f"{where}: the Hub cannot be reached ({type(error).__name__}); check the "
                    "network and run the same command again: finished shards are kept"
                )
            )
        except OSError as error:  # of hf_xet, which has tried again itself
            text = _without_queries(str(error))
            failure = MachineError(
                f"{where}: {text}; check the network and run the same command again: finished "
                "shards are kept"
            )
            retries.wait(failure, tries=FEW_TRIES)


def _say_wait(where: str, seconds: float) -> None:
    """Say that the Hub has asked to wait, if that is long."""
    if seconds >= _SAID_SECONDS:
        _log.warning("%s: the Hub allows no more requests now; waiting %d s", where, seconds)


def resolve(api: huggingface_hub.HfApi, repo: str, revision: str | None) -> str:
    """Request the commit that a revision of a repository is now; None is the branch main.

    Raises:
        CheckpointError: If it does not exist, or the server names no commit.
        MachineError: If the Hub cannot be reached.
    """
    where = f"hf://{repo}"
    with source_errors(where):
        info = retry(
            lambda: api.repo_info(repo, revision=revision, timeout=TIMEOUT), where, tries=FEW_TRIES
        )
    if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
        raise CheckpointError(
            f"{where}: the server names no commit, so that files of two states could be mixed; use "
            "--download from the Hub itself"
        )
    return str(info.sha)


def list_files(
    api: huggingface_hub.HfApi, repo: str, commit: str | None, folder: str
) -> list[FileInfo]:
    """Request the files of a repository, or of a folder of it, with the SHA-256 of large ones.

    Args:
        api: The client.
        repo: The repository.
        commit: The commit; None is the branch main as it is now, without the files that the Hub
            adds to an output.
        folder: The folder, or an empty text.
    """
    try:
        entries = list(api.list_repo_tree(repo, folder or None, revision=commit, recursive=True))
    except EntryNotFoundError:
        return []
    found = []
    for entry in entries:
        if isinstance(entry, huggingface_hub.hf_api.RepoFile):
            name = entry.path[len(folder) :].lstrip("/")
            sha256 = entry.lfs.sha256 if entry.lfs else None
            found.append(FileInfo(name, entry.size, sha256 or entry.blob_id, sha256=sha256))
    return [info for info in found if commit is not None or info.name not in _ADDED_BY_HUB]


def _limit_timeouts() -> None:
    """Limit the time that huggingface_hub's session waits, which is unlimited by default."""
    session = huggingface_hub.get_session()
    if session.timeout.read is None:
        session.timeout = _READ_TIMEOUT


@contextmanager
def source_errors(where: str) -> Iterator[None]:
    """Raise what the Hub refuses as errors of the source."""
    with _errors_as(where, CheckpointError, NotFoundError):
        yield


@contextmanager
def uploading(where: str) -> Iterator[None]:
    """Raise what the Hub refuses as errors of the output, and show no progress bar."""
    with _errors_as(where, OutputError, OutputError), _without_progress_bars():
        try:
            yield
        except BadRequestError as error:  # to a commit of an upload that it does not know
            raise LostUploadError(f"{where}: the Hub answers 400{_reason(error)}") from None


@contextmanager
def _errors_as(
    where: str, kind: type[GptOssStreamError], missing: type[GptOssStreamError]
) -> Iterator[None]:
    """Raise what the Hub refuses as errors of `kind`, or `missing` if something does not exist."""
    repo = where.removeprefix("hf://").partition("@")[0]
    try:
        yield
    except GatedRepoError:
        raise kind(
            f"{where}: access must be requested; accept the conditions on the page of {repo}, then "
            "log in with `hf auth login` or give a --token"
        ) from None
    except RepositoryNotFoundError:
        raise missing(
            f"{where}: no local folder and no repository of the Hub that you can see; check the "
            "name, or log in with `hf auth login` or --token if it is private"
        ) from None
    except RevisionNotFoundError:
        raise missing(f"{where}: there is no such revision; check --revision") from None
    except (EntryNotFoundError, LocalEntryNotFoundError):
        raise missing(f"{where}: it does not exist; check the name") from None
    except HFValidationError:
        raise kind(f"{where}: not a name that a repository can have") from None
    except OfflineModeIsEnabled:
        raise kind(f"{where}: HF_HUB_OFFLINE is set; unset it") from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        status = f"{code}{_reason(error)}"
        if code in (401, 403):
            raise kind(
                f"{where}: no access ({status}); log in with `hf auth login`, or give another "
                "--token"
            ) from None
        raise kind(f"{where}: the Hub answers {status}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MachineError(
            f"{where}: the server's answer is not one of the Hub ({type(error).__name__}); check "
            "HF_ENDPOINT and the network"
        ) from None


def _reason(error: HfHubHTTPError) -> str:
    """Return what the Hub says about an error, to follow its status; empty if it says nothing."""
    text = " ".join((error.server_message or "").split())
    return f": {_without_queries(text)[:300]}" if text.isprintable() and text else ""


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Switch off huggingface_hub's progress bars, which would overwrite ours on the terminal."""
    utils = huggingface_hub.utils
    were_off = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            utils.enable_progress_bars()
