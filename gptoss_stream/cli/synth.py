"""The command line: parses, calls the library, prints. Exit codes: 0 done; 1 verify found
differences; 2 bad usage or input; 3 the machine failed; 130 interrupted (143 by SIGTERM).

Nothing heavy is imported before a command runs, so that --help and usage errors come at once.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .progress import progress_bar

if TYPE_CHECKING:
    pass

__all__ = []


_DIMENSIONS = (
    "layers",
    "experts",
    "hidden-size",
    "intermediate-size",
    "num-attention-heads",
    "num-key-value-heads",
    "head-dim",
    "vocab-size",
)


def _synth(arguments: argparse.Namespace) -> None:
    from ..synthesis import synth

    overrides = {
        name.replace("-", "_"): getattr(arguments, name.replace("-", "_")) for name in _DIMENSIONS
    }
    with progress_bar(arguments.quiet) as (start, advance):
        folder = synth(
            arguments.output,
            arguments.preset,
            format=arguments.format,
            seed=arguments.seed,
            max_shard_size=arguments.max_shard_size,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            on_plan=start,
            on_bytes=advance,
            **overrides,
        )
    if not arguments.quiet:
        print(
            f"{folder}: a random checkpoint "
            f"({arguments.preset}, {arguments.format}, seed {arguments.seed})"
        )
