"""The command `formats`: list the supported formats."""

from __future__ import annotations

from ._command import Arguments, command
from ._options import json_option
from ._printing import print_json

__all__ = ["formats"]


@command(
    "formats",
    short_help="list the supported formats",
    description="List the formats that can be read and written.",
    examples=("", "--json"),
)
@json_option
def formats(arguments: Arguments) -> int:
    """Run the command; return the exit code."""
    from ..formats import names as format_names

    names = list(format_names())
    if arguments.json:
        print_json({"formats": names})
    else:
        print("\n".join(names))
    return 0
