"""The command `export`: write single tensors to a file."""

from __future__ import annotations

import argparse

from .._utils.messages import counted, sized
from .._utils.paths import user_path
from ..errors import OptionError
from ._options import add_source
from ._parser import Commands
from ._printing import print_message
from ._tensor_options import add_tensor_options, open_tensors

__all__ = ["add_parser", "run"]


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "export",
        help="write single tensors to a .safetensors or .npy file",
        description="Write tensors to a file, without converting the checkpoint. For example: "
        "export gpt-oss-20b blocks.3.attn.W_Q blocks.3.attn.W_O layer3.safetensors",
    )
    add_source(parser)
    parser.add_argument("names", metavar="NAME", nargs="+", help="name of a tensor")
    parser.add_argument(
        "file",
        metavar="FILE",
        help="file to write: .safetensors, or .npy for one tensor (bfloat16 as float32)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    add_tensor_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..export import SUFFIXES, export_tensors
    from ..tensors.dtypes import DType

    file, names = user_path(arguments.file), list(dict.fromkeys(arguments.names))
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
