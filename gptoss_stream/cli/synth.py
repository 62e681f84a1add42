"""The command `synth`: write a random checkpoint."""

from __future__ import annotations

import argparse

from ._options import add_max_shard_size, add_overwrite, add_quiet, add_workers
from ._parser import Commands
from ._progress import progress_bar

__all__ = ["add_parser", "run"]


_DIMENSIONS = {
    "layers": "number of layers",
    "experts": "experts in each layer",
    "hidden-size": "size of the residual stream",
    "intermediate-size": "size of an expert's hidden layer",
    "num-attention-heads": "query heads",
    "num-key-value-heads": "key and value heads",
    "head-dim": "size of a head",
    "vocab-size": "tokens in the vocabulary",
}


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "synth",
        help="write a random checkpoint to try things with",
        description="Write a random gpt-oss checkpoint. The same seed gives the same model in "
        "every format.",
    )
    parser.add_argument(
        "output", metavar="OUTPUT", help="folder to write: new, empty, or unfinished to resume"
    )
    parser.add_argument(
        "--format",
        default="hf-mxfp4",
        metavar="FORMAT",
        help="format to write (default: hf-mxfp4); the command 'formats' lists them all",
    )
    parser.add_argument(
        "--preset",
        default="tiny",
        metavar="NAME",
        help="size of the model: tiny, 20b or 120b (default: tiny)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="random seed (default: 0)")
    add_max_shard_size(parser)
    add_workers(parser)
    add_overwrite(parser)
    add_quiet(parser)
    group = parser.add_argument_group("model dimensions (default: those of the preset)")
    for name, what in _DIMENSIONS.items():
        group.add_argument(f"--{name}", type=int, metavar="N", help=what)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..synthesis import synth

    names = [name.replace("-", "_") for name in _DIMENSIONS]
    dimensions = {name: getattr(arguments, name) for name in names}
    with progress_bar(arguments.quiet) as (on_start, on_progress):
        folder = synth(
            arguments.output,
            arguments.preset,
            format=arguments.format,
            seed=arguments.seed,
            max_shard_size=arguments.max_shard_size,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            on_start=on_start,
            on_progress=on_progress,
            **dimensions,
        )
    if not arguments.quiet:
        print(
            f"{folder}: random checkpoint "
            f"({arguments.preset}, {arguments.format}, seed {arguments.seed})"
        )
    return 0
