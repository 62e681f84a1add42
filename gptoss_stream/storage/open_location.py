"""Where files are: a folder of this machine, a repository of the Hub, a bucket, a web server.

Each kind is one file here. What the rest of the package asks of a place is a `Place`: which files
there are, and each of them as a `File`, of which any bytes can be read. A place that can be
written to is a `Store` too.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .._utils.paths import user_path
from ..errors import OptionError
from .local_folder import LocalFolder
from .location import Location, LocationLike, WritableLocation

__all__ = [
    "is_repository",
    "is_repository_name",
    "local_path",
    "open_location",
    "open_writable_location",
]


_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Url:
    protocol: str
    rest: str


def open_location(
    name: LocationLike,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    download: bool = False,
) -> Location:
    """The place to read from that a name means.

    A path of this machine, where there is one; else a repository of the Hub (`openai/gpt-oss-20b`,
    or `hf://openai/gpt-oss-20b@revision/subfolder`, or its page's address); or a URL: `https://…`
    or any other that fsspec knows (`s3://…`, `gs://…`). `revision`, `token` (default: the login)
    and `download` (into the Hub's cache, instead of streaming) are for repositories only;
    `subfolder` is for any.

    Raises `OptionError` for what cannot be meant, `CheckpointError` where it is not there or not to
    be had, `MissingPackageError`, `MachineError`.
    """
    if isinstance(name, Location):
        return name
    url = _url(name)
    text = os.fspath(name)
    repository = _repository(name)
    if repository is not None:
        from .hub import HubRepository

        return HubRepository.to_read(
            repository, revision=revision, subfolder=subfolder, token=token, download=download
        )
    for option, value in (("revision", revision), ("token", token), ("download", download)):
        if value:
            raise OptionError(
                f"{_shown(text)}: --{option} is for a repository of the Hub, which this is not"
            )
    if url is None:
        return LocalFolder(user_path(name) / (subfolder or ""))
    full = f"{text.rstrip('/')}/{subfolder}" if subfolder else text
    if url.protocol in ("http", "https"):
        from .http_folder import HttpFolder

        return HttpFolder(full)
    from .object_store import ObjectStore

    return ObjectStore(full)


def open_writable_location(
    name: str | os.PathLike[str], *, token: str | None = None
) -> WritableLocation | None:
    """The remote place to write to that a name means; None where it is a path of this machine.

    A repository of the Hub is only meant by `hf://user/name`. Raises as `open_place` does.
    """
    url = _url(name)
    if url is None:
        return None
    if url.protocol == "hf":
        from .hub import HubRepository

        return HubRepository.to_write(url.rest, token=token)
    if url.protocol in ("http", "https"):
        raise OptionError(f"{_shown(name)}: a web server cannot be written to")
    from .object_store import ObjectStore

    return ObjectStore(os.fspath(name))


def is_repository(name: str | os.PathLike[str]) -> bool:
    """Whether a name means a repository of the Hub."""
    return _repository(name) is not None


def _repository(name: str | os.PathLike[str]) -> str | None:
    """The repository of the Hub that a name means, as user/name@revision/folder, if any."""
    url, text = _url(name), os.fspath(name)
    if url is None:
        return text if is_repository_name(text) and not os.path.lexists(text) else None
    if url.protocol == "hf":
        return url.rest
    if url.protocol in ("http", "https"):
        from .hub import name_of_page

        try:
            return name_of_page(text)
        except ValueError as error:
            raise OptionError(f"{_shown(text)}: not an address ({error})") from None
    return None


def local_path(name: str | os.PathLike[str]) -> Path:
    """A path of this machine; raises `OptionError` for a URL."""
    if _url(name) is not None:
        raise OptionError(f"{_shown(name)}: it must be on this machine; fetch it first")
    return user_path(name)


def _url(name: str | os.PathLike[str]) -> _Url | None:
    match = _URL.fullmatch(name) if isinstance(name, str) else None
    return _Url(match[1], match[2]) if match else None


def _shown(name: str | os.PathLike[str]) -> str:
    """A name as messages give it: of a URL, without what may be secret in it."""
    url = _url(name)
    if url is None:
        return os.fspath(name)
    host, slash, path = url.rest.partition("?")[0].partition("/")
    return f"{url.protocol}://{host.rpartition('@')[2]}{slash}{path}"


def is_repository_name(text: str) -> bool:
    """Whether a name looks like a repository of the Hub."""
    return bool(_REPOSITORY.fullmatch(text))
