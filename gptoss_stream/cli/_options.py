"""Options that several commands share, and the objects that they stand for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ._printing import print_message

if TYPE_CHECKING:
    from ..model.selection import Selection
    from ..storage.location import Location, WritableLocation

__all__ = [
    "add_conversion_options",
    "add_json",
    "add_max_shard_size",
    "add_overwrite",
    "add_quantization",
    "add_quiet",
    "add_remote_output",
    "add_remote_source",
    "add_selection",
    "add_source",
    "add_source_format",
    "add_workers",
    "open_other",
    "open_output",
    "open_reference",
    "open_source",
    "parse_selection",
]


def add_source(
    parser: argparse.ArgumentParser, what: str = "checkpoint to read", *, is_optional: bool = False
) -> None:
    """Add the positional SOURCE.

    Args:
        parser: The parser of a command.
        what: What SOURCE is, for the help text.
        is_optional: Whether SOURCE may be left out.
    """
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?" if is_optional else None,
        help=f"{what}: a folder, a Hub repository such as openai/gpt-oss-20b, or a URL",
    )


def add_remote_source(
    parser: argparse.ArgumentParser, *, can_download: bool = False, or_output: bool = False
) -> None:
    """Add the options of a remote SOURCE.

    Args:
        parser: The parser of a command.
        can_download: Whether the command has `--download`.
        or_output: Whether they are those of OUTPUT if there is no SOURCE.
    """
    group = parser.add_argument_group(
        "remote source", "With --checksums they are of OUTPUT." if or_output else None
    )
    group.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a Hub repository"
    )
    group.add_argument(
        "--subfolder", metavar="DIR", help="folder in SOURCE with the checkpoint, such as original"
    )
    group.add_argument(
        "--token", metavar="TOKEN", help="Hub token (default: cached login or HF_TOKEN)"
    )
    if can_download:
        group.add_argument(
            "--download",
            action="store_true",
            help="download SOURCE to the Hub cache instead of streaming it",
        )


def add_remote_output(parser: argparse.ArgumentParser) -> None:
    """Add the options of a remote OUTPUT."""
    group = parser.add_argument_group("remote output")
    group.add_argument(
        "--staging",
        metavar="DIR",
        help="local folder for shards until they are uploaded (default: in the user's cache)",
    )
    group.add_argument(
        "--max-staged",
        type=int,
        default=2,
        metavar="N",
        help="maximum number of shards in that folder (default: 2)",
    )


def add_source_format(parser: argparse.ArgumentParser) -> None:
    """Add `--from`."""
    parser.add_argument(
        "--from",
        dest="source_format",
        metavar="FORMAT",
        help="format of SOURCE (default: detected)",
    )


def add_conversion_options(parser: argparse.ArgumentParser) -> None:
    """Add `--to`, `--from`, `--dtype` and `--max-shard-size`."""
    parser.add_argument(
        "--to",
        default="transformer-lens",
        metavar="FORMAT",
        help="format to write (default: transformer-lens); the command 'formats' lists them all",
    )
    add_source_format(parser)
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="bfloat16, float16, float32, or keep for each tensor's own (default: keep from a "
        "format to itself and from transformer-lens, otherwise bfloat16)",
    )
    add_max_shard_size(parser)
    add_quantization(parser)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Add `--mxfp4-rule` and `--reference`."""
    parser.add_argument(
        "--mxfp4-rule",
        metavar="RULE",
        help="how floats become MXFP4: openai (default), modelopt, ocp or even; see docs/mxfp4.md",
    )
    parser.add_argument(
        "--reference",
        metavar="BASE",
        help="checkpoint in MXFP4 that SOURCE was trained from, such as openai/gpt-oss-20b: its "
        "blocks are kept where they have the values of SOURCE",
    )


def add_max_shard_size(parser: argparse.ArgumentParser) -> None:
    """Add `--max-shard-size`."""
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="maximum size of a shard, such as 500MB, in decimal units (default: 5GB); a larger "
        "tensor gets a shard of its own",
    )


def add_selection(parser: argparse.ArgumentParser, description: str | None = None) -> None:
    """Add the options that select tensors of the output."""
    group = parser.add_argument_group("selection (options are combined)", description)
    group.add_argument(
        "--layers",
        metavar="LIST",
        help="layers, such as 0-3,7; -1 is the last (write --layers=-2,-1 if the list starts with "
        "a minus sign); tensors outside layers are kept",
    )
    group.add_argument(
        "--experts",
        metavar="LIST",
        help="experts, such as 0,5-9; -1 is the last; tensors outside experts are kept",
    )
    group.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="GROUP",
        help="a group of tensors: attention, experts, router, embeddings or norms; may be repeated",
    )
    for name, effect in (("include", "that match"), ("exclude", "that do not match")):
        group.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="GLOB",
            help=f"output tensors with names {effect}, such as '*.bias'; may be repeated",
        )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add `--workers`."""
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of threads (default: one more than processors, at most 8)",
    )


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add `--overwrite`."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier output of this tool; other files are not deleted",
    )


def add_quiet(parser: argparse.ArgumentParser, what: str = "errors") -> None:
    """Add `--quiet`; `what` is all that is then printed."""
    parser.add_argument("--quiet", action="store_true", help=f"print {what} only")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def open_source(arguments: argparse.Namespace, *, is_token_for_other: bool = False) -> Location:
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
            print_message(f"reading the local folder {location}")
    return location


def open_output(arguments: argparse.Namespace) -> WritableLocation | None:
    """Open OUTPUT if it is remote; return None for a local folder."""
    from ..storage.open_location import open_writable_location

    return open_writable_location(arguments.output, token=arguments.token)


def open_reference(arguments: argparse.Namespace) -> Location | None:
    """Open the checkpoint that `--reference` names, if any; print where it is read from."""
    if arguments.reference is None:
        return None
    return open_other(arguments.reference, arguments, "comparing with")


def open_other(name: str, arguments: argparse.Namespace, doing: str) -> Location:
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


def parse_selection(arguments: argparse.Namespace) -> Selection | None:
    """Return the selection, or None without any selection option."""
    from ..model.selection import Selection

    selection = Selection(
        arguments.layers,
        arguments.experts,
        tuple(arguments.only),
        tuple(arguments.include),
        tuple(arguments.exclude),
    )
    return None if selection == Selection() else selection
