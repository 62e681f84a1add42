"""The command `synth`: write a random checkpoint, or a random adapter for one."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import OptionError
from ._options import add_max_shard_size, add_overwrite, add_quiet, add_workers
from ._parser import Commands
from ._printing import print_platform_note
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
_SHARED = ("seed", "workers", "overwrite")
_OF_CHECKPOINTS = ("format", "max_shard_size")
_OF_ADAPTERS = ("rank", "alpha", "targets")


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "synth",
        help="write a random checkpoint to try things with",
        description="Write a random gpt-oss checkpoint, or a LoRA adapter for one. The same seed "
        "gives the same model in every format.",
    )
    parser.add_argument(
        "output", metavar="OUTPUT", help="folder to write: new, empty, or unfinished to resume"
    )
    parser.add_argument(
        "--format",
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
    _add_adapter(parser)
    group = parser.add_argument_group("model dimensions (default: those of the preset)")
    for name, what in _DIMENSIONS.items():
        group.add_argument(f"--{name}", type=int, metavar="N", help=what)
    # Without a value, so that it is known which of them were given.
    parser.set_defaults(run=run, max_shard_size=None)


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    """Add `--adapter` and the options about it."""
    group = parser.add_argument_group("LoRA adapter")
    group.add_argument(
        "--adapter",
        action="store_true",
        help="write a random adapter for such a checkpoint instead, in PEFT's files",
    )
    group.add_argument("--rank", type=int, metavar="R", help="its rank (default: 16)")
    group.add_argument(
        "--alpha", type=int, metavar="A", help="its lora_alpha (default: twice the rank)"
    )
    group.add_argument(
        "--targets",
        metavar="LIST",
        help="what it changes: some of attention, router, experts and lm_head, with commas "
        "(default: attention,experts)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..random_adapter import DEFAULT_RANK, DEFAULT_TARGETS
    from ..random_checkpoint import DEFAULT_FORMAT
    from ..synthesis import synth, synth_adapter

    print_platform_note(arguments)
    own = _own_options(arguments)
    dimensions = {name.replace("-", "_") for name in _DIMENSIONS}
    own |= {name: getattr(arguments, name) for name in (*_SHARED, *dimensions)}
    write = synth_adapter if arguments.adapter else synth
    with progress_bar(arguments.quiet) as (on_start, on_progress):
        folder = write(
            arguments.output,
            arguments.preset,
            on_start=on_start,
            on_progress=on_progress,
            **own,
        )
    if arguments.quiet:
        return 0
    if arguments.adapter:
        targets = arguments.targets or ",".join(DEFAULT_TARGETS)
        what = f"adapter ({arguments.preset}, rank {arguments.rank or DEFAULT_RANK}, {targets}"
    else:
        what = f"checkpoint ({arguments.preset}, {arguments.format or DEFAULT_FORMAT}"
    print(f"{folder}: random {what}, seed {arguments.seed})")
    return 0


def _own_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the given options that only checkpoints have, or only adapters; refuse the others'.

    Raises:
        OptionError: For an option of the other kind.
    """
    own, others = (_OF_ADAPTERS, _OF_CHECKPOINTS)[:: 1 if arguments.adapter else -1]
    for name in others:
        if getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            advice = "with --adapter; remove one of the two"
            if not arguments.adapter:
                advice = "for a checkpoint; add --adapter, or remove it"
            raise OptionError(f"{option} has no meaning {advice}")
    return {name: getattr(arguments, name) for name in own if getattr(arguments, name) is not None}
