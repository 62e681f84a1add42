"""The command `verify`: compare a converted output with its source, or with its checksums."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .._utils.messages import counted, sized
from ..errors import OptionError
from ._adapter_options import add_adapters, open_adapters
from ._options import (
    add_json,
    add_quantization,
    add_quiet,
    add_remote_source,
    add_selection,
    add_source,
    add_source_format,
    add_workers,
    open_other,
    open_reference,
    open_source,
    parse_selection,
)
from ._parser import Commands
from ._printing import describe_selection, print_json
from ._progress import progress_bar

if TYPE_CHECKING:
    from ..verification.differences import Verification

__all__ = ["add_parser", "run"]


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "verify",
        help="compare a converted output with its source",
        description="Convert SOURCE again in memory and compare every byte with OUTPUT; or, with "
        "--checksums and without SOURCE, check OUTPUT against its SHA256SUMS: its large files on "
        "the Hub by the checksums that the Hub lists, without reading them. The exit code is 1 if "
        "there are differences.",
    )
    add_source(parser, "checkpoint that was converted", is_optional=True)
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        help="converted output: a folder, a Hub repository, or a URL",
    )
    parser.add_argument(
        "--checksums",
        action="store_true",
        help="check OUTPUT against its SHA256SUMS instead of SOURCE",
    )
    parser.add_argument(
        "--to",
        metavar="FORMAT",
        help="format of OUTPUT (default: as recorded in its gptoss_stream.json)",
    )
    add_source_format(parser)
    add_quantization(parser)
    parser.add_argument(
        "--sample", type=int, metavar="N", help="compare the data of N random tensors only"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="random seed of --sample (default: 0)"
    )
    add_workers(parser)
    add_quiet(parser, "differences and errors")
    add_json(parser)
    add_adapters(parser)
    add_selection(parser, "By default as recorded in OUTPUT's gptoss_stream.json.")
    add_remote_source(parser, or_output=True)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit code, which is 1 if there are differences."""
    if (arguments.source is None) != arguments.checksums:
        raise OptionError("verify takes either SOURCE and OUTPUT, or OUTPUT and --checksums")
    result = _verify_checksums(arguments) if arguments.checksums else _verify(arguments)
    if arguments.json:
        print_json(result.as_dict())
    else:
        _print_result(result, arguments)
    return 0 if result.equal else 1


def _verify(arguments: argparse.Namespace) -> Verification:
    """Compare OUTPUT with SOURCE."""
    from ..storage.open_location import is_repository
    from ..verification.verify import verify

    with progress_bar(arguments.quiet) as (on_start, on_progress):
        return verify(
            open_source(arguments, is_token_for_other=is_repository(arguments.output)),
            open_other(arguments.output, arguments, "verifying"),
            to=arguments.to,
            source_format=arguments.source_format,
            selection=parse_selection(arguments),
            sample=arguments.sample,
            seed=arguments.seed,
            workers=arguments.workers,
            mxfp4_rule=arguments.mxfp4_rule,
            reference=open_reference(arguments),
            adapters=open_adapters(arguments),
            merge_like_peft=arguments.merge_like_peft,
            on_start=on_start,
            on_progress=on_progress,
        )


def _verify_checksums(arguments: argparse.Namespace) -> Verification:
    """Check OUTPUT against its SHA256SUMS."""
    from ..verification.verify import verify_checksums

    arguments.source = arguments.output  # whose options the user has given
    output = open_source(arguments)
    with progress_bar(arguments.quiet) as (on_start, on_progress):
        return verify_checksums(output, on_start=on_start, on_progress=on_progress)


def _print_result(result: Verification, arguments: argparse.Namespace) -> None:
    """Print each difference, then a summary."""
    for difference in result.differences:
        print(difference)
    what = (
        counted(result.files, "file") if arguments.checksums else counted(result.tensors, "tensor")
    )
    compared = f"{what}{describe_selection(result.selection)}, {sized(result.nbytes)} compared"
    if result.unread:
        compared += f" ({counted(result.unread, 'file')} by the checksums that the Hub lists)"
    if not result.equal:
        print(f"{result.output}: {counted(len(result.differences), 'difference')}; {compared}")
    elif not arguments.quiet:
        print(f"{result.output}: equal; {compared}")
