"""The command line: parses, calls the library, prints. Exit codes: 0 done; 1 verify found
differences; 2 bad usage or input; 3 the machine failed; 130 interrupted (143 by SIGTERM).

Nothing heavy is imported before a command runs, so that --help and usage errors come at once.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Literal

from .printing import say

if TYPE_CHECKING:
    from ..model.selection import Selection
    from ..storage.location import Location, WritableLocation

__all__ = [
    "Parser",
    "add_conversion_options",
    "add_selection_options",
    "add_source",
    "add_source_format",
    "add_staging",
    "add_workers",
    "add_writing_options",
    "open_output",
    "open_source",
    "parse_selection",
]


class Parser(argparse.ArgumentParser):
    """Takes options between positionals of which one may be left out."""

    _is_within = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._is_within:
            return super().parse_known_args(args, namespace)
        self._is_within = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_within = False


def add_source(
    parser: argparse.ArgumentParser, also: str = "", nargs: Literal["?"] | None = None
) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs=nargs,
        help=f"folder of a gpt-oss checkpoint{also}; or openai/gpt-oss-20b on the Hub; or a URL",
    )
    part = parser.add_argument_group("a source that is not a folder here")
    part.add_argument("--revision", metavar="REV", help="branch, tag or commit of a repository")
    part.add_argument("--subfolder", metavar="DIR", help="folder in it, such as original")
    part.add_argument("--token", metavar="TOKEN", help="of the Hub; default: the usual login")


def add_staging(parser: argparse.ArgumentParser) -> None:
    part = parser.add_argument_group("an output that is not a folder here")
    part.add_argument(
        "--staging", metavar="DIR", help="where shards lie until they are sent; default: the cache"
    )
    part.add_argument(
        "--max-staged", type=int, default=2, metavar="N", help="shards there at a time; default 2"
    )


def open_source(arguments: argparse.Namespace, store: WritableLocation | None = None) -> Location:
    """The place that SOURCE means; says which it is where that is not plain. A token may be meant
    for the `store` alone."""
    from ..storage.local_folder import LocalFolder
    from ..storage.open_location import is_repository, is_repository_name, open_location

    location = open_location(
        arguments.source,
        revision=arguments.revision,
        subfolder=arguments.subfolder,
        token=arguments.token if store is None or is_repository(arguments.source) else None,
        download=getattr(arguments, "download", False),
    )
    if not getattr(arguments, "quiet", False):
        if not location.is_local:
            say(f"reading {location}")
        elif is_repository_name(arguments.source) and isinstance(location, LocalFolder):
            say(f"reading the local folder {location}")
    return location


def add_conversion_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        default="transformer-lens",
        metavar="FORMAT",
        help="what to write; default transformer-lens; see the command formats",
    )
    add_selection_options(parser)
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="bfloat16, float16, float32 or keep; default: keep from a format to itself and from "
        "transformer-lens, else bfloat16",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="default 5GB (decimal units)"
    )


def add_source_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="source_format", metavar="FORMAT", help="of SOURCE; default: detected"
    )


def add_selection_options(parser: argparse.ArgumentParser) -> None:
    add_source_format(parser)
    part = parser.add_argument_group("in part", "each option restricts what it speaks of")
    part.add_argument(
        "--layers", metavar="LIST", help="such as 0-3,7; -1 is the last (--layers=-2,-1)"
    )
    part.add_argument("--experts", metavar="LIST", help="such as 0,5-9; -1 is the last")
    part.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="GROUP",
        help="attention, experts, router, embeddings or norms; may be repeated",
    )
    for name in ("include", "exclude"):
        part.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="GLOB",
            help="on names of output tensors; may be repeated",
        )


def parse_selection(arguments: argparse.Namespace) -> Selection | None:
    """The selection that was asked for, if any."""
    from ..model.selection import Selection

    selection = Selection(
        arguments.layers,
        arguments.experts,
        tuple(arguments.only),
        tuple(arguments.include),
        tuple(arguments.exclude),
    )
    return None if selection == Selection() else selection


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="threads; default one more than processors, at most 8",
    )


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    add_workers(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier output of this tool"
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def open_output(arguments: argparse.Namespace) -> WritableLocation | None:
    """The remote place that OUTPUT means, if it means one."""
    from ..storage.open_location import open_writable_location

    return open_writable_location(arguments.output, token=arguments.token)
