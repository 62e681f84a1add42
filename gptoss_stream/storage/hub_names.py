"""Names of repositories of the Hub."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import OptionError
from .byte_ranges import origin

__all__ = ["name_of_page", "parse_name"]

_REFUSED_FOLDERS = {"", ".", "..", ".git", ".cache"}
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*))?")


def name_of_page(url: str) -> str | None:
    """Return `user/name@revision/folder` for the address of a repository's page.

    Returns:
        The name, or None if the address is not a page of a repository.
    """
    if origin(url) != origin(constants.ENDPOINT):
        return None
    match = re.fullmatch(
        r"/([\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve)/([^/]+)(/.*)?)?",
        urlsplit(url).path.rstrip("/"),
    )
    if match is None:
        return None
    return f"{match[1]}{f'@{match[2]}' if match[2] else ''}{match[3] or ''}"


def parse_name(
    name: str, revision: str | None = None, subfolder: str | None = None
) -> tuple[str, str | None, str]:
    """Split `user/name@revision/folder` into repository, revision and folder.

    Args:
        name: The name.
        revision: A branch, tag or commit, if the name has none.
        subfolder: A folder in the one that the name has.

    Returns:
        The repository, the revision if there is one, and the folder, which may be empty.

    Raises:
        OptionError: If it is not the name of a model repository, or of a folder that one can have.
    """
    parts = name.strip("/").split("/")
    if parts[0] == "models" and len(parts) > 2:
        raise OptionError(f"hf://{name}: write hf://{'/'.join(parts[1:])}")
    match = _NAME.fullmatch("/".join(parts))
    if match is None or parts[0] in ("datasets", "spaces"):
        raise OptionError(f"hf://{name}: name a model as hf://user/name@revision/folder")
    repo, named_revision, named_folder = match.groups()
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise OptionError(f"hf://{name}: not a name that a repository can have") from None
    if revision and named_revision and revision != named_revision:
        raise OptionError(f"hf://{name}: it names another revision than --revision {revision}")
    revision = revision or named_revision
    if revision in (".", ".."):
        raise OptionError(f"hf://{name}: {revision} is no revision; name a branch, tag or commit")
    folder = "/".join(part.strip("/") for part in (named_folder, subfolder) if part).strip("/")
    if folder and not _REFUSED_FOLDERS.isdisjoint(folder.split("/")):
        raise OptionError(
            f"hf://{repo}: not a folder that a repository can have: {folder}; name it without "
            "., .., .git, .cache and empty parts"
        )
    return repo, revision, folder
