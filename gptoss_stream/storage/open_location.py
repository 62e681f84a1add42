"""Opens the location that a user names by a path, a URL or a repository."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .._utils.messages import short_repr
from .._utils.paths import path_text, user_path
from ..errors import OptionError
from .local_folder import LocalFolder
from .location import Location, LocationLike, WritableLocation
from .tokens import check_token

__all__ = [
    "is_repository",
    "is_repository_name",
    "local_path",
    "open_location",
    "open_writable_location",
    "upload_nbytes",
]

_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_PAGE = re.compile(r"(?:www\.)?(?:huggingface|hf)\.co/([^/?#]+/[^/?#]+).*", re.DOTALL)
_ALMOST_URL = re.compile(r"(hf|https?|s3a?|gs|gcs|az|abfss?)(:/?)([^/].*)", re.DOTALL | re.I)
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL | re.IGNORECASE)
_CHAINED = re.compile(r"(?!https?://)[^/]*://.*::|[^/]*::.*://", re.DOTALL | re.IGNORECASE)
_WRAPPERS = {
    *("blockcache", "cached", "dir", "filecache", "generic", "libarchive", "reference"),
    *("simplecache", "tar", "zip"),
}
"""Protocols of fsspec by which files of another location are read."""


@dataclass(frozen=True, slots=True)
class _Url:
    """A URL: its protocol, and what follows ://."""

    protocol: str
    rest: str

    def __str__(self) -> str:
        return f"{self.protocol}://{self.rest}"


def open_location(
    name: LocationLike,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    download: bool = False,
) -> Location:
    """Open a location to read from.

    Args:
        name: A local path, if it exists; else a repository of the Hub (`openai/gpt-oss-20b`,
            `hf://openai/gpt-oss-20b@revision/subfolder`, or the address of its page); or a URL:
            `https://…`, or any other that fsspec supports (`s3://…`, `gs://…`).
        revision: A branch, tag or commit of a repository.
        subfolder: A folder in the location.
        token: A token for the Hub; by default the cached login.
        download: Whether to download a repository's files to the Hub's cache instead of reading
            byte ranges.

    Returns:
        The location. Whether there is anything is found out when it is read.

    Raises:
        OptionError: For a name or an option that cannot be used.
        CheckpointError: If the location does not exist or cannot be accessed.
        MissingPackageError: If an extra is not installed.
        MachineError: If there is no connection.
    """
    if isinstance(name, Location):
        return name
    text = path_text(name)
    for option, given in (("revision", revision), ("subfolder", subfolder)):
        if not isinstance(given, (str, type(None))):
            raise OptionError(
                f"{_without_secrets(text)}: the {option} {short_repr(given)} is no text"
            )
    if not isinstance(token, (str, bool, type(None))):
        raise OptionError(f"{_without_secrets(text)}: the token is no text")
    url = _parse_url(name)
    check_token(token)
    repository = _repository(name)
    if repository is not None:
        from .hub import HubRepository

        return HubRepository.to_read(
            repository, revision=revision, subfolder=subfolder, token=token, download=download
        )
    for option, value in (("revision", revision), ("token", token), ("download", download)):
        if value:
            raise OptionError(
                f"{_without_secrets(name)}: --{option} is only for a repository of the Hub"
            )
    if url is None:
        _refuse_almost_url(name)
        return LocalFolder(user_path(name) / (subfolder or ""))
    full = f"{str(url).rstrip('/')}/{subfolder}" if subfolder else str(url)
    if url.protocol in ("http", "https"):
        from .http_folder import HttpFolder

        return HttpFolder(full)
    from .object_store import ObjectStore

    return ObjectStore(full)


