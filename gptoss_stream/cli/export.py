"""The command `export`: write single tensors to a file."""

from __future__ import annotations

import click

from .._utils.messages import counted, sized
from .._utils.paths import user_path
from ..errors import OptionError
from ._command import Arguments, argument, command, option
from ._options import given_output, output_option, source_argument
from ._printing import print_message
from ._tensor_options import open_tensors, tensor_options
from ._values import PATH

__all__ = ["export"]


@command(
    "export",
    short_help="write single tensors to a .safetensors or .npy file",
    description="Write tensors to a file, without converting the checkpoint.",
    examples=(
        "gpt-oss-20b blocks.3.attn.W_Q blocks.3.attn.W_O layer3.safetensors",
        "openai/gpt-oss-20b model.norm.weight -o norm.npy",
    ),
)
@source_argument()
@argument("names", "name of a tensor", nargs=-1, required=True, type=PATH, metavar="NAME... FILE")
@output_option("FILE")
@option("--overwrite", is_flag=True, help="replace FILE if it exists")
@tensor_options
def export(arguments: Arguments) -> int:
    """Run the command; return the exit code."""
    from ..export import SUFFIXES, export_tensors
    from ..tensors.dtypes import DType

    *names, last = arguments.names
    if arguments.output_option is not None and not last.endswith(SUFFIXES):
        names, last = [*names, last], None
    file = user_path(given_output(arguments, last) or "")
    if not names:
        raise click.UsageError("NAME or FILE is missing", click.get_current_context())
    names = list(dict.fromkeys(names))
    if file.suffix not in SUFFIXES:
        raise OptionError(
            f"{file}: the last argument is the file to write, which ends in {' or '.join(SUFFIXES)}"
        )
    tensors = open_tensors(arguments, names)
    try:
        nbytes = export_tensors(tensors, names, file, overwrite=arguments.overwrite)
    finally:
        tensors.loader.close()
    is_widened = file.suffix == ".npy" and tensors.entries[names[0]].dtype is DType.BF16
    if not arguments.quiet:
        if is_widened:
            print_message("bfloat16 is written as float32, which numpy has and which is exact")
        print(f"{file}: {counted(len(names), 'tensor')}, {sized(nbytes)} of data")
    return 0
