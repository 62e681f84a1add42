"""The numbers of layers and experts, as users write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from .._utils.arguments import is_iterable, whole_number
from .._utils.messages import short_repr
from ..errors import OptionError

__all__ = ["NumbersLike", "numbers_in", "numbers_text", "parse_numbers"]

NumbersLike: TypeAlias = "str | int | Iterable[int]"
"""How callers name layers or experts: a text such as "0-3,7", a number, or numbers."""


_RANGE = re.compile(r"(-?\d{1,9})(?:-(-?\d{1,9}))?")


def numbers_text(value: NumbersLike | None, noun: str) -> str | None:
    """Return the text that names layers or experts; None for None.

    Args:
        value: A text such as "0-3,7", a number, or several of either; -1 is the last.
        noun: "layer" or "expert", for messages.

    Raises:
        OptionError: For anything else.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray, Mapping)):
        raise _no_numbers(value, noun)
    items: list[Any] = [*value] if is_iterable(value) else [value]
    try:
        return ",".join(
            item if isinstance(item, str) else str(whole_number(item, noun)) for item in items
        )
    except OptionError:
        raise _no_numbers(value, noun) from None


def _no_numbers(value: Any, noun: str) -> OptionError:
    return OptionError(
        f'{short_repr(value)} names no {noun}s; write them as "0-3,7", 3, [0, 2] or range(4)'
    )


def parse_numbers(value: NumbersLike, count: int, noun: str) -> tuple[int, ...]:
    """Return the numbers that a user names, sorted.

    Args:
        value: Numbers, or a text with numbers and ranges such as "0-3,7"; -1 is the last.
        count: The number of layers or experts.
        noun: "layer" or "expert", for messages.

    Raises:
        OptionError: For another text, and for numbers beyond the last.
    """
    return tuple(sorted(set(numbers_in(value, count, noun))))


def numbers_in(value: NumbersLike, count: int, noun: str) -> list[int]:
    """Return the numbers as they are written; takes and raises as `parse_numbers`."""
    text = numbers_text(value, noun) or ""
    numbers: list[int] = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match is None:
            raise OptionError(
                f"{text!r} names no {noun}s; write them as 0-3,7 or -1 for the last one"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        for number in (first, last):
            if not -count <= number < count:
                raise OptionError(f"{noun} {number}: there are {noun}s 0 to {count - 1}")
        first, last = first % count, last % count
        if first > last:
            raise OptionError(f"{item.strip()!r}: the first {noun} comes after the last")
        numbers += range(first, last + 1)
    return numbers
