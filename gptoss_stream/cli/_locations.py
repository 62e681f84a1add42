"""The objects that a command's locations and its selection stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._command import Arguments
from ._printing import print_message

if TYPE_CHECKING:
    from ..model.selection import Selection
    from ..storage.location import Location, WritableLocation

__all__ = ["open_other", "open_output", "open_reference", "open_source", "parse_selection"]


def open_source(arguments: Arguments, *, is_token_for_other: bool = False) -> Location:
    """Open SOURCE; print where it is read from if that is remote or may be a surprise.

    Args:
        arguments: The parsed arguments.
        is_token_for_other: Whether `--token` may be for another location, such as OUTPUT.
    """
    from ..storage.local_folder import LocalFolder
    from ..storage.open_location import is_repository, is_repository_name, open_location

    is_token_for_source = not is_token_for_other or is_repository(arguments.source)
    location = open_location(
        arguments.source,
        revision=arguments.revision,
        subfolder=arguments.subfolder,
        token=arguments.token if is_token_for_source else None,
        download=getattr(arguments, "download", False),
    )
    if not getattr(arguments, "quiet", False):  # inspect has no --quiet
        if not location.is_local:
            print_message(f"reading {location}")
        elif is_repository_name(arguments.source) and isinstance(location, LocalFolder):
            print_message(f"reading the local folder {location}, not a repository of that name")
    return location


def open_output(arguments: Arguments) -> WritableLocation | None:
    """Open OUTPUT if it is remote; return None for a local folder."""
    from ..storage.open_location import open_writable_location

    return open_writable_location(arguments.output, token=arguments.token)


def open_reference(arguments: Arguments) -> Location | None:
    """Open the checkpoint that `--reference` names, if any; print where it is read from."""
    if arguments.reference is None:
        return None
    return open_other(arguments.reference, arguments, "comparing with")


def open_other(name: str, arguments: Arguments, doing: str) -> Location:
    """Open a location beside SOURCE; print where it is read from if that is remote.

    Args:
        name: The location.
        arguments: The parsed arguments.
        doing: What is done with it, for the message.
    """
    from ..storage.open_location import is_repository, open_location

    location = open_location(name, token=arguments.token if is_repository(name) else None)
    if not location.is_local and not arguments.quiet:
        print_message(f"{doing} {location}")
    return location


def parse_selection(arguments: Arguments) -> Selection | None:
    """Return the selection, or None without any selection option."""
    from ..model.selection import Selection

    selection = Selection(
        arguments.layers,
        arguments.experts,
        tuple(group for groups in arguments.only for group in groups.split(",")),
        arguments.include,
        arguments.exclude,
    )
    return None if selection == Selection() else selection