def open_writable_location(
    name: str | os.PathLike[str], *, token: str | None = None
) -> WritableLocation | None:
    """Open a remote location to write to.

    Args:
        name: A URL that fsspec supports, or `hf://user/name` for a repository of the Hub.
        token: A token for the Hub; by default the cached login.

    Returns:
        The location, or None for a local path.

    Raises:
        OptionError: For a name that cannot be used.
        MissingPackageError: If an extra is not installed.
    """
    path_text(name)
    url = _parse_url(name)
    check_token(token)
    if url is None:
        _refuse_almost_url(name)
        path = user_path(name)
        if os.path.lexists(path) and not os.access(path, os.F_OK):
            raise OptionError(
                f"{path}: a link to {path.readlink()}, which does not exist or cannot be accessed; "
                "create that folder, or remove the link"
            )
        return None
    if url.protocol == "hf":
        from .hub import HubRepository

        return HubRepository.to_write(url.rest, token=token)
    if url.protocol in ("http", "https"):
        raise OptionError(f"{_without_secrets(name)}: an HTTP server cannot be written to")
    from .object_store import ObjectStore

    return ObjectStore(str(url))


def upload_nbytes(name: str | os.PathLike[str]) -> int:
    """Return the bytes of memory that uploading to a location takes beyond its files' blocks."""
    if not is_repository(name):
        return 0
    from .xet import XET_NBYTES, uses_xet

    return XET_NBYTES if uses_xet() else 0


def _refuse_almost_url(text: str | os.PathLike[str]) -> None:
    """Refuse what is no local path and nearly a URL; an output would get a folder of that name.

    Raises:
        OptionError: Saying what was probably meant.
    """
    if not isinstance(text, str) or os.path.lexists(text):
        return
    if page := _PAGE.fullmatch(text):
        shown, meant = text[: page.end(1)], f"hf://{page[1]}"
    elif almost := _ALMOST_URL.fullmatch(text):
        meant = _without_secrets(f"{almost[1]}://{almost[3]}")
        shown = meant.replace("://", almost[2], 1)
    else:
        return
    raise OptionError(f"{shown}: there is no such folder; did you mean {meant}?")


def is_repository(name: str | os.PathLike[str]) -> bool:
    """Return whether a name is that of a repository of the Hub, and not of a local path."""
    return _repository(name) is not None


def _repository(name: str | os.PathLike[str]) -> str | None:
    """Return the repository that a name means, as user/name@revision/folder, if any."""
    url, text = _parse_url(name), os.fspath(name)
    if url is None:
        return text if is_repository_name(text) and not os.path.lexists(text) else None
    if url.protocol == "hf":
        return url.rest
    if url.protocol in ("http", "https"):
        from .hub_names import name_of_page

        try:
            return name_of_page(str(url))
        except ValueError as error:
            raise OptionError(f"{_without_secrets(name)}: not an address ({error})") from None
    return None


def local_path(name: str | os.PathLike[str]) -> Path:
    """Return a local path.

    Raises:
        OptionError: For a URL, also one that is misspelled.
    """
    if _parse_url(name) is not None:
        raise OptionError(f"{_without_secrets(name)}: it must be a local folder; download it first")
    _refuse_almost_url(name)
    return user_path(name)


def _parse_url(name: str | os.PathLike[str]) -> _Url | None:
    """Return the parts of a URL, or None for a local path or a repository.

    Raises:
        OptionError: For a URL of fsspec that is made of others.
    """
    if not isinstance(name, str):
        return None
    match = _URL.fullmatch(name)
    url = _Url(match[1].lower(), match[2]) if match else None
    if _CHAINED.match(name) or (url is not None and url.protocol in _WRAPPERS):
        raise OptionError(
            f"{name.partition(':')[0]}: such URLs, which are made of others, are not "
            "supported; name the location itself, such as s3://bucket/folder"
        )
    return url


def _without_secrets(name: str | os.PathLike[str]) -> str:
    """Return a name for messages: of a URL, without login and query."""
    url = _parse_url(name)
    if url is None:
        return os.fspath(name)
    host, slash, path = url.rest.partition("?")[0].partition("/")
    return f"{url.protocol}://{host.rpartition('@')[2]}{slash}{path}"


def is_repository_name(text: str) -> bool:
    """Return whether a text looks like the name of a repository: user/name."""
    return bool(_REPOSITORY.fullmatch(text))
