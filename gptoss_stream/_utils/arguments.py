"""Checks of arguments: what means the same is accepted, and everything else is one line."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, TypeGuard

from ..errors import OptionError
from .messages import short_repr

__all__ = [
    "check_choice",
    "finite_number",
    "is_iterable",
    "texts",
    "whole_number",
]


def whole_number(value: Any, what: str, least: int | None = None) -> int:
    """Return an integer of any type, such as numpy's, as Python's.

    Args:
        value: The argument.
        what: What it is, for messages.
        least: The smallest value that is allowed; None for any.

    Raises:
        OptionError: For anything else, also for True and False.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise OptionError(f"{what} {short_repr(value)}: it must be an integer")
    if least is not None and number < least:
        raise OptionError(f"{what} {number}: it must be at least {least}")
    return number


def check_choice(value: Any, what: str, choices: Iterable[str]) -> None:
    """Check that a value is one of several texts.

    Raises:
        OptionError: If it is not.
    """
    known = [*choices]
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"unknown {what} {short_repr(value)}; choose one of {', '.join(known)}")


def finite_number(value: Any, what: str) -> int | float:
    """Return a number of any type, such as numpy's, as an int or a float.

    Args:
        value: The argument.
        what: What it is, for messages.

    Raises:
        OptionError: For NaN, an infinity, and what is no number.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise OptionError(f"{what} {short_repr(value)}: it must be a finite number")
    return value if isinstance(value, (int, float)) else float(value)


def is_iterable(value: Any) -> TypeGuard[Iterable[Any]]:
    """Return whether a value can be iterated over; an array without axes cannot."""
    try:
        iter(value)
    except TypeError:
        return False
    return True


def texts(value: str | Iterable[str] | None, what: str, *, separator: str = "") -> tuple[str, ...]:
    """Return one text or several as a tuple; empty for None.

    Args:
        value: The argument.
        what: What each of them is, for messages.
        separator: What separates several in one text; empty for nothing.

    Raises:
        OptionError: For anything else.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        parts = value.split(separator) if separator else [value]
        return tuple(part.strip() if separator else part for part in parts)
    found: list[Any] = [value]
    if is_iterable(value) and not isinstance(value, (bytes, bytearray, Mapping)):
        found = [*value]
    if not all(isinstance(one, str) for one in found):
        raise OptionError(f"{short_repr(value)} is no {what}; give a text or a list of texts")
    return tuple(found)
