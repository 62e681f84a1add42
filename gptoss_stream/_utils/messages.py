"""Numbers, sizes and lists of names in messages."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["counted", "listed", "sized"]


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names of a list, separated by commas."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


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
