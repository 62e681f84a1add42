"""Numbers, sizes and lists of names in messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["counted", "listed", "short_call", "short_repr", "shortened", "sized", "summary"]


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names of a list, separated by commas."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def shortened(text: str, most: int = 60) -> str:
    """Return a text of at most so many characters: "…" replaces the middle of a longer one."""
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[: most - 1 - half]}…{text[len(text) - half :]}"


def short_repr(value: Any) -> str:
    """Return the `repr` of a value in one short line."""
    return shortened(" ".join(repr(value).split()))


def short_call(name: str, arguments: Mapping[str, Any]) -> str:
    """Return a call that makes a value, as `repr` shows it; long arguments are shortened."""
    most = 150 // max(1, len(arguments))
    return (
        f"{name}({', '.join(f'{key}={shortened(repr(v), most)}' for key, v in arguments.items())})"
    )


def summary(value: object, text: str) -> str:
    """Return what `repr` shows of an object that no call makes: "<Plan: 12 tensors, …>"."""
    return f"<{type(value).__name__}: {shortened(text, 170)}>"


def counted(number: int, noun: str) -> str:
    """Return a number and a noun, in the plural unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def sized(nbytes: int) -> str:
    """Return a size in bytes as text, in decimal units: "1.5 GB"."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit in ("B", "kB") else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
