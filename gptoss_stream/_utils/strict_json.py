"""Reads JSON strictly: refuses what is ambiguous or not JSON.

Python's `json` accepts UTF-16, NaN, duplicate keys (the last one counts), lone surrogates and
integers of any length, reads -0 as an integer, and raises `RecursionError` on deep nesting. A file
that two readers understand differently must not be converted, so these are errors here, and -0 is
a float, as in other readers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

__all__ = ["SCHEMA", "dumps", "loads"]

SCHEMA = 1
"""The version of what this tool's own JSON files and reports look like, as their key `schema`. A
file without the key is of version 1."""


def dumps(value: Mapping[str, Any]) -> bytes:
    """Return the text of a JSON file, indented for users to read."""
    return (json.dumps(value, indent=2) + "\n").encode()


def _no_constant(name: str) -> NoReturn:
    """Refuse NaN, Infinity and -Infinity."""
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    """Parse a number with a fraction or an exponent."""
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _integer(text: str) -> int | float:
    """Parse a number without fraction and exponent."""
    return -0.0 if text == "-0" else int(text)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the members of an object, whose names must differ."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} occurs twice")
            seen.add(key)
    return result


def loads(data: bytes) -> Any:
    """Parse a JSON text (RFC 8259) in UTF-8.

    Raises:
        ValueError: If it is not strict JSON; the message says what is wrong.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise ValueError("begins with a byte order mark")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_integer if "-0" in text else None,  # the built-in is faster
        )
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("not JSON: a string holds half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    return value
