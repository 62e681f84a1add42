"""The command `verify`: compare a converted output with its source, or with its checksums."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._utils.messages import counted, sized
from ..errors import OptionError
from ._adapter_options import adapter_options, named_adapters, open_adapters
from ._command import Arguments, command, option
from ._conversion_arguments import refuse_swapped
from ._locations import open_other, open_reference, open_source, parse_selection
from ._options import (
    given_output,
    json_option,
    output_argument,
    quantization_options,
    quiet_option,
    remote_source_options,
    selection_options,
    source_argument,
    source_format_option,
    workers_option,
)
from ._printing import describe_selection, print_json
from ._progress import progress_option, show_progress
from ._values import FORMATS

if TYPE_CHECKING:
    from ..verification.differences import Verification

__all__ = ["verify"]

_MAX_LINES = 20


@command(
    "verify",
    short_help="compare a converted output with its source",
    description="Convert SOURCE again in memory and compare every byte with OUTPUT; or, with "
    "--checksums and without SOURCE, check OUTPUT against its SHA256SUMS: its large files on the "
    "Hub by the checksums that the Hub lists, without reading them. The exit code is 1 if there "
    "are differences.",
    examples=(
        "gpt-oss-20b gpt-oss-20b-tl",
        "openai/gpt-oss-20b hf://you/gpt-oss-20b-tl --sample 100",
        "--checksums gpt-oss-20b-tl",
    ),
)
@source_argument("checkpoint that was converted", is_required=False)
@output_argument("converted output: a folder, a Hub repository, or a URL", "OUTPUT")
@option("--checksums", is_flag=True, help="check OUTPUT against its SHA256SUMS instead of SOURCE")
@option(
    "--to",
    type=FORMATS,
    metavar="FORMAT",
    help="format of OUTPUT: {choices} (default: as recorded in its gptoss_stream.json)",
)
@source_format_option
@quantization_options
@option("--sample", type=int, metavar="N", help="compare the data of N random tensors only")
@option("--seed", type=int, default=0, metavar="S", help="random seed of --sample (default: 0)")
@workers_option
@json_option
@progress_option
@quiet_option("differences and errors")
@selection_options("By default as recorded in OUTPUT's gptoss_stream.json.")
@adapter_options
@remote_source_options(or_output=True)
def verify(arguments: Arguments) -> int:
    """Run the command; return the exit code, which is 1 if there are differences."""
    if arguments.checksums and arguments.output is None:  # the only argument is OUTPUT
        arguments.source, arguments.output = None, arguments.source
    arguments.output = given_output(arguments, arguments.output)
    if arguments.output is None or (arguments.source is None) != arguments.checksums:
        raise OptionError("verify takes either SOURCE and OUTPUT, or OUTPUT and --checksums")
    result = _verify_checksums(arguments) if arguments.checksums else _verify(arguments)
    if arguments.json:
        print_json(result.as_dict())
    else:
        _print_result(result, arguments)
    return 0 if result.equal else 1


def _verify(arguments: Arguments) -> Verification:
    """Compare OUTPUT with SOURCE."""
    from ..storage.open_location import is_repository
    from ..verification import verify as verification

    selection, adapters = parse_selection(arguments), named_adapters(arguments)
    if arguments.to is None:  # which is for outputs that do not say what they are
        refuse_swapped(arguments.source, arguments.output)
    with show_progress(arguments, "comparing") as progress:
        return verification.verify(
            open_source(arguments, is_token_for_other=is_repository(arguments.output)),
            open_other(arguments.output, arguments, "verifying"),
            to=arguments.to,
            source_format=arguments.source_format,
            selection=selection,
            sample=arguments.sample,
            seed=arguments.seed,
            workers=arguments.workers,
            mxfp4_rule=arguments.mxfp4_rule,
            reference=open_reference(arguments),
            adapters=open_adapters(adapters, arguments),
            merge_like_peft=arguments.merge_like_peft,
            on_start=progress.start,
            on_progress=progress.advance,
        )


def _verify_checksums(arguments: Arguments) -> Verification:
    """Check OUTPUT against its SHA256SUMS."""
    from ..verification.verify import verify_checksums

    arguments.source = arguments.output  # whose options the user has given
    output = open_source(arguments)
    with show_progress(arguments, "checking") as progress:
        return verify_checksums(output, on_start=progress.start, on_progress=progress.advance)


def _print_result(result: Verification, arguments: Arguments) -> None:
    """Print the first differences, then a summary."""
    for difference in result.differences[:_MAX_LINES]:
        print(difference)
    if (left := len(result.differences) - _MAX_LINES) > 0:
        print(f"and {left:,} more; --json lists all")
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
