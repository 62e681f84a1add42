"""The argument parser of the commands."""

from __future__ import annotations

import argparse
from typing import Any, TypeAlias

__all__ = ["Commands", "Parser"]


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts options between positionals, also if one is optional.

    A plain `ArgumentParser` cannot parse `verify SOURCE --json OUTPUT`: it assigns positionals as
    soon as an option follows them, and takes SOURCE for OUTPUT.
    """

    _is_parsing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments in any order; see `argparse.ArgumentParser.parse_known_args`."""
        if self._is_parsing:  # parse_known_intermixed_args calls this method
            return super().parse_known_args(args, namespace)
        self._is_parsing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_parsing = False


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""What `ArgumentParser.add_subparsers` returns; each command adds its parser to it."""
