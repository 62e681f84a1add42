"""Folders of the package in which every file is one thing to choose: a checkpoint format.

A file's name, with `-` for `_`, is what it is chosen by; one with a leading underscore is none.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from ..errors import OptionError

__all__ = ["load_module", "module_names"]


def module_names(folder: Iterable[str]) -> tuple[str, ...]:
    """What there is to choose in a package's `__path__`."""
    modules = (module.name for module in pkgutil.iter_modules(folder))
    return tuple(sorted(name.replace("_", "-") for name in modules if name[0] != "_"))


def load_module(package: str, folder: Iterable[str], name: str, what: str) -> Any:
    """The module of that name in a package; raises `OptionError`, speaking of `what`, for a name
    that is none."""
    known = module_names(folder)
    if name not in known:
        raise OptionError(f"unknown {what} {name!r}; choose one of {', '.join(known)}")
    return import_module(f"{package}.{name.replace('-', '_')}")
