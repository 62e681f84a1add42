"""Where files are: a folder of this machine, a repository of the Hub, a bucket, a web server.

Each kind is one file here. What the rest of the package asks of a place is a `Place`: which files
there are, and each of them as a `File`, of which any bytes can be read. A place that can be
written to is a `Store` too.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from ..errors import OptionError, user_path
from ._file import FileInfo
from .folder import Folder

__all__ = [
    "File",
    "FileInfo",
    "Folder",
    "Name",
    "Place",
    "Store",
    "is_repository",
    "is_repository_name",
    "local_path",
    "open_place",
    "open_store",
]


class File(Protocol):
    """A file, opened. Reading raises `CheckpointError` where it is no longer what it was when it
    was opened, and `MachineError` where reading fails."""

    @property
    def info(self) -> FileInfo:
        """What it was when it was opened."""

    def read_into(self, out: memoryview, at: int, stop: threading.Event) -> None:
        """Fill `out` with the file's bytes from `at` on; ends early, by any exception, when
        `stop` is set."""

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if the file is no longer what it was."""

    def close(self) -> None:
        """Give up what is held."""


@runtime_checkable
class Place(Protocol):
    """A folder, wherever it is; `str` of it is what messages call it, without any secret."""

    @property
    def is_local(self) -> bool:
        """Whether it is of this machine."""

    @property
    def identity(self) -> str:
        """Its whole name, by which a run's record tells it from others."""

    @property
    def revision(self) -> str | None:
        """What was asked for, where a place has several states."""

    def at(self, name: str) -> str:
        """What messages call a file of it."""

    def check(self) -> None:
        """Raise `CheckpointError` if there is no such place."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def names(self, folder: str = "") -> list[str]:
        """The names of the files right in it, or in a folder of it, sorted."""

    def open(self, name: str) -> File:
        """A file of it; raises as `File` does."""

    def pinned(self, state: Mapping[str, Any] | None) -> Place:
        """The place in the state that an unfinished run began to read, where it has several and
        the same one was asked for."""

    def prepare(self, names: list[str]) -> None:
        """Told before reading which files' data will be read."""


class Store(Place, Protocol):
    """A place that files can be written to. Raises `OutputError` where that is refused and
    `MachineError` where it fails."""

    def listing(self) -> Mapping[str, FileInfo]:
        """All files in it and in its folders, as they are now; none where it is not there."""

    def read(self, name: str) -> bytes:
        """A small file."""

    def put(self, files: Mapping[str, Path | bytes], sums: Mapping[str, str]) -> None:
        """Write files, each whole or not at all, in their order, and check what has arrived;
        `sums` are SHA-256 sums of those for which they are known."""

    def delete(self, names: list[str]) -> None:
        """Delete files."""


Name: TypeAlias = "str | os.PathLike[str] | Place"
"""How callers name a place: a path, a URL, a repository, or a place that was opened."""

_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Url:
    protocol: str
    rest: str


def open_place(
    name: Name,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    download: bool = False,
) -> Place:
    """The place to read from that a name means.

    A path of this machine, where there is one; else a repository of the Hub (`openai/gpt-oss-20b`,
    or `hf://openai/gpt-oss-20b@revision/subfolder`, or its page's address); or a URL: `https://…`
    or any other that fsspec knows (`s3://…`, `gs://…`). `revision`, `token` (default: the login)
    and `download` (into the Hub's cache, instead of streaming) are for repositories only;
    `subfolder` is for any.

    Raises `OptionError` for what cannot be meant, `CheckpointError` where it is not there or not to
    be had, `MissingPackageError`, `MachineError`.
    """
    if isinstance(name, Place):
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
        return Folder(user_path(name) / (subfolder or ""))
    full = f"{text.rstrip('/')}/{subfolder}" if subfolder else text
    if url.protocol in ("http", "https"):
        from .web import WebFolder

        return WebFolder(full)
    from .bucket import Bucket

    return Bucket(full)


def open_store(name: str | os.PathLike[str], *, token: str | None = None) -> Store | None:
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
    from .bucket import Bucket

    return Bucket(os.fspath(name))


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
