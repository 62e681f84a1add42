"""Names of repositories of the Hub."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from huggingface_hub import constants

from ..errors import OptionError
from .byte_ranges import origin

__all__ = ["name_of_page", "parse_name"]

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


def parse_name(name: str) -> tuple[str, str | None, str | None]:
    """Split `user/name@revision/folder` into repository, revision and folder.

    Raises:
        OptionError: If it is not the name of a model repository.
    """
    match = _NAME.fullmatch(name.strip("/"))
    if match is None or name.startswith(("datasets/", "spaces/")):
        raise OptionError(f"hf://{name}: name a model as hf://user/name@revision/folder")
    return match[1], match[2], match[3]
