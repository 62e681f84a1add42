"""The command `synth`: write a random checkpoint, or a random adapter for one."""

from __future__ import annotations

from typing import Any

from ..errors import OptionError
from ._command import Arguments, Decorator, OptionGroup, combined, command, option
from ._options import (
    max_shard_size_option,
    output_argument,
    overwrite_option,
    quiet_option,
    required_output,
    workers_option,
)
from ._printing import print_platform_note
from ._progress import progress_option, show_progress
from ._values import FORMATS, PRESETS, TARGETS

__all__ = ["synth"]

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


_ADAPTER = OptionGroup("LoRA adapter")
_DIMENSION = OptionGroup("Model dimensions", "The defaults are those of the preset.")

_adapter_options: Decorator = combined(
    (
        option(
            "--adapter",
            is_flag=True,
            group=_ADAPTER,
            help="write a random adapter for such a checkpoint instead, in PEFT's files",
        ),
        option("--rank", type=int, metavar="R", group=_ADAPTER, help="its rank (default: 16)"),
        option(
            "--alpha",
            type=int,
            metavar="A",
            group=_ADAPTER,
            help="its lora_alpha (default: twice the rank)",
        ),
        option(
            "--targets",
            type=TARGETS,
            metavar="LIST",
            group=_ADAPTER,
            help="what it changes: some of {choices}, with commas (default: attention,experts)",
        ),
    )
)


@command(
    "synth",
    short_help="write a random checkpoint to try things with",
    description="Write a random gpt-oss checkpoint, or a LoRA adapter for one. The same seed gives "
    "the same model in every format.",
    examples=(
        "demo/checkpoint",
        "large --preset 20b --layers 2",
        "demo/adapter --adapter --rank 8",
    ),
)
@output_argument("folder to write: new, empty, or unfinished to resume", "OUTPUT")
@option(
    "--format",
    type=FORMATS,
    metavar="FORMAT",
    help="format to write: {choices} (default: hf-mxfp4)",
)
@option(
    "--preset",
    type=PRESETS,
    default="tiny",
    metavar="NAME",
    help="size of the model: {choices} (default: tiny)",
)
@option("--seed", type=int, default=0, metavar="S", help="random seed (default: 0)")
@max_shard_size_option
@workers_option
@overwrite_option
@progress_option
@quiet_option()
@_adapter_options
@combined(
    option(f"--{name}", type=int, metavar="N", group=_DIMENSION, help=what)
    for name, what in _DIMENSIONS.items()
)
def synth(arguments: Arguments) -> int:
    """Run the command; return the exit code."""
    from .. import synthesis
    from ..random_adapter import DEFAULT_RANK, DEFAULT_TARGETS
    from ..random_checkpoint import DEFAULT_FORMAT

    arguments.output = required_output(arguments)
    print_platform_note(quiet=arguments.quiet)
    own = _own_options(arguments)
    dimensions = {name.replace("-", "_") for name in _DIMENSIONS}
    own |= {name: getattr(arguments, name) for name in (*_SHARED, *dimensions)}
    write = synthesis.synth_adapter if arguments.adapter else synthesis.synth
    with show_progress(arguments, "writing") as progress:
        folder = write(
            arguments.output,
            arguments.preset,
            on_start=progress.start,
            on_progress=progress.advance,
            on_shard=progress.count_shard,
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


def _own_options(arguments: Arguments) -> dict[str, Any]:
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
