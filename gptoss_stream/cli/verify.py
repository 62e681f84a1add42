"""The command line: parses, calls the library, prints. Exit codes: 0 done; 1 verify found
differences; 2 bad usage or input; 3 the machine failed; 130 interrupted (143 by SIGTERM).

Nothing heavy is imported before a command runs, so that --help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from .._utils.messages import counted, sized
from ..errors import OptionError
from .options import open_source, parse_selection
from .printing import selection_line
from .progress import progress_bar

if TYPE_CHECKING:
    pass

__all__ = []


def _verify(arguments: argparse.Namespace) -> int:
    from ..verification.verify import verify, verify_checksums

    if (arguments.source is None) != arguments.checksums:
        raise OptionError("verify takes either SOURCE and OUTPUT, or OUTPUT and --checksums")
    with progress_bar(arguments.quiet) as (start, advance):
        if arguments.checksums:
            result = verify_checksums(
                arguments.output, on_plan=lambda nbytes: start(nbytes, 0), on_bytes=advance
            )
        else:
            result = verify(
                open_source(arguments),
                arguments.output,
                to=arguments.to,
                source_format=arguments.source_format,
                selection=parse_selection(arguments),
                sample=arguments.sample,
                seed=arguments.seed,
                workers=arguments.workers,
                on_plan=lambda nbytes: start(nbytes, 0),
                on_bytes=advance,
            )
    if arguments.json:
        print(json.dumps(result.as_dict(), indent=2))
        return 0 if result.equal else 1
    for difference in result.differences:
        print(difference)
    what = (
        counted(result.files, "file") if arguments.checksums else counted(result.tensors, "tensor")
    )
    compared = f"{what}, {sized(result.nbytes)}{selection_line(result.selection)}"
    if not result.equal:
        print(f"{result.output}: {counted(len(result.differences), 'difference')} ({compared})")
        return 1
    if not arguments.quiet:
        print(f"{result.output}: equal ({compared} compared)")
    return 0
