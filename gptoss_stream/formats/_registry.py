"""The formats: the modules of this package whose names have no leading underscore."""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module
from typing import cast

from .._utils.arguments import check_choice
from ._format import Format

__all__ = ["load", "names"]

_PACKAGE = __name__.rpartition(".")[0]


def names() -> tuple[str, ...]:
    """Return the names of all formats: those of their modules, with `-` for `_`."""
    modules = (module.name for module in pkgutil.iter_modules(sys.modules[_PACKAGE].__path__))
    return tuple(sorted(name.replace("_", "-") for name in modules if name[0] != "_"))


def load(name: str) -> Format:
    """Return the format of that name.

    Raises:
        OptionError: If there is no such format.
    """
    check_choice(name, "format", names())
    return cast(Format, import_module(f"{_PACKAGE}.{name.replace('-', '_')}"))
