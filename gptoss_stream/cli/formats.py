"""The command `formats`: list the supported formats."""

from __future__ import annotations

import argparse

from ._options import add_json
from ._parser import Commands
from ._printing import print_json

__all__ = ["add_parser", "run"]


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "formats",
        help="list the supported formats",
        description="List the formats that can be read and written.",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from .. import formats

    names = list(formats.names())
    if arguments.json:
        print_json({"formats": names})
    else:
        print("\n".join(names))
    return 0
