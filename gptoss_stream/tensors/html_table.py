"""Tables of tensors for notebooks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import islice
from typing import NamedTuple

from .._utils.messages import sized

__all__ = ["TensorRow", "html_table"]

_MOST_ROWS = 40
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class TensorRow(NamedTuple):
    """A tensor in a table."""

    name: str
    dtype: str
    shape: Sequence[int]
    nbytes: int


def html_table(caption: str, tensors: Iterable[TensorRow]) -> str:
    """Return a table with a row for each kind of tensor: those whose names differ in numbers only.

    Args:
        caption: What stands above it.
        tensors: The tensors, in order.
    """
    kinds: dict[str, list[TensorRow]] = {}
    for tensor in tensors:
        kinds.setdefault(_NUMBER.sub("*", tensor.name), []).append(tensor)
    rows = [_row(kind, members) for kind, members in islice(kinds.items(), _MOST_ROWS)]
    if len(kinds) > _MOST_ROWS:
        rows.append([f"… and {len(kinds) - _MOST_ROWS} kinds more"])
    head = _line(["tensors", "number", "dtype", "shape", "size"], "th")
    body = "".join(_line(row, "td") for row in rows)
    return f"<table><caption>{escape(caption)}</caption>{head}{body}</table>"


def _row(kind: str, tensors: Sequence[TensorRow]) -> list[str]:
    """Return the cells of a kind of tensor."""
    dtypes = dict.fromkeys(tensor.dtype for tensor in tensors)
    shapes = dict.fromkeys(str([*tensor.shape]) for tensor in tensors)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return [kind, f"{len(tensors):,}", ", ".join(dtypes), " or ".join(shapes), sized(nbytes)]


def _line(cells: Iterable[str], tag: str) -> str:
    return f"<tr>{''.join(_cells(cells, tag))}</tr>"


def _cells(cells: Iterable[str], tag: str) -> Iterator[str]:
    for number, cell in enumerate(cells):
        align = "left" if number == 0 else "right"
        yield f'<{tag} style="text-align: {align}">{escape(cell)}</{tag}>'
