"""What this process knows of commits of the Hub. Their files never change.

A process that has listed a commit tells it to others (array tasks, workers), which then need not
ask: the Hub limits the requests of an address.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .location import FileInfo

__all__ = [
    "known_commit",
    "known_files",
    "listings_of",
    "remember",
    "remember_listings",
    "remember_run",
]

_MAX_FILES = 2000  # so that records stay small
_listings: dict[tuple[str, str, str], Mapping[str, FileInfo]] = {}
_commits: dict[tuple[str, str], str] = {}
_IDENTITY = re.compile(r"hf://([^/@]+/[^/@]+)@([0-9a-f]{40})(?:/(.*))?")


def known_commit(repo: str, revision: str) -> str | None:
    """Return the commit that a revision is in this process; None if it must be asked for."""
    is_listed = any(key[:2] == (repo, revision) for key in _listings)
    return revision if is_listed else _commits.get((repo, revision))


def known_files(repo: str, commit: str, subfolder: str) -> Mapping[str, FileInfo] | None:
    """Return the files of a commit by name, if they are known."""
    return _listings.get((repo, commit, subfolder))


def remember(repo: str, commit: str, subfolder: str, files: Mapping[str, FileInfo]) -> None:
    """Remember the files of a commit."""
    _listings[repo, commit, subfolder] = files


def listings_of(identities: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the files of locations as JSON values: size, git's SHA-1 and SHA-256 of each.

    Args:
        identities: The locations (`Location.identity`); those not on the Hub are left out.
    """
    found = {}
    for identity in identities:
        match = _IDENTITY.fullmatch(identity)
        files = match and _listings.get((match[1], match[2], match[3] or ""))
        if files and len(files) <= _MAX_FILES:
            found[identity] = {
                name: [file.nbytes, file.version, file.sha256] for name, file in files.items()
            }
    return found


def remember_listings(listings: Any) -> None:
    """Remember what `listings_of` has returned in another process; damaged values are ignored."""
    for identity, files in listings.items() if isinstance(listings, Mapping) else ():
        match = _IDENTITY.fullmatch(str(identity))
        if match is not None and isinstance(files, Mapping) and all(map(_is_file, files.values())):
            infos = {
                name: FileInfo(name, nbytes, version, sha256=sha256)
                for name, (nbytes, version, sha256) in files.items()
            }
            remember(match[1], match[2], match[3] or "", infos)


def _is_file(value: Any) -> bool:
    """Return whether a value describes a file."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and type(value[0]) is int
        and isinstance(value[1], str)
        and isinstance(value[2], (str, type(None)))
    )


def remember_run(state: Mapping[str, Any]) -> None:
    """Take the revisions that an unfinished run reads as the commits that they were at its begin.

    This is for processes that do nothing but take part in the run.

    Args:
        state: The state of the run.
    """
    remember_listings(state.get("listings"))
    adapters = state.get("adapters")
    adapters = adapters if isinstance(adapters, list) else []
    read = [(state.get("source"), state.get("source_revision"))]
    read += [(a.get("adapter"), a.get("revision")) for a in adapters if isinstance(a, Mapping)]
    for identity, revision in read:
        match = _IDENTITY.fullmatch(str(identity))
        if match is not None and known_commit(match[1], match[2]) is not None:
            _commits[match[1], str(revision or "main")] = match[2]
