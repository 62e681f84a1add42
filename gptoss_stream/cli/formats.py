"""The command line: parses, calls the library, prints. Exit codes: 0 done; 1 verify found
differences; 2 bad usage or input; 3 the machine failed; 130 interrupted (143 by SIGTERM).

Nothing heavy is imported before a command runs, so that --help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

__all__ = []


def _formats(arguments: argparse.Namespace) -> None:
    from .. import formats

    known = list(formats.names())
    print(json.dumps({"formats": known}, indent=2) if arguments.json else "\n".join(known))
